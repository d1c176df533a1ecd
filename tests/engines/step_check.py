"""One check for every model and every option of a step, as scikit-learn has one for every estimator.

The truth is float64 double backward through elementary operations: PyTorch's own layers, autograd, and the reference
formulas of the loss; no engine, no fused layer, no kernel. And a step must be a good guest: what it leaves behind
(buffers, hooks, random numbers, gradients of None) is what one plain step leaves.
"""

import copy
import pickle
import random
import threading
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sib_ext import SIBStep, SpatialIBLoss
from sib_ext.layers import captured, class_activation_of
from sib_ext.outputs import logits_of

EXACT = {torch.float64: 1e-9, torch.float32: 2e-3}


def fixed(preset: str = "balanced", **options) -> SpatialIBLoss:
    """A loss without chance in its seed or its masks, which would draw other numbers in another precision."""
    terms = {"input_background": 5.0, "foreground": "cka", "input_foreground": 0.1, "feature_foreground": 0.0}
    return SpatialIBLoss(preset, **{"seed": "target_logit"} | terms | options)


def of_features(**options) -> SpatialIBLoss:
    """Both halves at feature maps, none at the input."""
    at_features = {"feature_background": 5.0, "feature_foreground": 1.0}
    return fixed(**{"input_background": 0.0, "input_foreground": 0.0} | at_features | options)


def seed(number: int = 3) -> None:
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def noise() -> tuple:
    name, keys, *rest = numpy.random.get_state()
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return torch.get_rng_state().tolist(), cuda, random.getstate(), (name, keys.tolist(), *rest)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-12))


def elementary(model: nn.Module, criterion, layers, output, x, y, mask, size: int, every: int) -> tuple[Tensor, Tensor]:
    """Loss and gradients by the definition; a batch in parts of ``size``, as BatchNorm sees them."""
    criterion = copy.deepcopy(criterion)
    criterion.impl = "reference"
    look = criterion.look(y, x)
    parts = [part.clone().requires_grad_() for part in x.split(size)]
    logits, features = [], {name: [] for name in layers}
    with sdpa_kernel(SDPBackend.MATH):
        for part in parts:
            with captured(model, layers) as found:
                logits.append(logits_of(model(part.clone()), output))
            for name in layers:
                features[name].append(found[name])
        labels = look.target.split(size)
        s = sum(_seeded(z, t, criterion) for z, t in zip(logits, labels, strict=True))
        inputs = [*parts, *(f for name in layers for f in features[name])]
        vjps = torch.autograd.grad(s, inputs, create_graph=True)
        R, rest = torch.cat(vjps[: len(parts)]), list(vjps[len(parts) :])
        fields = {}
        for i, name in enumerate(layers):
            of_layer = torch.cat(rest[i * len(parts) : (i + 1) * len(parts)])
            fields[name] = class_activation_of(name, torch.cat(features[name]), of_layer, x.shape[2:])
        joined = criterion.joined(x)
        R = R if criterion.has_input_terms else None
        terms = criterion.information(R, x, _mask_of(mask, look), None, look, joined, fields)
        loss = _classified(criterion, torch.cat(logits), y)
        labels = y.shape[1] if criterion.task == "multilabel" else 1  # an image's, one of which the terms look at
        if terms.input is not None:
            loss = loss + every * terms.input / labels
        if terms.features is not None:
            loss = loss + terms.features / labels
        loss.backward()
    return loss.detach(), flat(model)


def _seeded(logits: Tensor, target: Tensor, criterion) -> Tensor:
    if criterion.task == "multilabel":
        return (logits * target).sum()
    assert criterion.seed == "target_logit"
    return logits.gather(1, target[:, None]).sum()


def _classified(criterion, logits: Tensor, y: Tensor) -> Tensor:
    if criterion.task != "multilabel":
        return F.cross_entropy(logits, y)
    return -torch.where(y > 0.5, F.logsigmoid(logits), F.logsigmoid(-logits)).mean()


def _mask_of(mask: Tensor, look) -> Tensor:
    """Of masks [B,K,H,W], sample by sample, what is looked at."""
    if mask.shape[1] == 1:
        return mask
    rows = []
    for of_classes, label, present, of_all in zip(mask, look.label, look.present, look.of_all, strict=True):
        together = [of_classes[k] for k in range(len(of_classes)) if present[k]] or [torch.zeros_like(of_classes[0])]
        rows.append(torch.stack(together).amax(0) if of_all else of_classes[label])
    return torch.stack(rows)[:, None]


class Hooks:
    """Counts what a step fires: hooks of modules in the forward pass, hooks of parameters in the backward pass."""

    def __init__(self, model: nn.Module):
        self.forwards, self.backwards = dict.fromkeys(dict(model.named_modules()), 0), {}
        self.handles = [m.register_forward_hook(self._forward(n)) for n, m in model.named_modules()]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.handles.append(parameter.register_hook(self._backward(name)))
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._backward(name + " (post)")))

    def _forward(self, name: str) -> Callable:
        def count(*_):
            self.forwards[name] += 1

        return count

    def _backward(self, name: str) -> Callable:
        def count(*_):
            self.backwards[name] = self.backwards.get(name, 0) + 1

        return count

    def removed(self) -> "Hooks":
        for handle in self.handles:
            handle.remove()
        return self


