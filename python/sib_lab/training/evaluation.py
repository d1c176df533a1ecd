"""How well a network classifies a split."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.base import ItemDataset
from ..data.labelled import ABSENT
from ..explaining.measures import average_precision
from .batches import all_batches
from .losses import Forward

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def evaluate(network: nn.Module, split: ItemDataset, fabric: "Fabric", workers: int = 0) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on a split, in eval mode, over all processes; of several labels an image mean
    average precision over the classes and binary cross-entropy.

    Args:
        network: without the wrapper of distributed training, as processes may have different numbers of batches.
    """
    network.eval()
    model = Forward(network, fabric.autocast)
    several = split.labels.dim() == 2
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    found = [torch.empty(0, split.labels.shape[-1], device=fabric.device)]  # a process may have no image
    with torch.no_grad():
        for item in all_batches(split, workers, fabric.global_rank, fabric.world_size):
            x, y = fabric.to_device((item.image, item.label))
            logits = model(x)
            if several:
                found.append(logits)
            else:
                loss = F.cross_entropy(logits, y, reduction="sum")
                sums += torch.stack([(logits.argmax(1) == y).sum(), loss, torch.ones_like(y).sum()]).double()
    if several:
        labels = split.labels[fabric.global_rank :: fabric.world_size]
        return _of_labels(torch.cat(found), fabric.to_device(labels), fabric.world_size)
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums, reduce_op="sum")
    right, loss, count = sums.tolist()
    return right / count, loss / count


def _of_labels(logits: Tensor, labels: Tensor, world: int) -> tuple[float, float]:
    """Of the images of all processes."""
    if world > 1:
        from torchmetrics.utilities.distributed import gather_all_tensors  # of different lengths

        logits, labels = (torch.cat(gather_all_tensors(values)) for values in (logits, labels))
    there = (labels != ABSENT).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, there).item()
    return average_precision(logits, labels).nanmean().item(), loss
