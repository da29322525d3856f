"""What a terminal gets: text from outside is shown as it is, never as markup, emoji codes or control characters."""

from typing import Any

import click
from rich.console import Console
from rich.text import Text

from worker.core.display import display_text

FILE_WIDTH = 200  # characters a line where stdout is no terminal


def make_console(*, height: int | None = None) -> Console:
    """Return a console of this terminal, or one of `FILE_WIDTH` (and `height` lines); styles come by `cell` alone."""
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**options)
    return console if console.is_terminal else Console(width=FILE_WIDTH, height=height, **options)


def cell(text: str, style: str = "") -> Text:
    """Return text in one line for a table or a line of its own."""
    return Text(display_text(text), style=style)


def echo(text: str, *, err: bool = False) -> None:
    """Print text as one line, on stderr with `err`."""
    click.echo(display_text(text), err=err)
