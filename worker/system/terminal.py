"""Terminal output. Text from outside is shown literally: no markup, no emoji codes, no control characters."""

from typing import TYPE_CHECKING, Any

import click

from worker.core.display import display_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

FILE_WIDTH = 200  # characters per line if stdout is not a terminal


def make_console(*, height: int | None = None) -> "Console":
    """Return a console for this terminal, or one of `FILE_WIDTH` and `height` lines. Only `cell` sets styles."""
    from rich.console import Console  # only here and in `cell`: most commands start without it

    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**options)
    return console if console.is_terminal else Console(width=FILE_WIDTH, height=height, **options)


def cell(text: str, style: str = "") -> "Text":
    """Return text as a single line, for a table cell or a line of output."""
    from rich.text import Text

    return Text(display_text(text), style=style)


def echo(text: str, *, err: bool = False) -> None:
    """Print text as one line, to stderr if `err`."""
    click.echo(display_text(text), err=err)
