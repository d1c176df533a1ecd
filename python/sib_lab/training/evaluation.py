"""How well a network classifies a split."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .batches import all_batches
from .losses import Forward

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def evaluate(network: nn.Module, split: Dataset, fabric: "Fabric", workers: int = 0) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on a split, in eval mode, over all processes.

    Args:
        network: without the wrapper of distributed training, as processes may have different numbers of batches.
    """
    network.eval()
    model = Forward(network, fabric.autocast)
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    with torch.no_grad():
        for item in all_batches(split, workers, fabric.global_rank, fabric.world_size):
            x, y = fabric.to_device((item.image, item.label))
            logits = model(x)
            loss = F.cross_entropy(logits, y, reduction="sum")
            sums += torch.stack([(logits.argmax(1) == y).sum(), loss, torch.ones_like(y).sum()]).double()
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums, reduce_op="sum")
    right, loss, count = sums.tolist()
    return right / count, loss / count
