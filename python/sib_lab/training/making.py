"""What a training is made of, from its options: the network, the loss and the optimiser."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataSets
from ..data.base import check_classes
from ..data.checks import images_of_classes
from ..networks.build import build_network
from ..networks.feature_maps import cam_layer
from ..networks.heads import restrict_head, rows_of, start_at
from .batches import mean_object_area
from .config import TrainConfig
from .losses import LOCALISATIONS, TrainingLoss, make_criterion
from .runs import TrainingError

NEED_MASKS = ("rrr", *LOCALISATIONS)  #: methods that do nothing without an annotation


def check_data(config: TrainConfig, data: DataSets) -> None:
    """Whether the data is what the options need.

    Raises:
        DataError: a class without a training image.
        TrainingError: no mask for a method that needs one, or fewer images than a step takes.
    """
    labels = data.train.labels.nonzero()[:, 1] if data.multilabel else data.train.labels
    check_classes(data.classes, labels, data.name)
    if data.multilabel and config.epochs == 0:
        raise TrainingError(
            f"A network is measured as it is on images of one label, and those of {data.name} have several: train it."
        )
    if config.method in NEED_MASKS and not data.train.annotated.any():
        raise TrainingError(f"The method {config.method} needs masks, but no training image of {data.name} has one.")
    if config.epochs and len(data.train) < config.images_per_step:
        batches = f"batches of {config.batch_size}" if config.accumulate == 1 else f"steps of {config.images_per_step}"
        raise TrainingError(
            f"There are {len(data.train)} training images in {data.name}, too few for {batches}: take a smaller batch "
            "size."
        )


def make_network(config: TrainConfig, data: DataSets) -> nn.Module:
    """The network with its initial weights, on the CPU, which follow from the seed alone; of several labels with a bias
    that guesses each as often as it is in the training images.

    Raises:
        NetworkError: what is wrong with its name, size or weights.
        TrainingError: class weights of other classes.
    """
    torch.manual_seed(config.seed)
    weights = Path(config.weights) if config.weights else None
    if config.epochs == 0:
        return _as_it_is(config, data, weights)
    network = build_network(config.network, len(data.classes), data.size, weights, config.mean, config.std)
    if data.multilabel:
        start_at(network, log_odds(data.train.labels, class_weights(config, data)))
    return network


def log_odds(labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Of each label [K], at which the binary cross-entropy of a guess is lowest; one image more has it and one has not,
    so that it is finite.

    Args:
        labels: [N,K], 0 where it is absent.
        pos_weight: [K], of the cross-entropy.
    """
    count = (labels != 0).double().sum(0)
    odds = (count + 1) / (len(labels) - count + 1)
    return (odds if pos_weight is None else odds * pos_weight.double().clamp_min(1e-6)).log()


def _as_it_is(config: TrainConfig, data: DataSets, weights: Path) -> nn.Module:
    """The network of a file of weights, asked for the data's classes alone.

    Raises:
        NetworkError: weights of other classes.
    """
    network: Any = build_network(config.network, None, data.size, weights, config.mean, config.std)
    rows, note = rows_of(data.classes, data.wordnet_ids, network.class_count, weights)
    network.weights_note = f"{network.weights_note} {note}".strip()
    return restrict_head(network, rows)


def make_loss(config: TrainConfig, data: DataSets, network: nn.Module) -> TrainingLoss:
    """The loss with all that it has to know of data and network.

    Raises:
        TrainingError: an option that the loss does not have, or weights of other classes.
        NetworkError: no feature map for a loss that looks at one.
    """
    options, layer, area = config.loss_options, None, None
    if config.method in LOCALISATIONS and options.get("attribution", "gradcam") == "gradcam":
        layer = None if "layer" in options else cam_layer(network)
    if config.method == "centre-mask" and "centre_area" not in options:
        area = mean_object_area(data.train)
    try:
        return make_criterion(config, layer, area, class_weights(config, data), data.multilabel)
    except ValueError as error:
        raise TrainingError(f"The loss cannot be made: {error}.") from error


def class_weights(config: TrainConfig, data: DataSets) -> Tensor | None:
    """Of the cross-entropy, [K] float32. ``"balanced"``: N / (K N_k), of N training images N_k in class k; of several
    labels N / N_k - 1, the positives' weight at which they count as much as the rest.

    Raises:
        TrainingError: not one for every class.
    """
    if config.class_weights is None:
        return None
    classes = len(data.classes)
    if config.class_weights == "balanced":
        counts = torch.tensor(images_of_classes(data.train.labels, classes), dtype=torch.float64)
        if data.multilabel:
            return (len(data.train) / counts - 1).float()
        return len(data.train) / (classes * counts).float()
    if len(config.class_weights) != classes:
        raise TrainingError(
            f"class_weights must have one number for each of the {classes} classes, got {len(config.class_weights)}."
        )
    return torch.tensor(config.class_weights)


def make_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW on all parameters that are trained."""
    return torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
