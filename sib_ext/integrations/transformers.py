"""S-IB in the Trainer of ``transformers``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..engines import SIBStep
from ..loss import SpatialIBLoss
from ..outputs import logits_of

ANNOTATION = ("mask", "annotated")  #: what a batch may hold beside images and labels


class SIBTrainerMixin:
    """``class SIBTrainer(SIBTrainerMixin, Trainer): pass``: trains an image classifier with S-IB.

    A batch holds the images under the model's ``main_input_name``, ``labels``, and if there are any ``mask`` and
    ``annotated``, as :meth:`sib_ext.SpatialIBLoss.terms` takes them; the collator makes the batch. Evaluation is by the
    criterion's cross-entropy. Accumulated batches count alike, and each has its own statistics and one place in the
    cycle of ``every``. Checkpoints hold that place, and a resumed training goes on there.

    Args:
        criterion: the loss. Its ``process_group="world"`` joins the batches of all processes.
        step_options: arguments of :class:`sib_ext.SIBStep`, such as ``{"layers": ["resnet.encoder"], "every": 1}``.
        args, options: of the Trainer.

    Raises:
        ValueError: a criterion of another type, or another loss beside it.
    """

    loss_is_scaled_for_ga = False  # the loss is the mean of one batch: the Trainer divides it by their number

    def __init__(self, *args, criterion: SpatialIBLoss, step_options: Mapping[str, Any] | None = None, **options):
        if not isinstance(criterion, SpatialIBLoss):
            raise ValueError(f"criterion must be a sib_ext.SpatialIBLoss, got {type(criterion).__name__}")
        super().__init__(*args, **options)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func would be left out: give the criterion base=, a loss of your own")
        if self.label_smoother is not None:
            raise ValueError("label_smoothing_factor would be left out: give the criterion label_smoothing=")
        if self.args.n_gpu > 1:
            raise ValueError(
                "one process has several GPUs here (DataParallel), whose batches S-IB cannot join: start one process "
                "a GPU, torchrun --nproc-per-node N script.py"
            )
        self.model_accepts_loss_kwargs = False  # of versions that ask this and not the above
        self.criterion, self.step_options = criterion, dict(step_options or {})
        self.add_callback(SIBState())

    def compute_loss(
        self, model: torch.nn.Module, inputs: Mapping, return_outputs: bool = False, num_items_in_batch=None
    ) -> Tensor | tuple[Tensor, object]:
        """
        Raises:
            ValueError: a batch without labels, or with inputs that a step would leave out.
        """
        images = self.accelerator.unwrap_model(model).main_input_name
        if unknown := sorted(set(inputs) - {images, "labels", *ANNOTATION}):
            raise ValueError(
                f"a batch may hold {images}, labels, mask and annotated, got {', '.join(unknown)}, too: the step gives "
                "the model its images alone"
            )
        for name in (images, "labels"):
            if inputs.get(name) is None:
                raise ValueError(f"a batch must hold {name}, got {', '.join(inputs)}")
        x, target = inputs[images], inputs["labels"]
        self.criterion.to(x.device)
        if torch.is_grad_enabled() and not return_outputs:
            return self._step_of(model)(x, target, *(inputs.get(name) for name in ANNOTATION))
        outputs = model(x)
        loss = self.criterion.cross_entropy(logits_of(outputs, self.step_options.get("output")), target)
        return (loss, outputs) if return_outputs else loss

    @property
    def sib_step(self) -> SIBStep | None:
        """The step of the training; None before its first batch."""
        return self._kept.step

    def _step_of(self, model: torch.nn.Module) -> SIBStep:
        if self._kept.step is None or self._kept.step.model is not model:
            scaler = self.accelerator.scaler
            self._kept.begin(SIBStep(model, self.criterion, **{"scaler": scaler, **self.step_options}))
        return self._kept.step

    @property
    def _kept(self) -> "SIBState":
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, SIBState))

    def prediction_step(self, model: torch.nn.Module, inputs: Mapping, *args, **options):
        """Without labels there is no loss, and the model gets no annotation."""
        if inputs.get("labels") is None:
            inputs = {name: value for name, value in inputs.items() if name not in ANNOTATION}
        return super().prediction_step(model, inputs, *args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that the Trainer must not remove."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ANNOTATION if name not in self._signature_columns]


class SIBState(TrainerCallback, ExportableState):
    """Keeps the step of a training, and brings its state into checkpoints (``trainer_state.json``) and back."""

    def __init__(self):
        self.step: SIBStep | None = None
        self.saved: dict | None = None

    def begin(self, step: SIBStep) -> None:
        self.step = step
        if self.saved:
            step.load_state_dict(self.saved)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.step, self.saved = None, stored.get("attributes", {}).get("saved")

    def state(self) -> dict:
        return {"args": {}, "attributes": {"saved": self.saved if self.step is None else self.step.state_dict()}}
