"""What is compared."""

from dataclasses import dataclass, replace

from ..training.config import TrainConfig

OF_MASKS = ("epg", "pointing_game", "iou", "ehr")  #: measures that need to know the object
OF_NETWORK = ("deletion", "insertion")  #: measures that ask the network: STEPS forward passes an image


AS_IT_IS = "as-is"  #: in the place of a training method: the network is measured as its weights are


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Raises:
        ValueError: nothing to compare, something twice, or an unknown measure.
    """

    configs: dict[str, TrainConfig]  #: training method -> its options; the seed is replaced
    seeds: tuple[int, ...]
    measures: tuple[str, ...] = OF_MASKS
    images: int = 500  #: of the first test set, that are explained and measured
    layer: str | None = None  #: that class-activation maps look at; None: found
    best: bool = True  #: measure the weights that were best on the first validation split; False: the last

    def __post_init__(self):
        if not self.configs or not self.seeds:
            raise ValueError("there is nothing to compare: give at least one method and one seed")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        unknown = set(self.measures) - set(OF_MASKS + OF_NETWORK)
        if unknown or not self.measures:
            raise ValueError(
                f"measures must be some of {', '.join(OF_MASKS + OF_NETWORK)}, "
                f"got {', '.join(sorted(unknown)) or 'none'}"
            )

    @classmethod
    def as_it_is(cls, config: TrainConfig, *arguments, **options) -> "Plan":
        """One network that is not trained at all."""
        return cls({AS_IT_IS: replace(config, method="ce", epochs=0)}, (config.seed,), *arguments, **options)

    def config(self, method: str, seed: int) -> TrainConfig:
        """The options of one run."""
        return replace(self.configs[method], seed=seed)

    def is_matched(self, method: str) -> bool:
        """Whether a method is a penalty that follows the VJP variance of S-IB's run of the same seed."""
        return method == "gradient-penalty" and "sib" in self.configs and self.configs[method].strength is None

    @property
    def order(self) -> list[str]:
        """The methods in the order of training: those that another one is matched to come first."""
        return sorted(self.configs, key=lambda method: method == "gradient-penalty")
