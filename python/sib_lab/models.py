"""The demo's network."""

import torch
from torch import nn

#: Name of the module whose output Grad-CAM looks at: the last block with a feature map (10 x 10 for 40 px images).
GRAD_CAM_LAYER = "block4"


def block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; ``stride`` divides the resolution."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class SmallCNN(nn.Module):
    """Four BatchNorm blocks, global max pooling and a linear layer; images [B,3,H,W] -> logits [B,classes]."""

    def __init__(self, classes: int = 10, widths: tuple[int, int, int, int] = (24, 48, 64, 96)):
        super().__init__()
        self.block1 = block(3, widths[0], kernel=6, stride=2)
        self.block2 = block(widths[0], widths[1])
        self.pool = nn.AvgPool2d(2)
        self.block3 = block(widths[1], widths[2])
        self.block4 = block(widths[2], widths[3])
        self.head = nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.block4(self.block3(self.pool(self.block2(self.block1(x)))))
        return self.head(features.amax((2, 3)))
