"""What the tests of this folder share: sixteen images, a loss that draws nothing, and the loop that all must equal."""

import torch
from torch import Tensor, nn

from sib_ext import SIBStep, SpatialIBLoss

CLASSES, EVERY = 3, 3


def criterion(**options) -> SpatialIBLoss:
    """The balanced preset without draws, so that two loops can be compared."""
    return SpatialIBLoss(**{"seed": "target_logit", **options})


def images(count: int = 16) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x [3,32,32], label, mask [1,32,32])"""
    random = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 10:24] = 1
    return [(torch.randn(3, 32, 32, generator=random), torch.tensor(i % CLASSES), mask) for i in range(count)]


class Net(nn.Module):
    """Two convolutions with GroupNorm, whose result does not depend on who else is in the batch."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def plain(
    model: nn.Module, batch: int = 4, accumulate: int = 1, epochs: int = 2, bfloat16: bool = False
) -> list[Tensor]:
    """The parameters after a loop of plain PyTorch over ``images()`` in their order, by SGD with momentum."""
    step = SIBStep(model, criterion(), every=EVERY, jitter=0)
    optimizer = sgd(model)
    batches = torch.utils.data.DataLoader(images(), batch)
    for _ in range(epochs):
        for number, (x, y, mask) in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = step(x, y, mask)
            (loss / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return list(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def assert_alike(found, expected, rtol: float = 1e-5) -> None:
    """Parameters, up to rounding of each and of the largest of all (some have no gradient but rounding)."""
    found, expected = ([p.detach().cpu() for p in parameters] for parameters in (found, expected))
    largest = max(p.abs().max().item() for p in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * largest)
