"""The small networks of the demo and of the evidence."""

from torch import Tensor, nn


def block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; ``stride`` divides the resolution."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Four BatchNorm blocks, global pooling and a linear layer; images [B,3,H,W] -> logits [B,classes].

    ``pooling``: ``"max"`` (what stands anywhere decides), or ``"mean"`` as ResNets have it (every place has its part).
    """

    def __init__(self, classes: int = 10, widths: tuple[int, int, int, int] = (24, 48, 64, 96), pooling: str = "max"):
        super().__init__()
        self.pooling = pooling
        self.block1 = block(3, widths[0], kernel=6, stride=2)
        self.block2 = block(widths[0], widths[1])
        self.pool = nn.AvgPool2d(2)
        self.block3 = block(widths[1], widths[2])
        self.block4 = block(widths[2], widths[3])
        self.head = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block4(self.block3(self.pool(self.block2(self.block1(x)))))
        return self.head(features.amax((2, 3)) if self.pooling == "max" else features.mean((2, 3)))


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al. 2016); ``stride`` divides the resolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.first = block(channels_in, channels_out, stride=stride)
        self.second = nn.Sequential(
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.shortcut = nn.Sequential()
        if channels_in != channels_out or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A narrow residual network of output stride 8 whose last positions each see the whole of a 64 px image.

    Images [B,3,H,W] -> logits [B,classes].
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = block(3, 16, stride=2)
        plan = [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1), (48, 64, 1), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Residual(*of_block) for of_block in plan))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
