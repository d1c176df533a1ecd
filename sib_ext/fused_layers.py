"""Convolution and normalisation whose second derivative costs what it must.

The S-IB loss differentiates an input gradient with respect to the parameters. PyTorch does that correctly but not
well for two kinds of layers: the weight gradient of a convolution's double backward runs as a convolution whose
kernel is a whole feature map, and the double backward of batch and group normalisation is some twenty passes over
the feature map. Inside :func:`fused_double_backward` those layers are recorded by autograd Functions of this module:
the first gives the weight gradient by the ordinary backward convolution, the second is the op
:func:`sib_ext.ops.norm_double_backward`. Values and first derivatives are those of PyTorch's own kernels, except batch
normalisation's first derivative by native kernels on a GPU (:mod:`sib_ext.ops.batch_norm_backward`).
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils import checkpoint

from . import reference
from .ops import dispatch
from .ops.batch_norm_backward import batch_norm_backward
from .ops.norm_double_backward import norm_double_backward


def input_gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    create_graph: bool = True,
    keep_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with respect to inputs or feature maps, never parameters; None: no dependence."""
    # torch.autograd.grad itself would leave the mode before its engine starts.
    engine = torch.autograd.Variable._execution_engine
    of = tuple(outputs), tuple(cotangents)
    # Autocast is for forward passes: each operation's backward has the type of its forward.
    with dispatch.without_autocast(inputs[0].device.type), _InputGradients():
        return engine.run_backward(*of, keep_graph, create_graph, tuple(inputs), True, False)


class _InputGradients(TorchFunctionMode):
    """Says to the backward passes inside that they are those of a VJP.

    A mode, because autograd carries modes into the threads that run a GPU's backward, and into no other thread.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return True if function is is_input_only else function(*args, **(kwargs or {}))


def is_input_only(grad: Tensor) -> bool:
    """Whether the backward pass under way is that of a VJP: it wants no parameter gradients."""
    return has_torch_function((grad,)) and handle_torch_function(is_input_only, (grad,), grad)


def _from_parameters_alone(*tensors: Tensor | None) -> bool:
    """Whether a layer's weights are leaves: computed weights may come from x, and a VJP must follow them there."""
    return all(t is None or t.is_leaf or not t.requires_grad for t in tensors)


def _plain_derivatives(layer: Callable, tensors: tuple, grad: Tensor, needed: tuple[bool, ...]) -> tuple:
    """Any other pass that will be differentiated again: PyTorch's own rule, whatever it costs."""
    return dispatch.partial_derivatives(layer, tensors, grad, needed[: len(tensors)])


# ------------------------------------------------------------------------------------------- convolution


def _convolution_backward(grad, x, weight, bias_sizes, geometry, wanted):
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_sizes, stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )


