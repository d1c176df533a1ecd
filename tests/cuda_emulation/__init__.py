"""The CUDA kernels, compiled by g++ over an emulation of CUDA (cuda_emulation.h) and called through ctypes."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from sib_ext import reference
from sib_ext.ops import dispatch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
HOPPER = 227 * 1024  # bytes of shared memory that a block may have
ORDERS = {"rising": 0, "falling": 1, "scattered": 2}


def problem() -> str | None:
    """None where the emulation can be compiled, else why not."""
    if not CSRC.is_dir():
        return "needs the source tree"
    return None if shutil.which("g++") else "needs g++"


def build(folder: Path, *flags: str) -> Path:
    library = folder / "emulated.so"
    include = (f"-I{HERE}", f"-I{CSRC / 'cuda'}")
    options = ("-std=c++17", "-O1", "-fPIC", "-shared")
    command = ("g++", *options, *flags, "-DSIB_CUDA_EMULATION", *include, str(HERE / "library.cpp"), "-o", str(library))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return library


class _Mask(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in "type batch channels height width channels_last radius count_padding shared_bytes".split()
        ),
        *((name, ctypes.c_double) for name in "temperature slope eps level".split()),
    ]


class _Statistics(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in "type batch channels pixels channels_last_R channels_last_x multiprocessors tensor_cores".split()
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in "type batch channels groups length over_batch channels_last multiprocessors".split()
    ]


def canonical(field: Tensor) -> Tensor:
    """What the extension does before it calls a kernel: other layouts are copied."""
    return field.detach().contiguous(memory_format=dispatch.field_format(field))


def channels_last(field: Tensor) -> bool:
    return dispatch.field_format(field) == torch.channels_last


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def poisoned(tensor: Tensor) -> Tensor:
    """An output that a kernel must write in full."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


class Emulation:
    """The ops with the signatures of the registered ones."""

    def __init__(self, library: Path):
        self.kernels = ctypes.CDLL(os.fspath(library))
        self.shared_bytes = HOPPER
        self.tensor_cores = True
        self.multiprocessors = 1

    def set_order(self, name: str) -> None:
        self.kernels.set_order(ORDERS[name])

    def _mask_arguments(self, vjp, window, temperature, slope, eps, padding, area) -> _Mask:
        layout = (channels_last(vjp), window // 2, padding == "zeros", self.shared_bytes)
        return _Mask(TYPES[vjp.dtype], *vjp.shape, *layout, temperature, slope, eps, 1 - area)

    def density_mask(self, vjp, *options) -> tuple[Tensor, Tensor]:
        vjp = canonical(vjp)
        batch, _, height, width = vjp.shape
        mask = poisoned(torch.empty(batch, 1, height, width, dtype=reference.accumulation_dtype(vjp.dtype)))
        size = reference.support_size(height * width, options[1])
        support = poisoned(torch.empty(batch, 4, size, dtype=torch.int64))
        arguments = self._mask_arguments(vjp, *options)
        self.kernels.density_mask(ctypes.byref(arguments), pointer(vjp), pointer(mask), pointer(support))
        return mask, support

    def density_mask_backward(self, grad_mask, vjp, mask, support, *options) -> Tensor:
        vjp = canonical(vjp)
        grad = poisoned(torch.empty_like(mask, dtype=vjp.dtype, memory_format=torch.contiguous_format))
        arguments = self._mask_arguments(vjp, *options)
        tensors = (grad_mask.contiguous(), vjp, mask.contiguous(), support.contiguous(), grad)
        self.kernels.density_mask_backward(ctypes.byref(arguments), *map(pointer, tensors))
        return grad

    def _statistics_arguments(self, vjp, x) -> _Statistics:
        batch, channels, height, width = vjp.shape
        layouts = (channels_last(vjp), channels_last(x))
        machine = (self.multiprocessors, self.tensor_cores)
        return _Statistics(TYPES[vjp.dtype], batch, channels, height * width, *layouts, *machine)

    def masked_statistics(self, vjp, x, mask, gram_vjp=True, gram_input=True):
        vjp, x, mask = canonical(vjp), canonical(x), mask.contiguous()
        batch = vjp.shape[0]
        moments = poisoned(torch.empty(batch, len(reference.MOMENTS), dtype=mask.dtype))
        grams = [poisoned(torch.empty(batch, batch, dtype=mask.dtype)) if g else None for g in (gram_vjp, gram_input)]
        tensors = (vjp, x, mask, moments, *grams)
        self.kernels.masked_statistics(ctypes.byref(self._statistics_arguments(vjp, x)), *map(pointer, tensors))
        return moments, *grams

    def masked_statistics_backward(
        self, grad_moments, grad_gram_vjp, grad_gram_input, vjp, x, mask, need_x=True, need_mask=True
    ):
        vjp, x, mask = canonical(vjp), canonical(x), mask.contiguous()
        cotangents = [None if g is None else g.contiguous() for g in (grad_moments, grad_gram_vjp, grad_gram_input)]
        grads = [poisoned(dispatch.empty_field(t)) for t in (vjp, x)]
        grad_mask = poisoned(torch.empty_like(mask))
        outputs = (grads[0], grads[1] if need_x else None, grad_mask if need_mask else None)
        self.kernels.masked_statistics_backward(
            ctypes.byref(self._statistics_arguments(vjp, x)), *map(pointer, (*cotangents, vjp, x, mask, *outputs))
        )
        return outputs

    def _norm_layout(self, x, mean) -> tuple[_Norm, torch.memory_format]:
        """As the extension chooses it."""
        batch, channels = x.shape[:2]
        last = channels_last(x) and mean.dim() == 1 and channels % 4 == 0
        sizes = (batch, channels, mean.shape[-1], x[0, 0].numel(), mean.dim() == 1, last, self.multiprocessors)
        return _Norm(TYPES[x.dtype], *sizes), torch.channels_last if last else torch.contiguous_format

    def norm_double_backward(self, grad_grad, grad, x, mean, rstd, weight, eps):
        arguments, layout = self._norm_layout(x, mean)
        v, g, x = (t.contiguous(memory_format=layout) for t in (grad_grad, grad, x))
        outputs = [poisoned(torch.empty_like(t)) for t in (x, x, mean.new_empty(x.shape[1]))]
        tensors = (v, g, x, mean.contiguous(), rstd.contiguous(), weight, *outputs)
        self.kernels.norm_double_backward(ctypes.byref(arguments), *map(pointer, tensors))
        return tuple(outputs)

    def batch_norm_backward(self, grad, x, mean, rstd, weight):
        arguments, layout = self._norm_layout(x, mean)
        grad, x = (t.contiguous(memory_format=layout) for t in (grad, x))
        outputs = [poisoned(torch.empty_like(t)) for t in (x, mean, mean)]
        tensors = (grad, x, mean.contiguous(), rstd.contiguous(), weight, *outputs)
        self.kernels.batch_norm_backward(ctypes.byref(arguments), *map(pointer, tensors))
        return tuple(outputs)
