"""A world in which every information is known: what S-IB claims and estimates, beside the truth.

    python benchmarks/known_world.py     # about a minute on one core; docs/images/theory_*.png and the tables

Images of 8 x 8 values with unit Gaussian noise, an object in the middle, a label Y = +-1 on the object and a cue
A = +-1 on the background that agrees with the label: E[AY] = strength. docs/theory.md tells what comes out.
Informations are in nats, by quadrature: an answer is z = w1.x + G(w2.x), so everything hangs on two Gaussian numbers.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.special import expit, log_expit, ndtr, xlogy
from scipy.stats import chi, norm
from sib_lab.reporting.pictures import COLOURS, FAINT, INK, STYLE, save
from sib_lab.training.losses import background_share
from torch import Tensor, nn

from sib_ext import SpatialIBLoss, masked_statistics
from sib_ext import functional as sib

SIDE, OBJECT = 8, slice(2, 6)  #: the image and the object's rows and columns
OBJECT_MEAN, CUE_MEAN = 1.25, 2.0  #: of the two sufficient statistics, whose noise is 1: the cue is the easier one
LN2 = math.log(2)
STRENGTHS = np.append(np.linspace(0, 0.9, 10), (0.95, 0.99, 1))
SIGNS = np.array([-1.0, 1.0])


# ------------------------------------------------------------------------------------------------ the world


def object_mask() -> Tensor:
    """M [1,1,8,8], 1 on the object (a quarter of the image)."""
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    mask[..., OBJECT, OBJECT] = 1
    return mask


@cache
def templates() -> tuple[np.ndarray, np.ndarray]:
    """Where label and cue stand, [64] each, of length 1: the object is strong in its middle, the cue alike anywhere."""
    profile = np.array([0.3, 1.0, 1.0, 0.3])
    of_object = np.zeros((SIDE, SIDE))
    of_object[OBJECT, OBJECT] = np.outer(profile, profile)
    of_cue = np.indices((SIDE, SIDE)).sum(0) % 2 * 2.0 - 1
    of_cue[OBJECT, OBJECT] = 0
    return tuple((t / np.linalg.norm(t)).ravel() for t in (of_object, of_cue))


def draw(count: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images x [count,1,8,8] float64, labels [count] in {0,1} and cues [count] in {0,1}, E[AY] = strength in [-1,1]."""
    label = torch.randint(2, (count,), generator=generator)
    agrees = torch.rand(count, generator=generator) < (1 + strength) / 2
    cue = torch.where(agrees, label, 1 - label)
    of_object, of_cue = (torch.from_numpy(t).view(1, 1, SIDE, SIDE) for t in templates())
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    signs = [(2 * which - 1).double().view(-1, 1, 1, 1) for which in (label, cue)]
    return OBJECT_MEAN * signs[0] * of_object + CUE_MEAN * signs[1] * of_cue + noise, label, cue


def cue_evidence(t, strength: float):
    """g(t) = log P(t|Y=1)/P(t|Y=-1) of the cue's statistic t, a tensor: 2 artanh(strength tanh(CUE_MEAN t))."""
    agree, differ = (torch.log(torch.tensor(v, dtype=torch.float64)) for v in (1 + strength, 1 - strength))
    s = CUE_MEAN * t
    return torch.logaddexp(agree + s, differ - s) - torch.logaddexp(differ + s, agree - s)


def evidence(t: np.ndarray, strength: float) -> np.ndarray:
    """:func:`cue_evidence` of an array."""
    return cue_evidence(torch.from_numpy(np.asarray(t, dtype=float)), strength).numpy()


def evidence_slope(t: np.ndarray, strength: float) -> np.ndarray:
    """g'(t): even in t, so it does not know the cue's sign."""
    tanh = np.tanh(CUE_MEAN * t)
    # 1 - strength^2 tanh^2 = sech^2 + (1 - strength^2) tanh^2, without cancellation.
    square = np.cosh(CUE_MEAN * t) ** -2.0
    return 2 * strength * CUE_MEAN * square / (square + (1 - strength**2) * tanh**2)


def posterior_logits(x: Tensor, strength: float) -> Tensor:
    """Logits [B,2] of the exact posterior P(Y|x), (-z/2, z/2): sum zero, so no part of them is hidden from softmax."""
    of_object, of_cue = (x.flatten(1) @ torch.from_numpy(t) for t in templates())
    return two(2 * OBJECT_MEAN * of_object + cue_evidence(of_cue, strength))


def two(z: Tensor) -> Tensor:
    """z [B] -> logits [B,2] = (-z/2, z/2)."""
    return torch.stack([-z / 2, z / 2], 1)


# ----------------------------------------------------------------------------------------------- quadrature


def entropy(p):
    """Of a coin with P(heads) = p in [0,1], nats."""
    return -xlogy(p, p) - xlogy(1 - p, 1 - p)


def line(reach: float, count: int) -> tuple[np.ndarray, float]:
    """Nodes and weight of the trapezoid rule on [-reach, reach]: spectral for smooth integrands that vanish there."""
    nodes, step = np.linspace(-reach, reach, count, retstep=True)
    return nodes, step


