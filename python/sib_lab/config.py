"""The options of the demo; light to import."""

from dataclasses import dataclass

CHECKPOINT = "checkpoint.pt"  #: its name in the run folder


@dataclass(frozen=True)
class Config:
    """Everything that decides the demo's numbers."""

    seed: int = 0  #: of data, initial weights and the order of batches
    epochs: int = 14  #: of each of the two trainings
    preset: str = "balanced"  #: of sib_ext.SpatialIBLoss
    mask: str = "given"  #: S-IB foreground: "given" = the exact strokes, "density" = made from the VJP
    batch_size: int = 32
    learning_rate: float = 4e-3  #: the highest; it warms up linearly and falls as a cosine
    weight_decay: float = 1e-4
    train_digits: int = 1200
    validation_digits: int = 197
    test_digits: int = 400
    copies: int = 4  #: composites per training digit
    threads: int = 2  #: of PyTorch; another number sums in another order and moves the last decimals
