"""Triton's interpreter with numpy 2.4: without this no kernel with a loop runs under TRITON_INTERPRET=1.

The interpreter of Triton 3.6 keeps scalars as arrays of one element and makes loop bounds of them with int(), which
numpy 2.4 refuses. Compiled kernels are not concerned.
"""

from triton.runtime import interpreter


def repair_loop_bounds() -> None:
    """Lets one-element arrays be loop bounds, in this process."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
