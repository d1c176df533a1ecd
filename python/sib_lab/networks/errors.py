"""What can be wrong with a network, as one sentence."""


class NetworkError(Exception):
    """A network that cannot be built; the message is one sentence for the user."""


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
