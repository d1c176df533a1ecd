"""Small networks for steps: layers of every kind, and the situations of other people's models."""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

IMAGES, CLASSES, SIDE = 6, 5, 12


class Network(nn.Module):
    """BatchNorm and GroupNorm, dropout if wanted, a feature map by name."""

    def __init__(self, activation=nn.SiLU, dropout: float = 0.0, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), activation())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.GroupNorm(2, 8), activation())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.dropout(self.body(self.stem(x)).mean((2, 3))))


def per_sample(channels):
    return nn.GroupNorm(2, channels)


class Tokens(nn.Module):
    """A tiny vision transformer with a class token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.blocks = nn.Sequential(layer, copy.deepcopy(layer))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)))
        return self.head(tokens[:, 0])


class Wrapped(nn.Module):
    """A network with something done to its input, features or logits."""

    def __init__(self, before=lambda x: x, middle=lambda h: h, after=lambda z: z, **options):
        super().__init__()
        self.net = Network(**options)
        self.before, self.middle, self.after = before, middle, after

    def forward(self, x):
        h = self.middle(self.net.body(self.net.stem(self.before(x))))
        return self.after(self.net.head(self.net.dropout(h.mean((2, 3)))))


class Swish(torch.autograd.Function):
    """Correct, and twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


def hooked(h):
    """A tensor hook, as clipping inside a network has it."""
    h.register_hook(lambda g: 0.5 * g)
    return h


class Checkpointed(nn.Sequential):
    def forward(self, h):
        return checkpoint(super().forward, h, use_reentrant=False)


class CheckpointedNetwork(Network):
    """Both blocks, and for the one a checkpoint within a checkpoint."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.stem = Checkpointed(Checkpointed(*self.stem[:2]), self.stem[2])
        self.body = Checkpointed(*self.body, self.dropout)


class CheckpointedTokens(Tokens):
    def __init__(self):
        super().__init__()
        self.blocks = Checkpointed(*self.blocks)


class RandomDepth(nn.Module):
    """Blocks left out by chance, drawn with Python's or numpy's generator."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU())
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h) if self.draw() < 0.5 else h
        return self.head(nn.functional.silu(h).mean((2, 3)))


def by_random() -> float:
    return random.random()


def by_numpy() -> float:
    return numpy.random.rand()


def normalised(wrap) -> nn.Module:
    """With spectral or weight normalisation of every layer with weights."""
    model = Network(norm=per_sample)
    for parent in (model.stem, model.body, model):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, wrap(child))
    return model


class Recurrent(nn.Module):
    """Rows of features, read one after the other."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.Tanh())
        self.rows = nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(self.rows(self.stem(x).mean(3).mT)[0][:, -1])


class Tied(nn.Module):
    """One convolution used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.again, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, CLASSES)
        self.again.weight = self.twice.weight

    def forward(self, x):
        h = self.twice(nn.functional.silu(self.stem(x)))
        return self.head(self.again(nn.functional.silu(self.twice(h))).mean((2, 3)))


class TwoNames(Network):
    """As wrappers have it that keep what they wrap under two names."""

    def __init__(self):
        super().__init__()
        self.original, self.wrapped = self.stem, self.stem


def by_keywords(h):
    """A functional convolution with names for its arguments."""
    return h + nn.functional.conv2d(
        input=h, weight=torch.ones(8, 1, 1, 1, dtype=h.dtype), stride=numpy.int64(1), groups=8
    )


def vmapped(h):
    return torch.func.vmap(lambda image: nn.functional.conv2d(image, torch.ones(8, 1, 1, 1, dtype=h.dtype), groups=8))(
        h
    )


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


def as_dataclass(z):
    return Output(z, z.square())


def as_mapping(z):
    return {"hidden": z.square(), "logits": z}


def as_tuple(z):
    return z, z.square()


def subtract_in_place(x):
    return x.sub_(0.5)


def with_frozen_stem() -> nn.Module:
    model = Network()
    model.stem.requires_grad_(False).eval()
    return model


def with_unused() -> nn.Module:
    model = Network()
    model.unused = nn.Linear(2, 2)
    return model


def normalised_by_a_computed_weight() -> nn.Module:
    """Weights that come from x, so that its derivative goes through them, too."""

    class Dynamic(Network):
        def forward(self, x):
            h = self.stem(x)
            weight = self.body[0].weight * (1 + 0.1 * x.mean())
            h = nn.functional.conv2d(h, weight, self.body[0].bias, 2, 1)
            return self.head(self.body[1:](h).mean((2, 3)))

    return Dynamic()


#: Every situation that must be trained right by whatever engine takes it.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": functools.partial(Network, nn.ReLU),
    "GroupNorm": functools.partial(Network, norm=per_sample),
    "dropout": functools.partial(Network, dropout=0.4),
    "transformer": Tokens,
    "custom Function": functools.partial(Wrapped, middle=Swish.apply),
    "tensor hook": functools.partial(Wrapped, middle=hooked),
    "checkpoints": CheckpointedNetwork,
    "checkpointed transformer": CheckpointedTokens,
    "depth by random": functools.partial(RandomDepth, by_random),
    "depth by numpy": functools.partial(RandomDepth, by_numpy),
    "spectral norm": functools.partial(normalised, parametrizations.spectral_norm),
    "spectral norm by a hook": functools.partial(normalised, torch.nn.utils.spectral_norm),
    "weight norm": functools.partial(normalised, parametrizations.weight_norm),
    "recurrent": Recurrent,
    "tied weights": Tied,
    "frozen stem": with_frozen_stem,
    "unused layer": with_unused,
    "computed weights": normalised_by_a_computed_weight,
    "a module under two names": TwoNames,
    "arguments by keyword": functools.partial(Wrapped, middle=by_keywords),
    "torch.func inside": functools.partial(Wrapped, middle=vmapped),
    "input changed in place": functools.partial(Wrapped, before=subtract_in_place),
    "dataclass": functools.partial(Wrapped, after=as_dataclass),
    "mapping": functools.partial(Wrapped, after=as_mapping),
    "tuple": functools.partial(Wrapped, after=as_tuple),
}
