"""Terminal output. Text from outside is shown literally: no markup, no emoji codes, no control characters."""

from typing import Any

import click
from rich.console import Console
from rich.text import Text

from worker.core.display import display_text

FILE_WIDTH = 200  # characters per line if stdout is not a terminal


def make_console(*, height: int | None = None) -> Console:
    """Return a console for this terminal, or one of `FILE_WIDTH` and `height` lines. Only `cell` sets styles."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**options)
    return console if console.is_terminal else Console(width=FILE_WIDTH, height=height, **options)


def cell(text: str, style: str = "") -> Text:
    """Return text as a single line, for a table cell or a line of output."""
    return Text(display_text(text), style=style)


def echo(text: str, *, err: bool = False) -> None:
    """Print text as one line, to stderr if `err`."""
    click.echo(display_text(text), err=err)
