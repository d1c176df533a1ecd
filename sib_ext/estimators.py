"""Mutual-information estimators on the moments and Grams of masked fields: small tensors, plain PyTorch.

``moments`` [B,9] and the Grams [B,B] come from :func:`sib_ext.masked_statistics` (a = R*M, b = x*M, c = R*(1-M));
``count`` is N = C*H*W. Background estimators return one value per sample [B], foreground estimators a scalar or one
value per sample. Everything is to be *minimised* in the background and *maximised* in the foreground.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_field, check_mask_shape, check_positive, describe
from .reference import widen

# The smallest denominator: keeps 0/0 at 0 and lies far under any VJP energy that float32 can tell from nothing.
TINY = 1e-20
# The largest squared correlation of the Gaussian estimator: -1/2 log(1e-6), about 6.9 nats.
MAX_CORRELATION = 1 - 1e-6


# --------------------------------------------------------------------------------------------- background


def _variance(total: Tensor, squares: Tensor, count: int) -> Tensor:
    return ((squares - total.square() / count) / max(count - 1, 1)).clamp_min(0)


def background_variance(moments: Tensor, count: int) -> Tensor:
    """Var(c) over C,H,W, unbiased (published)."""
    return _variance(moments[:, 5], moments[:, 6], count)


def background_energy(moments: Tensor, count: int) -> Tensor:
    """mean(c^2): the masked VJP energy."""
    return moments[:, 6] / count


def background_energy_ratio(moments: Tensor, count: int) -> Tensor:
    """S_cc / (S_aa + S_cc): the background's share of the VJP energy; in [0,1], free of scale."""
    return moments[:, 6] / (moments[:, 2] + moments[:, 6] + TINY)


def background_magnitude_ratio(moments: Tensor, count: int) -> Tensor:
    """``sum |R|(1-M) / sum |R|``: the background's share of the VJP's magnitude; in [0,1], free of scale.

    1 - EPG, the energy-based pointing game (Wang et al. 2020), of the map ``sum_c |R|``.
    """
    return moments[:, 8] / (moments[:, 7] + moments[:, 8] + TINY)


def background_gaussian(moments: Tensor, count: int, noise: float | Tensor) -> Tensor:
    """1/2 log(1 + Var(c)/sigma^2) nats: the most a background VJP of that variance can tell through a Gaussian channel.

    ``noise`` is sigma^2 > 0, a number or a scalar tensor (see :func:`relative_noise`).
    """
    if not isinstance(noise, Tensor):
        check_positive("noise", noise)
    return 0.5 * torch.log1p(background_variance(moments, count) / noise)


def relative_noise(vjp: Tensor, kappa: float, mean: Tensor | None = None) -> Tensor:
    """sigma^2 = kappa * mean_b Var(R), detached: makes :func:`background_gaussian` free of scale.

    ``mean``: of ``variances`` over the samples that count, a scalar; None: over all.
    """
    check_positive("kappa", kappa)
    mean = variances(vjp).mean() if mean is None else mean
    return kappa * mean.detach() + TINY


def variances(vjp: Tensor) -> Tensor:
    """Var(R) of each sample, [B], unbiased."""
    return vjp.flatten(1).to(torch.promote_types(vjp.dtype, torch.float32)).var(1)


# --------------------------------------------------------------------------------------------- foreground


def normalised_gram(gram: Tensor, eps: float = 1e-12) -> Tensor:
    """The Gram of L2-normalised rows: ``G_ij / (|a_i| |a_j|)``, ``|a_i| = sqrt(G_ii)`` at least eps."""
    norm = gram.diagonal().clamp_min(eps**2).sqrt()
    return gram / (norm[:, None] * norm)


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


LEAST_BATCH = {"hsic": 2, "hsic_unbiased": 4, "cka": 2}


def check_batch(name: str, batch: int) -> None:
    """Estimators that compare samples need some to compare."""
    least = LEAST_BATCH.get(name, 1)
    if batch < least:
        raise ValueError(
            f"foreground={name!r} compares samples and needs a batch of at least {least}, got {batch}: "
            "use larger batches (drop_last=True in the DataLoader) or foreground='gaussian'"
        )


def foreground_hsic(gram_vjp: Tensor, gram_input: Tensor) -> Tensor:
    """Biased linear HSIC of row-normalised fields, sum((HKH) o (HLH))/(B-1)^2 (published); B >= 2.

    1/(B-1), not 0, for independent data.
    """
    batch = gram_vjp.shape[0]
    check_batch("hsic", batch)
    return (_centred(normalised_gram(gram_vjp)) * _centred(normalised_gram(gram_input))).sum() / (batch - 1) ** 2


def foreground_hsic_unbiased(gram_vjp: Tensor, gram_input: Tensor) -> Tensor:
    """Unbiased linear HSIC of row-normalised fields (Song et al. 2012, JMLR 13, eq. 5); B >= 4.

    0 in the mean for independent data.
    """
    batch = gram_vjp.shape[0]
    check_batch("hsic_unbiased", batch)
    off_diagonal = 1 - torch.eye(batch, dtype=gram_vjp.dtype, device=gram_vjp.device)
    K, L = normalised_gram(gram_vjp) * off_diagonal, normalised_gram(gram_input) * off_diagonal
    rows_K, rows_L = K.sum(1), L.sum(1)
    trace = (K * L).sum()
    means = rows_K.sum() * rows_L.sum() / ((batch - 1) * (batch - 2))
    cross = 2 / (batch - 2) * (rows_K * rows_L).sum()
    return (trace + means - cross) / (batch * (batch - 3))


