"""The progress of a long command on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from worker.core.humanize import format_count
from worker.system.terminal import echo

SECONDS = 0.2, 10.0  # the time between two progress lines: on a terminal, and in a log


@contextmanager
def show_progress(noun: str, participle: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of things done so far, and shows it from time to time.

    If the command ends early, a line says how far it came and how to continue.
    """
    terminal = sys.stderr.isatty()
    interval = SECONDS[0 if terminal else 1]
    done, next_line_at = 0, time.monotonic() + interval

    def show(count: int) -> None:
        nonlocal done, next_line_at
        done = count
        if time.monotonic() >= next_line_at:
            next_line_at = time.monotonic() + interval
            click.echo(f"\r{done:,} of {total:,} {participle}", err=True, nl=not terminal)

    try:
        yield show
    except BaseException:
        if done:
            click.echo(err=True)
            echo(f"{format_count(done, noun)} {participle} so far: run the same command again to continue", err=True)
        raise
    if terminal and done:
        click.echo("\r\033[K", err=True, nl=False)
