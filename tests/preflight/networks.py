"""Small networks with one thing in the middle, and how to read what the check says of them."""

import random
import re

import numpy
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

WIDTH = 4


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


class Network(nn.Module):
    """Smooth and healthy but for ``trap``, which maps [B,4,8,8] to the same."""

    def __init__(self, trap):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.SiLU())
        self.trap = trap
        self.last = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.GELU())
        self.head = Head()

    def forward(self, x):
        return self.head(self.last(self.trap(self.stem(x))))


def statuses(report) -> dict[str, str]:
    return {f.module: f.status for f in report.findings}


def blamed(report) -> list[str]:
    return [f.module for f in report.failures if f.module]


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


class Cube(Function):
    """x^3 with a backward that PyTorch can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeDetached(Cube):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * gradient


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.unflatten(2, x.shape[2:])


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(x.flatten(2).mT)[0].mT.unflatten(2, x.shape[2:])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, inner=None):
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class PythonDropout(nn.Module):
    def forward(self, x):
        return x * (2 if random.random() < 0.5 else 1) * numpy.random.rand()
