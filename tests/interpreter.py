"""Makes Triton's interpreter fast enough for the tests."""


def patch_the_language_once() -> None:
    """A device function called by a kernel finds tl patched by the launch; Triton 3.6 patches it again, every call.

    That takes 0.4 ms, more than half of a test's time.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self, *arguments, **named):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call
