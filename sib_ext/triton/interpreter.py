"""Repairs of Triton 3.6's interpreter, made once where TRITON_INTERPRET=1. Compiled kernels are not concerned."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    _repair_loop_bounds()
    _repair_rounding_to_bfloat16()
    _patch_the_language_once()


def _repair_loop_bounds() -> None:
    """Scalars are arrays of one element, and loop bounds are made of them with int(), which numpy 2.4 refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _repair_rounding_to_bfloat16() -> None:
    """float32 to bfloat16 rounds to the nearest, ties to even, as on a GPU; the interpreter cuts the bits off."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values.view(np.float32)), np.uint16(0x7FC0), nearest)

    interpreter._convert_float = rounded


def _patch_the_language_once() -> None:
    """A device function finds tl patched by its kernel's launch; patching it again at every call takes 0.4 ms."""
    patched = set()

    def call(self, *arguments, **named):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
