"""S-IB in a LightningModule. Neither ``lightning`` nor ``pytorch_lightning`` is imported: this serves both."""

from collections.abc import MutableMapping

from ..engines import SIBStep

KEY = "sib_steps"  #: in checkpoints


class SIBModule:
    """Mix-in of a LightningModule, named before it, that has a :class:`sib_ext.SIBStep` as an attribute.

    Checkpoints hold the step's place in its cycle and the layers that it found. When fitting starts the criterion's
    tensors go to the module's device, and the step takes the VJP of the loss that float16's GradScaler has scaled.
    Everything else is as ever: ``training_step`` returns ``self.step(x, y, mask)``.
    """

    def sib_steps(self) -> dict[str, SIBStep]:
        """Its steps, by the names of the attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, SIBStep)}

    def on_fit_start(self) -> None:
        """
        Raises:
            RuntimeError: no attribute is a SIBStep.
        """
        super().on_fit_start()
        steps = self.sib_steps().values()
        if not steps:
            raise RuntimeError(
                f"{type(self).__name__} is a SIBModule without a step: give it one in __init__, "
                "self.step = SIBStep(self.model, SpatialIBLoss())"
            )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        for step in steps:
            step.criterion.to(self.device)
            if scaler is not None:
                step.scaler = scaler

    def on_save_checkpoint(self, checkpoint: MutableMapping) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = {name: step.state_dict() for name, step in self.sib_steps().items()}

    def on_load_checkpoint(self, checkpoint: MutableMapping) -> None:
        super().on_load_checkpoint(checkpoint)
        of_name = checkpoint.get(KEY, {})
        for name, step in self.sib_steps().items():
            if name in of_name:
                step.load_state_dict(of_name[name])
