"""Everything of a training is built and tried before its first step, so that nothing stops it hours later."""

import warnings
from contextlib import nullcontext

import torch
from torch import nn

from ..data import DataSets, stack
from ..networks.errors import NetworkError, first_line
from .config import TrainConfig
from .logs import check_wandb
from .losses import Forward, SpatialIB, TrainingLoss
from .making import check_data, make_loss, make_network, make_optimizer
from .processes import devices_here
from .runs import TrainingError

TRIED = 4  #: images at most: as many as the most demanding statistic of a batch needs


def check(config: TrainConfig, data: DataSets) -> None:
    """Builds network, loss and optimiser on the CPU and tries one forward and backward pass of a few images.

    No generator is moved, and nothing is kept.

    Raises:
        TrainingError, NetworkError, DataError: one sentence: what stops this training.
    """
    devices_here(config)
    check_data(config, data)
    if config.wandb is not None:
        check_wandb()
    with torch.random.fork_rng(devices=[]):
        network = make_network(config, data)
        if config.epochs == 0:
            return
        criterion = make_loss(config, data, network)
        make_optimizer(config, network)
        _try(config, data, network, criterion)


def _try(config: TrainConfig, data: DataSets, network: nn.Module, criterion: TrainingLoss) -> None:
    given = config.images_per_step if criterion.takes_whole_steps else config.batch_size
    annotated_first = torch.argsort(~data.train.annotated, stable=True)
    item = stack(data.train, annotated_first[: min(TRIED, given // config.devices)])
    masks = (item.mask, item.annotated) if item.annotated.any() else (None, None)
    model = Forward(network.train(), nullcontext)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training itself will give them
            criterion(model, item.image, item.label, *masks)["loss"].backward()
    except ValueError as error:
        raise TrainingError(f"The loss cannot be made: {first_line(error)}.") from error
    except Exception as error:  # whatever a network or an operation in it raises
        raise TrainingError(
            f"The network {config.network} cannot be trained with the method {config.method}: {first_line(error)}."
        ) from error
    if isinstance(criterion, SpatialIB) and criterion.lacks_feature_map:
        raise NetworkError(
            f"The network {config.network} has no feature map for the terms of {config.method}: name a layer with "
            "--loss-option layers=NAME, or leave them out with --loss-option feature_background=0 --loss-option "
            "feature_foreground=0."
        )
