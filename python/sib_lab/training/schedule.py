"""The learning rate of every step."""

import math

from .config import STEP_EPOCHS, STEP_FACTOR, TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Of step ``step`` (from 0) of ``steps``.

    ``one-cycle``: linear warm-up, then half a cosine down to 0. ``step``: times 0.1 every 30 epochs. ``constant``.
    """
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        return config.learning_rate * STEP_FACTOR ** (step // steps_per_epoch // STEP_EPOCHS)
    done = (step + 1) / steps
    if done < config.warm_up:
        return config.learning_rate * done / config.warm_up
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - config.warm_up) / (1 - config.warm_up)))