def divergence(densities: np.ndarray, weights: np.ndarray, step: float) -> float:
    """I(Z; index), nats, of ``densities`` [K,N] on a grid of width ``step`` and the probabilities ``weights`` [K]."""
    mixed = weights @ densities
    return float(((xlogy(densities, densities).T @ weights) - xlogy(mixed, mixed)).sum() * step)


def statistic_information(mean: float, strength: float = 1.0) -> float:
    """I(t; Y) for t = N(mean A, 1), E[AY] = strength: I(X_f;Y) with OBJECT_MEAN and 1, I(X_b;Y) with CUE_MEAN."""
    t, step = line(mean + 10, 4001)
    agree, differ = norm.pdf(t - mean), norm.pdf(t + mean)
    q = (1 + strength) / 2
    return divergence(np.stack([q * agree + (1 - q) * differ, q * differ + (1 - q) * agree]), np.full(2, 0.5), step)


@dataclass(frozen=True)
class Answer:
    """z = bias + u + G(v) with (u, v) jointly Gaussian, given label and cue: what there is to know of a network.

    ``u`` and ``v`` [2,2]: means given (Y, A), each in the order -1, +1; ``covariance`` [2,2] of (u, v); ``curve`` G.
    """

    u: np.ndarray
    v: np.ndarray
    covariance: np.ndarray
    curve: Callable[[np.ndarray], np.ndarray]
    bias: float = 0.0

    def given_hidden(self, nodes: int = 2001) -> tuple[np.ndarray, float, np.ndarray]:
        """The mean [2,2,nodes] and standard deviation of z given v at quadrature nodes, and their weights [nodes]."""
        normal, step = line(9, nodes)
        deviation = math.sqrt(self.covariance[1, 1])
        slope = self.covariance[0, 1] / deviation
        mean = self.u[..., None] + slope * normal + self.curve(self.v[..., None] + deviation * normal) + self.bias
        return mean, math.sqrt(self.covariance[0, 0] - slope**2), norm.pdf(normal) * step

    def densities(self) -> tuple[np.ndarray, float]:
        """p(z|Y,A) [2,2,N] on an even grid, and its step. The grid resolves the Gaussian that z is given v.

        Raises:
            ArithmeticError: they do not integrate to 1 within 1e-6.
        """
        mean, deviation, weights = self.given_hidden()
        low, high = mean.min() - 9 * deviation, mean.max() + 9 * deviation
        count = min(int((high - low) / deviation * 4) + 1, 4000)
        z, step = np.linspace(low, high, count, retstep=True)
        weights = weights / deviation
        found = np.array([[norm.pdf((z[:, None] - m) / deviation) @ weights for m in row] for row in mean])
        if abs(found.sum(2) * step - 1).max() > 1e-6:
            raise ArithmeticError("the grid of z does not hold its density")
        return found, step

    def accuracy(self, strength: float) -> float:
        """P(sign z = Y) where E[AY] = strength in [-1,1]."""
        mean, deviation, weights = self.given_hidden()
        right = ndtr(mean * SIGNS[:, None, None] / deviation) @ weights
        return float((right * pairs(strength)).sum())


def pairs(strength: float) -> np.ndarray:
    """P(Y, A) [2,2]."""
    return (1 + strength * np.outer(SIGNS, SIGNS)) / 4


def truths(answer: Answer, strength: float) -> dict[str, float]:
    """What an answer z tells, nats.

    ``label``: I(Z;Y) in the world of that strength. ``object``: I(Z;Y|A), and ``cue``: I(Z;A|Y), both where the cue is
    set by a fair coin, so that one cannot stand for the other; ``cue`` is 0 only for an answer without the background's
    cue, and neither changes when z is scaled or bent.
    """
    density, step = answer.densities()
    half = np.full(2, 0.5)
    given_label = (pairs(strength)[..., None] * density).sum(1) * 2
    return {
        "label": divergence(given_label, half, step),
        "object": sum(divergence(density[:, a], half, step) for a in (0, 1)) / 2,
        "cue": sum(divergence(density[y], half, step) for y in (0, 1)) / 2,
    }


def posterior(strength: float) -> Answer:
    """The exact posterior's answer."""
    scale = 2 * OBJECT_MEAN
    return Answer(
        scale * OBJECT_MEAN * np.repeat(SIGNS[:, None], 2, 1),
        CUE_MEAN * np.repeat(SIGNS[None], 2, 0),
        np.diag([scale**2, 1.0]),
        lambda t: evidence(t, strength),
    )


def resolved_cue_information(strength: float, noise: float = 0.1) -> float:
    """I(R_b + N; X_b) of the posterior's logit: R_b = g'(t) along the template, N = noise x 2 CUE_MEAN, its largest."""
    t, step = line(CUE_MEAN + 9, 3001)
    deviation = noise * 2 * CUE_MEAN
    slope = evidence_slope(t, strength)
    weights = (norm.pdf(t - CUE_MEAN) + norm.pdf(t + CUE_MEAN)) / 2 * step
    value, width = np.linspace(slope.min() - 9 * deviation, slope.max() + 9 * deviation, 600, retstep=True)
    density = norm.pdf(value[:, None], slope, deviation) @ weights
    of_noise = 0.5 * math.log(2 * math.pi * math.e * deviation**2)
    return max(float(-xlogy(density, density).sum() * width) - of_noise, 0.0)


