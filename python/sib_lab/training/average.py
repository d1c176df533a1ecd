"""The exponential moving average of a network's weights."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(network: nn.Module, decay: float) -> AveragedModel:
    """e_1 = w_1, e_t = decay e_(t-1) + (1 - decay) w_t of the weights w_t after step t, and of buffers alike
    (BatchNorm's statistics)."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
