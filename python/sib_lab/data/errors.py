"""What can be wrong with a user's files; light to import."""


class DataError(Exception):
    """Data that cannot be used; the message is one sentence for the user."""

    def __init__(self, message: str):
        # A DataLoader's worker hands an error on as its traceback: keep the sentence at its end.
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2] if "\n" in message else message)


def some(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are: "a, b, c and 5 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