# ------------------------------------------------------- one: is the VJP a minimal sufficient statistic?


@dataclass(frozen=True)
class Statistic:
    """A number m(r) of a sample, r with ``density``, and its derivative ``slope``: those of one label."""

    density: Callable[[np.ndarray], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]

    def turns(self, low: float, high: float) -> list[float]:
        """Where m turns round, with both ends."""
        r = np.linspace(low, high, 4001)
        sign = np.sign(self.slope(r))
        at = np.flatnonzero(sign[1:] * sign[:-1] < 0)
        return [low, *(brentq(self.slope, r[i], r[i + 1], xtol=1e-14) for i in at), high]

    def preimages(self, m: np.ndarray, turns: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """[pieces,N]: where each monotone piece takes the values m [N], and whether it does."""
        places, found = [], []
        for start, stop in zip(turns, turns[1:], strict=False):
            ends = self.value(np.array([start, stop]))
            low, high = np.full(m.shape, start), np.full(m.shape, stop)
            for _ in range(60):
                middle = (low + high) / 2
                beyond = (self.value(middle) > m) == (ends[1] > ends[0])
                low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
            places.append((low + high) / 2)
            found.append((m > ends.min()) & (m < ends.max()))
        return np.array(places), np.array(found)

    def pushed(self, m: np.ndarray, turns: Sequence[float]) -> np.ndarray:
        """The density of m(r) at m [N]."""
        places, found = self.preimages(m, turns)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(found, self.density(places) / abs(self.slope(places)), 0).sum(0)


def pushed_information(statistics: tuple[Statistic, Statistic], low: float, high: float) -> float:
    """I(m; Y), nats, of a number m that is not one-to-one in r in [low, high], for two equally likely labels.

    Pieces between all turning points and what maps to their values, Gauss-Legendre after r = a + (b-a) sin^2.
    """
    nodes, weights = np.polynomial.legendre.leggauss(150)
    angle = (nodes + 1) * np.pi / 4
    turns = [statistic.turns(low, high) for statistic in statistics]
    corners = np.concatenate([s.value(np.array(t)) for s, t in zip(statistics, turns, strict=True)])
    total = 0.0
    for statistic, own in zip(statistics, turns, strict=True):
        places, found = statistic.preimages(corners, own)
        cuts = np.unique(np.concatenate([own, places[found]]))
        start, stop = cuts[:-1, None], cuts[1:, None]
        r = (start + (stop - start) * np.sin(angle) ** 2).ravel()
        width = ((stop - start) * np.sin(2 * angle) * weights * np.pi / 4).ravel()
        m = statistic.value(r)
        of_both = [s.pushed(m, t) for s, t in zip(statistics, turns, strict=True)]
        this = statistic.pushed(m, own)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(this / np.mean(of_both, 0))
        total += 0.5 * np.sum(np.where(this > 0, statistic.density(r) * logs, 0) * width)
    return float(total)


def energy_slope(z: np.ndarray) -> np.ndarray:
    """h(z) = ds/dz of the published seed 1/2 sum p^2 for two classes: p(1-p)(2p-1), odd, largest at z = 1.317."""
    p = expit(z)
    return p * (1 - p) * (2 * p - 1)


def energy_curvature(z: np.ndarray) -> np.ndarray:
    """h'(z)."""
    q = expit(z) * expit(-z)
    return q * (6 * q - 1)


def foreground_label_information(mean: float, strength: float = 0.0) -> float:
    """I(R_f; Y) of the published seed's VJP on the object: R_f = h(z) x a fixed field, z the posterior's logit.

    ``mean`` of the object's statistic; ``strength`` of the cue, which z knows and h(z) with it.
    """
    t, step = line(CUE_MEAN + 9, 601 if strength else 1)
    weights = np.array([norm.pdf(t - CUE_MEAN), norm.pdf(t + CUE_MEAN)]) * step if strength else np.full((2, 1), 0.5)
    shift = evidence(t, strength) if strength else np.zeros(1)
    agree = (1 + strength) / 2

    def density(z: np.ndarray, label: int) -> np.ndarray:
        mixed = agree * weights[(1 - label) // 2] + (1 - agree) * weights[(1 + label) // 2]
        gaps = np.asarray(z)[..., None] - shift - 2 * mean**2 * label
        return norm.pdf(gaps, scale=2 * mean) @ mixed / mixed.sum()

    reach = 2 * mean * (mean + 9) + abs(shift).max()
    both = tuple(
        Statistic(lambda z, label=label: density(z, label), energy_slope, energy_curvature) for label in (1, -1)
    )
    return pushed_information(both, -reach, reach)


PIXELS, RATIO = 16, 1.4  #: of the world whose labels differ in the variance, RATIO and 1/RATIO, of every pixel
CURVATURE = RATIO - 1 / RATIO  #: R = CURVATURE x of the logit: 1/v_- - 1/v_+


def radius_logit(r: np.ndarray) -> np.ndarray:
    """The posterior's logit where labels differ in the variance of PIXELS pixels: a function of r = |x|."""
    return CURVATURE * r**2 / 2 - PIXELS * math.log(RATIO)


def radius_density(r: np.ndarray, label: int) -> np.ndarray:
    """p(r|Y): a chi distribution."""
    return chi.pdf(r, PIXELS, scale=RATIO ** (label / 2))


def radius_information() -> float:
    """I(X; Y) in that world."""
    r, step = np.linspace(1e-9, 20, 8001, retstep=True)
    return divergence(np.stack([radius_density(r, 1), radius_density(r, -1)]), np.full(2, 0.5), step)


def seed_information() -> dict[str, dict[str, float]]:
    """I(R; Y), nats, of the exact posterior (object alone): world -> seed -> value; "x": I(X; Y).

    ``means``: labels differ in the mean, R has a fixed direction. ``variances``: R is along x, and its sign is a coin.
    ``predicted_logit`` is what explanations take; ``one_logit`` the logit of one class.
    """
    direct = statistic_information(OBJECT_MEAN)
    means = {
        "x": direct,
        "one_logit": 0.0,  # R is constant
        "logit_sum": 0.0,  # R = 0
        "predicted_logit": LN2 - float(entropy(ndtr(OBJECT_MEAN))),  # the sign of z
        "probability_energy": foreground_label_information(OBJECT_MEAN),
        "random_logit": LN2 - float(entropy(0.25)),  # the sign is the label's three times in four
        "target_logit": LN2,  # the sign is the label
        "target_log_prob": LN2,
    }
    direct = radius_information()
    z, low, high = radius_logit, 1e-6, 16.0

    def signed(label: int, value, slope) -> Statistic:
        return Statistic(lambda r: radius_density(r, label), value, slope)

    def energy_value(r):
        return (energy_slope(z(r)) * r) ** 2

    def energy_derivative(r):
        h = energy_slope(z(r))
        return 2 * h * r * (energy_curvature(z(r)) * CURVATURE * r * r + h)

    energy = tuple(signed(label, energy_value, energy_derivative) for label in (1, -1))
    # log |R| of log p_y: log r + log sigmoid(-label z).
    log_prob = tuple(
        signed(
            label,
            lambda r, label=label: np.log(r) - np.logaddexp(0, label * z(r)),
            lambda r, label=label: 1 / r - label * CURVATURE * r * expit(label * z(r)),
        )
        for label in (1, -1)
    )
    variances = dict.fromkeys(("x", "one_logit", "predicted_logit", "random_logit", "target_logit"), direct)
    variances |= {
        "logit_sum": 0.0,
        "probability_energy": pushed_information(energy, low, high),
        "target_log_prob": pushed_information(log_prob, low, high),
    }
    return {"means": means, "variances": variances}


def kept_information(kept: int, samples: int = 200_000) -> tuple[float, float]:
    """I(R M; Y) where M keeps the ``kept`` largest |R| of PIXELS and nothing else; Monte Carlo, its standard error.

    (Which pixels were kept says nothing of the label; the smallest kept one bounds the others.)
    """
    rng = np.random.default_rng(0)
    label = rng.choice(SIGNS, samples)
    size = np.sort(abs(rng.standard_normal((samples, PIXELS))), 1)[:, -kept:] * RATIO ** (label / 2)[:, None]
    logit = CURVATURE / 2 * (size**2).sum(1) - kept * math.log(RATIO)
    below = [np.log(2 * ndtr(size[:, 0] / RATIO ** (sign / 2)) - 1) for sign in (1, -1)]
    logit += (PIXELS - kept) * (below[0] - below[1])
    each = LN2 + log_expit(label * logit)
    return float(each.mean()), float(each.std() / math.sqrt(samples))


def masked_orientations(mask: Callable[[Tensor], Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """sign det [samples] of the derivative of R -> R M(R) on the object, where labels differ in the variance.

    Both signs: the map is not one-to-one, and R cannot be had back from R M(R).
    """
    inside = object_mask().flatten().nonzero()[:, 0]

    def masked(values: Tensor) -> Tensor:
        R = torch.zeros(SIDE * SIDE, dtype=values.dtype).index_put((inside,), values).view(1, 1, SIDE, SIDE)
        return (R * mask(R)).flatten()[inside]

    values = torch.randn(samples, len(inside), generator=generator, dtype=torch.float64)
    return torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(masked, v))[0] for v in values])


MASKS = {
    "density": lambda R: sib.density_mask(R, window=3, eps=0.0),
    "mean_sigmoid": sib.mean_sigmoid_mask,
    "top_p": sib.top_p_mask,
}


# ------------------------------------------------------------------ two: estimators beside the truth


def estimates(x: Tensor, logits: Tensor, label: Tensor, seed: str) -> dict[str, float]:
    """Every estimator of the library on one batch, its mean, with the object given; logits are those of x [B,1,8,8]."""
    R = sib.vjp(logits, x, label, seed, create_graph=False)
    mask = object_mask().expand_as(R)
    moments, gram_vjp, gram_input = masked_statistics(R, x.detach(), mask)
    count, field = R[0].numel(), sib.magnitude(R)
    values = {
        "background variance": sib.background_variance(moments, count),
        "background energy": sib.background_energy(moments, count),
        "background energy_ratio": sib.background_energy_ratio(moments, count),
        "background magnitude_ratio": sib.background_magnitude_ratio(moments, count),
        "background gaussian": sib.background_gaussian(moments, count, sib.relative_noise(R, 1.0)),
        "foreground hsic": sib.foreground_hsic(gram_vjp, gram_input),
        "foreground hsic_unbiased": sib.foreground_hsic_unbiased(gram_vjp, gram_input),
        "foreground cka": sib.foreground_cka(gram_vjp, gram_input),
        "foreground gaussian": sib.foreground_gaussian(moments, count),
        "foreground capacity": sib.foreground_capacity(field, mask),
    }
    return {name: float(value.mean()) for name, value in values.items()}


def posterior_estimates(strength: float, seed: str, count: int = 1024, sharpness: float = 1.0) -> dict[str, float]:
    """:func:`estimates` of the exact posterior, whose logits are multiplied by ``sharpness``."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # random_logit draws from torch's own
    x, label, _ = draw(count, strength, generator)
    x.requires_grad_()
    return estimates(x, sharpness * posterior_logits(x, strength), label, seed)


def posterior_share(strength: float) -> float:
    """The mean share of |R| in the background, ``magnitude_ratio``, of the posterior's logit, by quadrature."""
    t, step = line(CUE_MEAN + 9, 4001)
    of_object, of_cue = (abs(template).sum() for template in templates())
    background = of_cue * evidence_slope(t, strength)
    share = background / (background + of_object * 2 * OBJECT_MEAN)
    return float((share * (norm.pdf(t - CUE_MEAN) + norm.pdf(t + CUE_MEAN)) / 2).sum() * step)


def step_network(steepness: float, height: float = 3.0) -> dict[str, float]:
    """z = 2 OBJECT_MEAN t_f + height tanh(steepness t_b): the cue enters by a step. Its truth, and what terms see.

    ``share``: mean of the samples' shares of |R| in the background; ``share_of_means``: mean |R| there over mean |R|;
    ``energy``: mean R^2 there.
    """
    t, step = line(CUE_MEAN + 9, 40001)
    weights = (norm.pdf(t - CUE_MEAN) + norm.pdf(t + CUE_MEAN)) / 2 * step
    slope = height * steepness * np.cosh(np.minimum(abs(steepness * t), 300)) ** -2.0
    of_object, of_cue = (abs(template).sum() for template in templates())
    inside, outside = of_object * 2 * OBJECT_MEAN, of_cue * slope
    answer = Answer(posterior(0).u, posterior(0).v, posterior(0).covariance, lambda v: height * np.tanh(steepness * v))
    return {
        "cue": truths(answer, 0)["cue"],
        "share": float(weights @ (outside / (inside + outside))),
        "share_of_means": float(weights @ outside / (inside + weights @ outside)),
        "energy": float(weights @ slope**2) / SIDE**2,
    }


# ------------------------------------------------------------------------------------------ three: training


class Network(nn.Module):
    """z = bias + w1.x + sum_k c_k softplus(a_k w2.x + b_k), float64; the exact posterior is one of them (hidden >= 2).

    Nothing tells it where the object is. Logits [B,2] = (-z/2, z/2) of x [B,1,8,8].
    """

    def __init__(self, generator: torch.Generator, hidden: int = 4):
        super().__init__()

        def start(scale: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.direct, self.filter = start(0.05, SIDE * SIDE), start(0.125, SIDE * SIDE)
        self.inner, self.offset, self.outer = start(1, hidden), start(1, hidden), start(0.3, hidden)
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def curve(self, v: Tensor) -> Tensor:
        """G of v [...]."""
        return F.softplus(v[..., None] * self.inner + self.offset) @ self.outer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return two(self.bias + flat @ self.direct + self.curve(flat @ self.filter))

    @torch.no_grad()
    def answer(self) -> Answer:
        """Its answer, exactly."""
        weights = torch.stack([self.direct, self.filter]).numpy()
        on_object, on_cue = (weights @ template for template in templates())
        means = (
            OBJECT_MEAN * SIGNS[:, None] * on_object[:, None, None] + CUE_MEAN * SIGNS * on_cue[:, None, None]
        )  # [2,2,2]: of u and v, given (Y, A)

        def curve(v: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return self.curve(torch.from_numpy(v)).numpy()

        return Answer(means[0], means[1], weights @ weights.T, curve, float(self.bias))


def plain(logits: Tensor, label: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits, label)


def background_half(logits: Tensor, label: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    field = sib.magnitude(sib.vjp(logits, x, label, "random_logit"))
    return F.cross_entropy(logits, label) + background_share(field, mask).mean()


def foreground_half(logits: Tensor, label: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    field = sib.magnitude(sib.vjp(logits, x, label, "random_logit"))
    return F.cross_entropy(logits, label) - 0.5 * sib.foreground_capacity(field, mask).mean()


def both_halves(logits: Tensor, label: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    field = sib.magnitude(sib.vjp(logits, x, label, "random_logit"))
    terms = background_share(field, mask).mean() - 0.5 * sib.foreground_capacity(field, mask).mean()
    return F.cross_entropy(logits, label) + terms


LOSSES = {
    "cross-entropy": plain,
    "background half": background_half,
    "foreground half": foreground_half,
    "both halves": both_halves,
    "published": SpatialIBLoss(preset="paper"),
}
TRAINED_STRENGTHS = (0.0, 0.8, 0.95, 1.0)
FEW = 128  #: images, where they are few


def train(
    loss: Callable[..., Tensor], strength: float, seed: int, steps: int = 200, batch: int = 128, few: bool = False
) -> Network:
    """A :class:`Network` after ``steps`` of Adam with given masks, on fresh images, or always on the same ``batch``."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = Network(generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, steps)
    mask = object_mask().expand(batch, -1, -1, -1)
    for step in range(steps):
        if step == 0 or not few:
            x, label, _ = draw(batch, strength, generator)
            x.requires_grad_()
        optimizer.zero_grad()
        loss(network(x), label, x, mask).backward()
        optimizer.step()
        schedule.step()
    return network


def judged(network: Network, strength: float) -> dict[str, float]:
    """The truth of a trained network (exact) and of its VJP, on 2048 images.

    Beside :func:`truths`: accuracies where the cue is ``matched``, ``uncorrelated`` and ``flipped``; ``share``, the
    background's share of |R|; ``coverage`` in [0,1], (sum sqrt F)^2 / (n sum F) of F = |R| on the object.
    """
    answer = network.answer()
    x, label, _ = draw(2048, strength, torch.Generator().manual_seed(2))
    x.requires_grad_()
    field = sib.magnitude(sib.vjp(network(x), x, label, "target_logit", create_graph=False))
    mask = object_mask().expand_as(field)
    inside = field[..., OBJECT, OBJECT].flatten(1)
    coverage = inside.sqrt().sum(1).square() / (inside.shape[1] * inside.sum(1).clamp_min(1e-300))
    return {
        **truths(answer, strength),
        "matched": answer.accuracy(strength),
        "uncorrelated": answer.accuracy(0),
        "flipped": answer.accuracy(-strength),
        "share": float(background_share(field, mask).mean()),
        "coverage": float(coverage.mean()),
    }


Measures = Mapping[str, np.ndarray]  #: of :func:`judged`, each [trainings]


def trained(names: Sequence[str], strength: float, seeds: int, few: bool = False) -> dict[str, Measures]:
    """loss -> measures of ``seeds`` trainings; ``few``: on FEW images."""
    found = {}
    for name in names:
        networks = [train(LOSSES[name], strength, seed, batch=FEW, few=few) for seed in range(seeds)]
        runs = [judged(network, strength) for network in networks]
        found[name] = {key: np.array([run[key] for run in runs]) for key in runs[0]}
    return found


# ------------------------------------------------------------------------------------------ tables, figures

TEXT = {"one_logit": "one logit, whatever the label", "predicted_logit": "predicted class's logit"}
OF_LOSS = dict(zip(LOSSES, ("#8792a2", "#0f766e", "#b88a00", "#2f6fb5", "#6aa84f"), strict=True))
OF_SEED = {"random_logit": "balanced's seed", "probability_energy": "published seed"}


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, *values in rows:
        table.add_row(name, *(v if isinstance(v, str) else f"{v:.3g}" if abs(v) < 0.01 else f"{v:.3f}" for v in values))
    console.print(table)


def panel(axes, title: str, xlabel: str, ylabel: str = "") -> None:
    axes.set_title(title, loc="left")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def seeds_figure(
    informations: Mapping[str, Mapping[str, float]], foreground: np.ndarray, all_of_x: np.ndarray
) -> Figure:
    """I(R;Y) by seed in both worlds, and I(R_f;Y) of the published seed by the cue's strength (STRENGTHS)."""
    figure = Figure(figsize=(12.5, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    names = [name for name in informations["means"] if name != "x"]
    for place, (world, title) in enumerate((("means", "labels differ in the mean"), ("variances", "in the variance"))):
        values, limit = informations[world], informations[world]["x"]
        panel(axes[place], title, "I(R;Y), nats")
        colours = [COLOURS["gradient-penalty"] if values[n] > limit + 1e-9 else COLOURS["sib"] for n in names]
        axes[place].barh(range(len(names)), [values[name] for name in names], color=colours, height=0.65)
        axes[place].axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes[place].annotate("I(X;Y)", (limit, -0.75), xytext=(3, 0), textcoords="offset points", va="center")
        for row, name in enumerate(names):
            inside = values[name] > 0.5
            axes[place].text(
                values[name] + (-0.01 if inside else 0.01),
                row,
                f"{values[name]:.3f}",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else INK,
                bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )
        axes[place].set(xlim=(0, 0.73), ylim=(len(names) - 0.4, -1.1), yticks=range(len(names)))
        axes[place].set_yticklabels([TEXT.get(n, n) for n in names] if place == 0 else [])
    panel(axes[2], "the object's VJP knows the background", "strength of the shortcut E[AY]", "nats")
    axes[2].plot(STRENGTHS, all_of_x, color=INK, label="I(X;Y)")
    axes[2].plot(STRENGTHS, foreground, color=COLOURS["sib-paper"], linewidth=2, label="I(R_f;Y), published seed")
    axes[2].axhline(statistic_information(OBJECT_MEAN), color=FAINT, linestyle=":", label="I(X_f;Y), the object's own")
    axes[2].set_ylim(0, LN2)
    axes[2].legend(loc="lower right")
    return figure


def over_strengths(axes) -> None:
    """STRENGTHS side by side, as most happens near 1."""
    axes.set_xticks(range(len(STRENGTHS)), [f"{s:.2g}" if s != 1 else "1" for s in STRENGTHS], fontsize=8.5)


def estimators_figure(truth: Mapping[str, np.ndarray], found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """The truths, the estimators relative to their largest value, and a cue that enters by a step."""
    figure = Figure(figsize=(12.5, 7.6), facecolor="white", layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    at, label = range(len(STRENGTHS)), "strength of the shortcut E[AY] (not to scale)"
    panel(first, "the truth about the exact posterior", label, "nats")
    names = {
        "object": ("answer's information of the object, I(Z;Y|A)", COLOURS["sib"], "-"),
        "cue": ("answer's information of the cue, I(Z;A|Y)", COLOURS["gradient-penalty"], "-"),
        "object held": ("what the object holds, I(X_f;Y)", COLOURS["sib"], ":"),
        "background held": ("what the background holds, I(X_b;Y)", COLOURS["gradient-penalty"], ":"),
        "background VJP": ("background VJP's information of its input, I(R_b+N;X_b)", COLOURS["rrr"], "--"),
    }
    for name, (text, colour, style) in names.items():
        first.plot(at, truth[name], style, color=colour, label=text)
    first.set_ylim(0, 1.35)
    first.legend(loc="upper left", fontsize=8)
    drawn = {  # energy falls on variance, and hsic_unbiased and cka on hsic
        "background": {
            "variance": "#c2571a",
            "energy_ratio": "#b88a00",
            "magnitude_ratio": "#7c4dbd",
            "gaussian": "#2f6fb5",
        },
        "foreground": {"hsic": "#c2571a", "gaussian": "#b88a00", "capacity": "#2f6fb5"},
    }
    for axes, ground, of_answer in ((second, "background", "cue"), (third, "foreground", "object")):
        panel(axes, f"{ground}: estimators, each relative to its largest value", label)
        axes.plot(at, truth[of_answer] / truth[of_answer].max(), color=INK, linewidth=3, label="truth, " + of_answer)
        for name, colour in drawn[ground].items():
            for seed, style in (("random_logit", "-"), ("probability_energy", ":")):
                values = found[seed][f"{ground} {name}"]
                axes.plot(at, values / values.max(), style, color=colour, label=name if style == "-" else None)
        for seed, style in (("random_logit", "-"), ("probability_energy", ":")):
            axes.plot([], [], style, color=FAINT, label=OF_SEED[seed])
        axes.set_ylim(0, 1.04)
        axes.legend(loc="upper left" if ground == "background" else "lower left", fontsize=8, ncols=2)
    for axes in (first, second, third):
        over_strengths(axes)
    panel(fourth, "a cue that enters the answer by a step", "steepness of the step")
    steepness = 2.0 ** np.arange(-2, 7)
    steps = [step_network(k) for k in steepness]
    lines = {
        "cue": ("truth: I(Z;A|Y), nats", INK, "-"),
        "share": ("magnitude_ratio: mean of the samples' shares", "#7c4dbd", "-"),
        "share_of_means": ("share of the batch's mean magnitudes", "#7c4dbd", "--"),
        "energy": ("energy", "#c2571a", "-"),
    }
    for name, (text, colour, style) in lines.items():
        width = 3 if name == "cue" else 1.5
        fourth.plot(steepness, [s[name] for s in steps], style, color=colour, label=text, linewidth=width)
    fourth.set_xscale("log", base=2)
    fourth.set_xticks(steepness, [f"{k:g}" for k in steepness])
    fourth.legend(loc="upper left", fontsize=8)
    return figure


def training_figure(many: Mapping[float, Mapping[str, Measures]], few: Mapping[str, Measures]) -> Figure:
    """What the answer knows of object and cue, and accuracies without the shortcut, by loss."""
    figure = Figure(figsize=(12.5, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    columns = {
        "object": "information of the object, nats",
        "cue": "information of the cue, nats",
        "uncorrelated": "accuracy without the shortcut",
    }
    for place, (key, title) in enumerate(columns.items()):
        panel(axes[place], title, "strength in training")
        for name, colour in OF_LOSS.items():
            values = [many[strength][name][key].mean() for strength in many]
            axes[place].plot(range(len(many)), values, ".-", color=colour, label=name)
        axes[place].set_xticks(range(len(many)), [f"{strength:g}" for strength in many])
        best = {"object": statistic_information(OBJECT_MEAN), "cue": 0, "uncorrelated": ndtr(OBJECT_MEAN)}[key]
        axes[place].axhline(best, color=FAINT, linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES) + 1)
    panel(axes[3], f"the same of {FEW} images, strength .95", "")
    for place, (name, measures) in enumerate(few.items()):
        values = measures["uncorrelated"]
        axes[3].bar(place, values.mean(), color=OF_LOSS[name], width=0.65)
        axes[3].plot(np.full(len(values), place), values, ".", color=INK, markersize=4)
    axes[3].set(ylim=(0.5, 0.92), xticks=range(len(few)))
    axes[3].set_xticklabels([name.replace(" ", "\n").replace("-", "-\n") for name in few], fontsize=8)
    axes[3].axhline(ndtr(OBJECT_MEAN), color=FAINT, linestyle=":")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs/images")
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    console = Console(width=150)

    def write(name: str, draw_it: Callable[[], Figure]) -> None:
        with matplotlib.rc_context(STYLE):
            save(draw_it(), path := folder / f"theory_{name}.png", dpi=115)
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)

    informations = seed_information()
    seeds = list(informations["means"])
    rows = [(name, informations["means"][name], informations["variances"][name]) for name in seeds]
    show(console, "1. I(R;Y), nats, of the exact posterior", ("seed (x: I(X;Y))", "means", "variances"), rows)
    foreground = np.array([foreground_label_information(OBJECT_MEAN, s) for s in STRENGTHS])
    exact = [truths(posterior(s), s) for s in STRENGTHS]
    truth = {key: np.array([t[key] for t in exact]) for key in exact[0]}
    truth |= {
        "object held": np.full(len(STRENGTHS), statistic_information(OBJECT_MEAN)),
        "background held": np.array([statistic_information(CUE_MEAN, s) for s in STRENGTHS]),
        "background VJP": np.array([resolved_cue_information(s) for s in STRENGTHS]),
        "published R_f": foreground,
    }
    write("seeds", lambda: seeds_figure(informations, foreground, truth["label"]))
    kept = [(f"the {k} largest of {PIXELS} kept", "{:.4f} ± {:.4f}".format(*kept_information(k))) for k in (1, 3, 8)]
    show(console, "I(RM;Y), nats, variances, one logit; the mask", ("made of R", ""), kept)
    orientations = [(n, masked_orientations(m, 50, torch.Generator().manual_seed(0))) for n, m in MASKS.items()]
    rows = [(name, f"{int((o > 0).sum())} > 0, {int((o < 0).sum())} < 0") for name, o in orientations]
    show(console, "det d(RM)/dR on 50 images", ("mask", ""), rows)

    shown = [list(STRENGTHS).index(s) for s in (0, 0.5, 0.9, 0.99, 1)]
    columns = [f"{STRENGTHS[i]:g}" for i in shown]
    rows = [(name, *values[shown]) for name, values in truth.items()]
    show(console, "2. the truth, nats, by strength", ("", *columns), rows)
    found = {}
    for seed, text in OF_SEED.items():
        runs = [posterior_estimates(s, seed) for s in STRENGTHS]
        found[seed] = {key: np.array([run[key] for run in runs]).clip(1e-12) for key in runs[0]}
        rows = [(name, *values[shown]) for name, values in found[seed].items()]
        show(console, f"estimates, {text}", ("", *columns), rows)
    write("estimators", lambda: estimators_figure(truth, found))
    steps = [(f"{k}", *step_network(k).values()) for k in (1, 4, 16, 64)]
    show(console, "a cue that enters by a step", ("steepness", *step_network(1)), steps)

    many = {strength: trained(list(LOSSES), strength, 2) for strength in TRAINED_STRENGTHS}
    few = trained([name for name in LOSSES if name != "published"], 0.95, 4, few=True)
    for strength, losses in many.items():
        rows = [(name, *(v.mean() for v in measures.values())) for name, measures in losses.items()]
        show(console, f"3. trained, strength {strength:g}, means of 2", ("", *losses["cross-entropy"]), rows)
    rows = [
        (name, *(f"{v.mean():.3f} ± {v.std(ddof=1) / math.sqrt(len(v)):.3f}" for v in measures.values()))
        for name, measures in few.items()
    ]
    show(console, f"of {FEW} images, strength 0.95, ± standard error of 4", ("", *few["cross-entropy"]), rows)
    write("training", lambda: training_figure(many, few))


if __name__ == "__main__":
    main()
