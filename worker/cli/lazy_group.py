"""A group of commands that imports the module of a command when the command runs, not before."""

import gc
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from worker.system.garbage import no_collections


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is, as `module:name`, and the first sentence of its help."""

    home: str
    summary: str

    def load(self) -> click.Command:
        """Import the command."""
        module, _, name = self.home.partition(":")
        if module not in sys.modules:
            with _no_garbage():
                import_module(module)
        command: click.Command = getattr(sys.modules[module], name)
        return command


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Import without garbage collections. Almost all imported objects stay, so a collection finds next to nothing.

    That is a tenth of the processor time of a short command.
    """
    with no_collections():
        try:
            yield
        finally:
            gc.freeze()


class _CommandTable(MutableMapping[str, click.Command]):
    """The commands of a group by name. Each is imported when it is looked up."""

    def __init__(self, commands: Mapping[str, LazyCommand]) -> None:
        self._commands: dict[str, LazyCommand | click.Command] = dict(commands)

    def __getitem__(self, name: str) -> click.Command:
        command = self._commands[name]
        return command.load() if isinstance(command, LazyCommand) else command

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __contains__(self, name: object) -> bool:
        return name in self._commands

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)


class LazyGroup(click.Group):
    """A group that lists its commands, in its help and for a shell's completion, without importing them."""

    def __init__(self, *, lazy: Mapping[str, LazyCommand], **options: Any) -> None:
        super().__init__(**options)
        self.commands = _CommandTable(lazy)
        self._listed = click.Group(
            commands=[click.Command(name, help=command.summary) for name, command in lazy.items()]
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names of the commands and their summaries."""
        self._listed.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the options of the group, or the commands, that begin like this."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return self._listed.shell_complete(click.Context(self._listed), incomplete)