def foreground_cka(gram_vjp: Tensor, gram_input: Tensor) -> Tensor:
    """Linear CKA of row-normalised fields, HSIC(K,L)/sqrt(HSIC(K,K) HSIC(L,L)) (Kornblith et al. 2019); B >= 2.

    In [0,1].
    """
    check_batch("cka", gram_vjp.shape[0])
    K, L = _centred(normalised_gram(gram_vjp)), _centred(normalised_gram(gram_input))
    return (K * L).sum() / (K.square().sum() * L.square().sum()).clamp_min(TINY).sqrt()


def foreground_gaussian(moments: Tensor, count: int) -> Tensor:
    """-1/2 log(1 - rho^2) nats per sample, rho = corr(a, b) over C,H,W: the MI of jointly Gaussian masked fields."""
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = moments[:, :5].unbind(1)
    variance_a, variance_b = _variance(sum_a, sum_aa, count), _variance(sum_b, sum_bb, count)
    covariance = (sum_ab - sum_a * sum_b / count) / max(count - 1, 1)
    # Divided in two steps: the product of two small variances would underflow in float32.
    squared = covariance / variance_a.clamp_min(TINY) * (covariance / variance_b.clamp_min(TINY))
    return -0.5 * torch.log1p(-squared.clamp_max(MAX_CORRELATION))


def foreground_capacity(field: Tensor, mask: Tensor, mean: Tensor | None = None, kappa: float = 1.0) -> Tensor:
    """I_f = sum M C / sum M nats per sample, C_i = 1/2 log(1 + s_i^2/kappa), s_i = F_i/mean: [B].

    Every position of the foreground as a Gaussian channel of noise kappa times the squared mean of the batch's fields:
    the most that the field can tell of the input there. Concave in large s, so it spreads over the object, as
    water-filling does (Cover & Thomas 2006, section 9.4); free of scale; a map that fades against its batch's pays.
    0, with gradient 0, for an empty mask, and for fields that are zero throughout.

    Args:
        field: F [B,1,h,w], >= 0.
        mask: M [B,1,h,w] in [0,1].
        mean: of F over the batch and all positions, a scalar; None: of ``field``. Its gradient counts.
        kappa: > 0.

    Raises:
        ValueError: another shape, or kappa out of range.
    """
    check_positive("kappa", kappa)
    check_field("field", field)
    if field.shape[1] != 1:
        raise ValueError(
            f"field must be a map [B,1,h,w], got {describe(field)}: take sib_ext.functional.magnitude of it"
        )
    check_mask_shape("mask", mask, field)
    field, mask = widen(field), widen(mask)
    mean = field.mean() if mean is None else mean
    relative = field / torch.where(mean > TINY, mean, 1)
    area = mask.sum((1, 2, 3))
    capacity = 0.5 * torch.log1p(relative.square() / kappa)
    return (mask * capacity).sum((1, 2, 3)) / torch.where(area > 0, area, 1)


# Of log_capacity, in nats: what a map has to gain by not being empty, log(1 + I_f / FLOOR), stays finite.
FLOOR = 0.05


def foreground_log_capacity(field: Tensor, mask: Tensor, mean: Tensor | None = None, kappa: float = 1.0) -> Tensor:
    """log(I_f + 0.05), I_f of :func:`foreground_capacity`: [B], at least -3.

    Its mean over the batch is the log of a geometric mean: no sample's information makes up for another's that fades,
    so no map goes empty. The balanced preset's. Arguments as there.
    """
    return torch.log(foreground_capacity(field, mask, mean, kappa) + FLOOR)


BACKGROUND: dict[str, Callable[..., Tensor]] = {
    "variance": background_variance,
    "energy": background_energy,
    "energy_ratio": background_energy_ratio,
    "magnitude_ratio": background_magnitude_ratio,
    "gaussian": background_gaussian,
}
FOREGROUND: dict[str, Callable[..., Tensor]] = {
    "hsic": foreground_hsic,
    "hsic_unbiased": foreground_hsic_unbiased,
    "cka": foreground_cka,
    "gaussian": foreground_gaussian,
    "log_capacity": foreground_log_capacity,
}
OF_GRAMS = ("hsic", "hsic_unbiased", "cka")  #: foregrounds that compare samples
OF_INPUT = (*OF_GRAMS, "gaussian")  #: those that compare the VJP with the input


# ------------------------------------------------------------------------------------------------ fields


def magnitude(vjp: Tensor) -> Tensor:
    """``sum_c |R|`` [B,1,H,W], in float32 or wider: the map that gradient explanations show."""
    return widen(vjp).abs().sum(1, keepdim=True)


def class_activation(features: Tensor, vjp: Tensor) -> Tensor:
    """``sum_k |w_k A_k|`` [B,1,h,w], w_k the mean of R_A,k over h,w: what class-activation maps show of A.

    Grad-CAM (Selvaraju et al. 2017) is relu(sum_k w_k A_k): channels for and against a class cancel there, and a loss
    on it can move that map alone. Of the magnitudes Grad-CAM, Grad-CAM++ and LayerCAM are all made.

    Raises:
        ValueError: not two fields [B,C,h,w] alike.
    """
    if features.shape != vjp.shape or features.dim() != 4:
        raise ValueError(
            f"features and vjp must be alike, [B,C,H,W], got {describe(features)} and {describe(vjp)}: "
            "pass the feature map and the gradient with respect to it"
        )
    return (widen(features) * widen(vjp).mean((2, 3), keepdim=True)).abs().sum(1, keepdim=True)