class _Convolution(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, convolve, geometry, mode):
        ctx.convolve, ctx.geometry, ctx.mode = convolve, geometry, mode
        ctx.save_for_backward(x, weight, bias)
        return convolve(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if is_input_only(grad):
            grad_x = _ConvolutionInputGradient.apply(grad, x, weight, ctx.convolve, ctx.geometry)
            return grad_x if needed[0] else None, *[None] * 5
        # Inside the forward pass a model may differentiate by its own input.
        images_alone = ctx.mode is not None and ctx.mode.is_over
        needed = needed[0] and not images_alone, *needed[1:]
        if torch.is_grad_enabled():
            grads = _plain_derivatives(lambda *t: ctx.convolve(*t, *ctx.geometry), (x, weight, bias), grad, needed)
            return *grads, *[None] * 3
        bias_sizes = None if bias is None else list(bias.shape)
        grads = _convolution_backward(grad, x, weight, bias_sizes, ctx.geometry, list(needed))
        return *grads, *[None] * 3


class _ConvolutionInputGradient(Function):
    """(g, weight) -> dx, bilinear; both of its derivatives are a convolution with another pair of the three."""

    @staticmethod
    def forward(ctx, grad, x, weight, convolve, geometry):
        ctx.convolve, ctx.geometry = convolve, geometry
        ctx.save_for_backward(grad, weight)
        with dispatch.without_autocast(x.device.type):
            if _in_phases(x, weight, geometry):
                return _input_gradient_in_phases(grad, x, weight, geometry)
        return _convolution_backward(grad, x, weight, None, geometry, [True, False, False])[0]

    @staticmethod
    def backward(ctx, grad_grad):
        grad, weight = ctx.saved_tensors
        for_grad = for_weight = None
        if ctx.needs_input_grad[0]:
            with dispatch.without_autocast(grad.device.type):
                for_grad = ctx.convolve(grad_grad, weight, None, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            for_weight = _convolution_backward(grad, grad_grad, weight, None, ctx.geometry, [False, True, False])[1]
        return for_grad, None, for_weight, None, None


def _in_phases(x: Tensor, weight: Tensor, geometry: tuple) -> bool:
    """A network's first convolution on a CPU, whose input gradient no plain step needs and oneDNN has no kernel for."""
    stride, _, dilation, groups = geometry
    few = weight.dim() == 4 and weight.shape[1] <= 4 and groups == 1
    return few and x.device.type == "cpu" and stride[0] == stride[1] > 1 and tuple(dilation) == (1, 1)


def _input_gradient_in_phases(grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    """dx [B,C,H,W] of a convolution with stride s as one of stride 1 for all s*s phases of its positions.

    Padded position s*q + u gets sum_a g[q - a] w[s*a + u]: half the time for ResNet's first layer, a third for patches.
    """
    (stride, _), (top, left), _, _ = geometry
    _, channels, *sides = weight.shape
    taps = [-(-side // stride) for side in sides]
    padded = F.pad(weight, [0, taps[1] * stride - sides[1], 0, taps[0] * stride - sides[0]])
    by_phase = padded.unflatten(3, (taps[1], stride)).unflatten(2, (taps[0], stride))
    kernel = by_phase.permute(1, 3, 5, 0, 2, 4).flip(4, 5).reshape(channels * stride**2, -1, *taps)
    everywhere = F.pixel_shuffle(torch.conv2d(grad, kernel, padding=[tap - 1 for tap in taps]), stride)
    found = everywhere[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    below, right = (x.shape[d] - found.shape[d] for d in (2, 3))  # positions that no window reaches
    return F.pad(found, [0, right, 0, below]) if below or right else found.contiguous()


def _convolution(
    mode, convolve: Callable, dims: int, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
):
    plain = isinstance(padding, str) or input.dim() != dims + 2 or input.is_complex()
    if plain or not _from_parameters_alone(weight, bias):
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    each = ([int(v)] * dims if hasattr(v, "__index__") else list(map(int, v)) for v in (stride, padding, dilation))
    geometry = (*(v * dims if len(v) == 1 else v for v in each), int(groups))
    x, weight, bias = _as_autocast((input, weight, bias))
    with dispatch.without_autocast(x.device.type):
        return _Convolution.apply(x, weight, bias, convolve, geometry, mode if mode.takes_images(input) else None)


def _as_autocast(tensors: tuple) -> tuple:
    """In the type that autocast would choose for a convolution, because autocast does not see into a Function."""
    if not _autocast_enabled(tensors[0]) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _autocast_enabled(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


# ----------------------------------------------------------------------------------------- normalisation


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        # PyTorch's own choice of a kernel; the last two results belong to it.
        y, mean, rstd, reserve, ctx.kernel = torch.ops.aten._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, True, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.eps, ctx.impl = eps, dispatch.resolve(None, x.device.type)
        ctx.save_for_backward(x, weight, bias, mean, rstd, reserve)
        return y

    @staticmethod
    def backward(ctx, grad):
        def layer(x, weight, bias):
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)

        return *_norm_gradients(ctx, grad, layer), *[None] * 4


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *_extents(x), groups, eps)
        ctx.groups, ctx.eps, ctx.impl, ctx.kernel = groups, eps, dispatch.resolve(None, x.device.type), None
        ctx.save_for_backward(x, weight, bias, mean, rstd, None)
        return y

    @staticmethod
    def backward(ctx, grad):
        def layer(x, weight, bias):
            return F.group_norm(x, ctx.groups, weight, bias, ctx.eps)

        return *_norm_gradients(ctx, grad, layer), None, None


def _norm_gradients(ctx, grad: Tensor, layer: Callable) -> tuple:
    """(dx, dweight, dbias) as the pass under way wants them; ``layer`` is PyTorch's own, (x, weight, bias) -> y."""
    x, weight, bias, mean, rstd, reserve = ctx.saved_tensors
    needed, kernel = ctx.needs_input_grad, (ctx.kernel, reserve)
    if is_input_only(grad):
        if not needed[0]:
            return None, None, None
        return _NormInputGradient.apply(grad, x, weight, mean, rstd, ctx.eps, ctx.impl, kernel), None, None
    if torch.is_grad_enabled():
        return _plain_derivatives(layer, (x, weight, bias), grad, needed)
    return _norm_backward(grad, x, weight, mean, rstd, ctx.eps, ctx.impl, kernel, list(needed[:3]))


class _NormInputGradient(Function):
    """(g, x, weight) -> dx of a batch (statistics [C]) or group (statistics [B,G]) normalisation."""

    @staticmethod
    def forward(ctx, grad, x, weight, mean, rstd, eps, impl, kernel):
        ctx.eps, ctx.impl = eps, impl  # of the forward pass: a GPU's backward runs in another thread
        ctx.save_for_backward(grad, x, weight, mean, rstd)
        return _norm_backward(grad, x, weight, mean, rstd, eps, impl, kernel, [True, False, False])[0]

    @staticmethod
    def backward(ctx, grad_grad):
        grad, x, weight, mean, rstd = ctx.saved_tensors
        dtype = reference.accumulation_dtype(x.dtype)
        mean, rstd, scale = (t if t is None else t.to(dtype) for t in (mean, rstd, weight))
        for_grad, for_x, for_weight = norm_double_backward(
            grad_grad.to(x.dtype), grad.to(x.dtype), x, mean, rstd, scale, ctx.eps, ctx.impl
        )
        for_weight = for_weight.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return for_grad.to(grad.dtype), for_x, for_weight, *[None] * 5


def _extents(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels and positions of [B,C,...]."""
    return x.shape[0], x.shape[1], x[:1, :1].numel()


def _dense(x: Tensor) -> Tensor:
    """In the memory format that cuDNN's forward took it in."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x if x.is_contiguous(memory_format=channels_last) else x.contiguous()


def _norm_backward(grad, x, weight, mean, rstd, eps, impl, kernel, wanted):
    index, reserve = kernel
    if index is None:
        grads = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, *_extents(x), mean.shape[1], wanted
        )
    elif x.is_cuda and impl == "native":
        scale = weight if weight is None else weight.to(mean.dtype)
        grad_x, *of_parameters = batch_norm_backward(grad.to(x.dtype), x, mean, rstd, scale)
        grads = grad_x, *(t if weight is None else t.to(weight.dtype) for t in of_parameters)
    else:
        grads = torch.ops.aten._batch_norm_impl_index_backward(
            index, _dense(x), grad, weight, None, None, mean, rstd, True, eps, wanted, reserve
        )
    return tuple(t if wants else None for t, wants in zip(grads, wanted, strict=True))


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    x = input
    refused = x.dim() < 2 or x.numel() <= x.shape[1]  # torch's own error
    if not training or refused or not _from_parameters_alone(weight, bias):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    x = input
    refused = x.dim() < 2 or x.shape[1] % num_groups  # torch's own error
    if refused or not _from_parameters_alone(weight, bias):
        return F.group_norm(x, num_groups, weight, bias, eps)
    if _autocast_enabled(x):
        x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))  # as autocast does on a GPU
    with dispatch.without_autocast(x.device.type):
        return _GroupNorm.apply(x.contiguous(), weight, bias, num_groups, eps)


# --------------------------------------------------------------------------------------------- attention


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """By the one kernel that has a second derivative; the fused ones fail in ``loss.backward()``.

    Called by its name, as torch.nn.attention.sdpa_kernel would switch the kernels of every thread.
    """
    if _autocast_enabled(query) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _multi_head_attention(*arguments, need_weights=True, average_attn_weights=True, **options):
    """With its weights, which PyTorch then computes without a fused kernel."""
    output, weights = F.multi_head_attention_forward(
        *arguments, need_weights=True, average_attn_weights=average_attn_weights and need_weights, **options
    )
    return output, weights if need_weights else None


# -------------------------------------------------------------------------------------------------- mode

# (mode, arguments of the function) -> its result
_RULES = {
    torch.conv1d: lambda mode, *a, **k: _convolution(mode, torch.conv1d, 1, *a, **k),
    torch.conv2d: lambda mode, *a, **k: _convolution(mode, torch.conv2d, 2, *a, **k),
    torch.conv3d: lambda mode, *a, **k: _convolution(mode, torch.conv3d, 3, *a, **k),
    F.batch_norm: lambda mode, *a, **k: _batch_norm(*a, **k),
    F.group_norm: lambda mode, *a, **k: _group_norm(*a, **k),
    F.scaled_dot_product_attention: lambda mode, *a, **k: _attention(*a, **k),
    F.multi_head_attention_forward: lambda mode, *a, **k: _multi_head_attention(*a, **k),
}


Around = Callable[[Callable[[], bool]], contextlib.AbstractContextManager]


class fused_double_backward(TorchFunctionMode):
    """A context for the forward pass: ``with fused_double_backward(): logits = model(x)``.

    Convolutions, batch normalisation in train mode and group normalisation inside get cheap second derivatives under
    the S-IB loss, and attention the kernel that has one at all; everything else, and every other use of the result,
    is PyTorch's. The model is not changed. Not for code that ``torch.compile`` compiles: the engine ``"compiled"`` of
    :class:`sib_ext.SIBStep` serves that.
    """

    def __init__(self, around: Around = contextlib.nullcontext, passive: float = 0, images: Tensor | None = None):
        """
        Args:
            around: a context for what checkpoints run again inside it, given the function that says whether the mode is
                active there.
            passive: so many of the calls of such layers are left as they are; infinite: all until :meth:`activate`.
            images: a leaf of which, after the forward pass, no gradient is wanted but the VJP. A convolution of a copy
                of it does without the other one, for which a network's first layer has no good kernel.
        """
        super().__init__()
        self.around, self.passive, self.images = around, passive, images
        self.passed = 0  #: how many in the checkpoint of that hook:
        self._in: Callable | None = None
        self.recomputes = False  #: a checkpoint was met, whose function will run again
        self.is_over = False  #: the forward pass

    def __enter__(self):
        self.is_over = False
        return super().__enter__()

    def __exit__(self, *error):
        self.is_over = True
        return super().__exit__(*error)

    def is_active(self) -> bool:
        return self.passive == 0

    def takes_images(self, tensor: Tensor) -> bool:
        """Whether a tensor is a copy of the images."""
        node = tensor.grad_fn
        if self.images is None or node is None or node.name() != "CloneBackward0":
            return False
        return getattr(node.next_functions[0][0], "variable", None) is self.images

    def activate(self) -> None:
        """What follows is fused."""
        if not self.is_active():
            self._enter(checkpoint_hook())
            self.passive = 0

    def _enter(self, hook: Callable | None) -> None:
        if hook is not self._in:
            self.passed, self._in = 0, hook

    def passed_in(self, hook: Callable) -> int:
        """How many calls were left as they are in the checkpoint of that hook."""
        return self.passed if hook is self._in else 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule = None
        if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None:  # not inside torch.func
            rule = _RULES.get(function)
            if self.is_active():
                self.recomputes |= _carried_into_recomputation(self)
            elif rule is not None:
                rule = None
                self._enter(checkpoint_hook())
                self.passed += 1
                self.passive -= 1
        return rule(self, *args, **(kwargs or {})) if rule else function(*args, **(kwargs or {}))


def checkpoint_hook() -> Callable | None:
    """The hook for saved tensors of the non-reentrant checkpoint whose function runs here, None if none does.

    PyTorch offers no other way to a checkpoint that is under way.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__name__ else None


def is_recomputation(hook: Callable) -> bool:
    """Whether that function runs again."""
    return hook.__qualname__.startswith(checkpoint._recomputation_hook.__name__)


def _carried_into_recomputation(mode: fused_double_backward) -> bool:
    """What a non-reentrant checkpoint recomputes must save what it saved at first: it, too, runs inside this mode.

    Raises:
        RuntimeError: checkpoints that look otherwise than those of the torch versions that are known here.
    """
    hook = checkpoint_hook()
    if hook is None or is_recomputation(hook):
        return False
    frames = [c.cell_contents for c in hook.__closure__ or () if hasattr(c.cell_contents, "recompute_fn")]
    if not frames:
        raise RuntimeError(
            f"the checkpoints of torch {torch.__version__} are not known to this version of sib_ext: switch them off "
            "in the model, or use the torch that sib_ext was tested with"
        )
    if not isinstance(frames[0].recompute_fn, _Recomputation):
        frames[0].recompute_fn = _Recomputation(frames[0].recompute_fn, mode.around, mode.passed_in(hook))
    return True


class _Recomputation:
    def __init__(self, function: Callable, around: Around, passed: int):
        self.function, self.around, self.passed = function, around, passed

    def __call__(self, *arguments):
        with fused_double_backward(self.around, self.passed) as mode, self.around(mode.is_active):
            return self.function(*arguments)
