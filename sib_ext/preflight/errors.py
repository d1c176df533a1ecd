"""What is wrong with a derivative, as an exception."""


class NoPath(Exception):
    """The output does not depend on the input in a differentiable way."""


class NotFinite(Exception):
    """A derivative is NaN or infinite."""
