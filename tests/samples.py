"""The one factory of test inputs: correctness, gradient and opcheck tests all take theirs from here."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sib_ext.reference import MOMENTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What sib_ext.density_mask takes beside R; a sample names only what it changes. Small images need a small window.
DEFAULTS = {"window": 3, "temperature": 0.1, "slope": 10.0, "eps": 1e-8, "padding": "zeros", "area": 0.2}


# Of SpatialIBLoss: no draws, so that a loss can be compared with itself, every term, and a mask made of R.
FIXED = {
    "seed": "target_logit",
    "mask_source": "vjp",
    "background": "energy_ratio",
    "input_background": 1.0,
    "foreground": "cka",
    "input_foreground": 0.1,
    "feature_foreground": 0.0,
    "padding": "zeros",
}


class Fields(NamedTuple):
    vjp: Tensor
    x: Tensor
    mask: Tensor

    def requiring_grad(self, *names: str) -> "Fields":
        """Leaves that share nothing with self; those named (all, if none is) require grad."""
        wanted = names or self._fields
        return Fields(
            *(t.detach().clone().requires_grad_(n in wanted) for n, t in zip(self._fields, self, strict=True))
        )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "every second column":
        wide = values.new_full((*values.shape[:3], 2 * values.shape[3]), float("nan"))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    return values.contiguous()


LAYOUTS = ("contiguous", "channels_last", "every second column", "transposed")


@dataclass(frozen=True)
class Sample:
    name: str
    shape: tuple[int, int, int, int]
    changes: dict = field(default_factory=dict)
    layout: str = "contiguous"

    @property
    def options(self) -> dict:
        return {**DEFAULTS, **self.changes}

    @property
    def positional_options(self) -> tuple:
        """In the order of the ops' schema."""
        return tuple(self.options.values())

    def fields(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Fields:
        """R and x like a VJP and an image, M in (0, 1): the same values for every dtype, up to its rounding."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        batch, _, height, width = self.shape
        vjp = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 0.5
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        mask = torch.rand((batch, 1, height, width), generator=generator, dtype=torch.float64)
        return Fields(*(laid_out(t.to(device, dtype), self.layout) for t in (vjp, x, mask)))

    def cotangent_of_mask(self, dtype: torch.dtype = torch.float64) -> Tensor:
        batch, _, height, width = self.shape
        return torch.randn((batch, 1, height, width), generator=torch.Generator().manual_seed(7), dtype=dtype)

    def cotangents_of_statistics(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.shape[0]
        generator = torch.Generator().manual_seed(8)
        shapes = ((batch, len(MOMENTS)), (batch, batch), (batch, batch))
        return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


PLAIN = Sample("plain", (2, 3, 6, 7))
CHANNELS_LAST = Sample("channels last", (2, 3, 5, 6), layout="channels_last")
WIDE = Sample("temperature so wide that every pixel counts", (2, 3, 9, 11), {"temperature": 5.0})
EMPTY = Sample("empty batch", (0, 3, 5, 5))
BORDER_EXCLUDED = Sample("border excluded", (2, 3, 6, 5), {"padding": "exclude", "window": 5})
OTHER_CONSTANTS = Sample("other constants", (3, 2, 6, 6), {"slope": 3.0, "eps": 1e-3, "area": 0.45})

SAMPLES = (
    PLAIN,
    CHANNELS_LAST,
    WIDE,
    EMPTY,
    BORDER_EXCLUDED,
    OTHER_CONSTANTS,
    Sample("one sample", (1, 3, 5, 5)),
    Sample("one channel", (2, 1, 5, 6)),
    Sample("four channels", (3, 4, 4, 5), {"window": 1}),
    Sample("narrow temperature", (2, 3, 5, 7), {"temperature": 1e-3}),
    Sample("temperature of a few positions", (2, 2, 8, 9), {"temperature": 0.4}),
    Sample("window larger than the image", (2, 3, 4, 5), {"window": 7}),
    Sample("window larger than the image, border excluded", (2, 3, 4, 6), {"window": 9, "padding": "exclude"}),
    Sample("window that covers the whole image from every pixel", (2, 1, 3, 4), {"window": 31}),
    # 0.05 (n - 1) = 4.5: the edge of the support falls on a position, and rounding decides which side it is on.
    Sample("quantiles halfway between two positions", (2, 2, 7, 13)),
    Sample("one row", (2, 2, 1, 7)),
    Sample("every second column", (2, 3, 5, 6), layout="every second column"),
    Sample("transposed", (2, 3, 5, 6), layout="transposed"),
)
# One of each kind for checks that take seconds.
FEW_SAMPLES = (PLAIN, CHANNELS_LAST, WIDE, EMPTY, BORDER_EXCLUDED)
OPCHECK_SAMPLES = (PLAIN, CHANNELS_LAST, EMPTY)
# Up to so many elements gradcheck compares whole Jacobians; beyond, random projections of them (seconds each else).
FULL_JACOBIAN = 30
# Large enough for several threads and for the statistics of rounding errors.
LARGE = Sample("large", (4, 3, 40, 37), {"window": 5})


class TinyNetwork(nn.Module):
    """Smooth activations, so that finite differences apply; no bias before a normalisation, where it has no effect."""

    def __init__(self, norm: str = "batch", activation: type[nn.Module] = nn.GELU, classes: int = 3, channels: int = 3):
        super().__init__()
        width = 4
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width),
            activation(),
            nn.Conv2d(width, width, 3, padding=1),
            activation(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Problem(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def logits(self) -> Tensor:
        return self.model(self.x)


def tiny_problem(
    batch: int = 5, dtype: torch.dtype = torch.float64, size: int = 9, seed: int = 0, **network
) -> Problem:
    """A small network in train mode, images that require grad and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyNetwork(**network).to(dtype)
        x = torch.randn(batch, 3, size, size + 2, dtype=torch.float64).to(dtype).requires_grad_()
        y = torch.randint(0, 3, (batch,))
    return Problem(model, x, y)
