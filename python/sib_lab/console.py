"""The terminal. Names of files, classes and layers are shown as they are, whatever brackets stand in them."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def plain_console() -> Console:
    """The standard output, without markup in texts."""
    return Console(markup=False, emoji=False, highlight=False)


def progress_bar(console: Console, unit: str, *columns: str, stays: bool = False) -> Progress:
    """A bar with what is done, of how many ``unit``, and the time left; nothing where the output is no terminal.

    Args:
        columns: further texts, by the names of a task's fields.
        stays: it is still seen when all is done.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *(TextColumn(f"{{task.fields[{column}]}}", markup=False) for column in columns),
        console=console,
        transient=not stays,
        disable=not console.is_terminal,
    )
