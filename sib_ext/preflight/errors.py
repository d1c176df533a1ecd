"""What is wrong with a derivative, as an exception."""


class NoPath(Exception):
    """The output does not depend on the input in a differentiable way."""


class NotFinite(Exception):
    """A derivative is NaN or infinite."""


class Unseen(Exception):
    """A derivative that a step takes rightly, and that cannot be taken apart from it."""
