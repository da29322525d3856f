"""Who acts: the program that this process runs, and the user who started it. For the audit trail."""

import os
import pwd
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Source = Literal["cli", "page", "flower", "python", "task"]

INTERACTIVE = ("", "-", "-c", "-m")  # sys.argv[0] of a Python without a program


@dataclass(frozen=True, slots=True)
class Actor:
    """Where an action comes from, and who caused it: a user of the page, or of the operating system."""

    source: Source
    who: str


_actor: ContextVar[Actor | None] = ContextVar("actor", default=None)


@contextmanager
def acting(source: Source, who: str) -> Iterator[None]:
    """Name the actor of the actions in this `with` block. Outside of one, the actor is the Python program."""
    token = _actor.set(Actor(source, who))
    try:
        yield
    finally:
        _actor.reset(token)


def current_actor() -> Actor:
    """Return the actor of the current `with` block, or the Python program."""
    return _actor.get() or Actor("python", program_name())


def program_name() -> str:
    """Return the name of the running program, or an empty text in an interactive Python."""
    program = Path(next(iter(sys.argv), ""))
    name = program.parent.name if program.name == "__main__.py" else program.name
    return "" if name in INTERACTIVE else name


def user_name() -> str:
    """Return the operating-system user of this process. Under sudo, return the user who called it."""
    caller = os.environ.get("SUDO_USER", "")
    try:
        return caller or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container, the user may have no name
        return str(os.getuid())