def traces(model: nn.Module) -> list:
    """What a guest could leave in a house."""
    return [
        (name, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ] + [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]


def same_buffers(one: nn.Module, other: nn.Module, what: str) -> None:
    for (name, buffer), truth in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(
            buffer, truth, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{what}: buffer {n}: {m}"
        )


def check_step(
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    layers=(),
    criterion: SpatialIBLoss | None = None,
    dtype: torch.dtype = torch.float64,
    noisy: bool = False,
    exact: Callable[[], nn.Module] | None = None,
    **options,
) -> SIBStep:
    """All that may be asked of a step; returns the step that was checked.

    Args:
        make: () -> the model, the same weights at every call with one seed.
        layers, options: of :class:`sib_ext.SIBStep`.
        exact: () -> the model of the truth, if that is not ``make``.
        noisy: the model draws from generators of the process, so that two threads would disturb each other.
    """
    criterion = criterion or fixed()
    x, mask = x.to(dtype), mask.to(dtype)

    def model_of(precision=dtype, make=make) -> nn.Module:
        seed(0)
        return make().to(precision)

    def step_of(model: nn.Module, **changes) -> SIBStep:
        return SIBStep(model, copy.deepcopy(criterion), layers, **{"every": 1, "jitter": 0} | options | changes)

    # The gradient of every parameter, and the loss.
    model = model_of()
    step = step_of(model)
    left, kept = traces(model), x.clone()
    hooks = Hooks(model)
    seed()
    loss = step(x, y, mask)
    loss.backward()
    hooks.removed()
    size = step.microbatch or len(x)
    exact = model_of(torch.float64, exact or make)
    seed()
    truth, gradients = elementary(
        exact, criterion, step.layers, step.output, x.double(), y, mask.double(), size, step.every
    )
    assert error(loss.detach(), truth) < EXACT[dtype], f"loss {float(loss)} instead of {float(truth)}"
    found = flat(model)
    assert (off := error(found, gradients)) < EXACT[dtype], f"gradients are off by {off:.1e}"

    # What it leaves behind is what a plain step leaves: buffers, mode, hooks, random numbers, gradients of None.
    plain = model_of()
    of_plain = Hooks(plain)
    seed()
    criterion.look(y, x)  # which draws where an image has several labels
    parts = [logits_of(plain(part.clone()), step.output) for part in x.split(size)]
    if step.microbatch:  # what is run again in backward counts once, also where a checkpoint counts it twice
        same_buffers(model, plain, "after the step")
    _classified(criterion, torch.cat(parts), y).backward()
    of_plain.removed()
    after = noise()
    if not step.microbatch:
        same_buffers(model, plain, "after the step")
    seed()
    again = model_of()
    seed()
    step_of(again)(x, y, mask).backward()
    assert noise() == after, "the random numbers that follow are others than after a plain step"
    assert traces(model) == left, "modes, attributes or hooks of the model have changed"
    for (name, p), of_plain_step in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (of_plain_step.grad is None), f"grad of {name}: {p.grad} after a step"
    once = dict.fromkeys(of_plain.backwards, 1)  # also where reentrant checkpoints of parts fire them for each
    assert hooks.backwards == once, "hooks of parameters were fired more than once, or not at all"
    if not step.microbatch and step.engine != "compiled":
        assert {n for n, c in hooks.forwards.items() if c} == {n for n, c in of_plain.forwards.items() if c}

    # The images are the user's.
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None

    # A step is a function of its model and batch: the same again, from copies, and beside another thread.
    def gradient_of(step: SIBStep) -> Tensor:
        seed()
        step.steps = 0
        step(x, y, mask).backward()
        return flat(step.model)

    first = step_of(model_of())
    copies = {"deepcopy": copy.deepcopy(first)}
    try:
        copies["pickle"] = pickle.loads(pickle.dumps(first))
    except Exception:
        pickle_fails_alone(first)
    copies["resumed"] = step_of(model_of())
    copies["resumed"].load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for what, copied in copies.items():
        assert error(gradient_of(copied), found) < EXACT[dtype], f"{what} has another gradient"
    if not noisy and step.engine != "compiled":  # torch.compile itself traces in one thread at a time
        in_threads([step_of(model_of()) for _ in range(3)], gradient_of, found, EXACT[dtype])

    # Gradients accumulate, and scale with the loss.
    step = step_of(model_of())
    for _ in range(2):
        step.steps = 0
        step.model.load_state_dict(model_of().state_dict())
        seed()
        (0.25 * step(x, y, mask)).backward()
    assert error(flat(step.model), 0.5 * found) < EXACT[dtype], "gradients do not accumulate as usual"
    return step


def pickle_fails_alone(step: SIBStep) -> None:
    """A model that cannot be pickled itself is no fault of the step's."""
    try:
        pickle.dumps(step.model)
    except Exception:
        return
    raise AssertionError("the model can be pickled, but the step cannot")


def kernels() -> tuple[bool, ...]:
    of = torch.backends.cuda
    return of.flash_sdp_enabled(), of.mem_efficient_sdp_enabled(), of.math_sdp_enabled(), of.cudnn_sdp_enabled()


def in_threads(steps: list[SIBStep], gradient_of: Callable, truth: Tensor, tolerance: float) -> None:
    """Two trainings at once, and one afterwards."""
    found: list[Tensor] = []
    before = kernels()
    threads = [threading.Thread(target=lambda step=step: found.append(gradient_of(step))) for step in steps[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.append(gradient_of(steps[2]))
    assert kernels() == before, "attention kernels of the process were switched"
    assert len(found) == 3, "a thread failed"
    for of_thread in found:
        assert error(of_thread, truth) < tolerance, "two threads disturb each other"
