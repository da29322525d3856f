"""Commands that run processes: demo, up, sandbox."""

import click

from worker import sandbox as sandbox_package  # noqa: F401  # shows that the stand-in is there

COMMANDS: tuple[click.Command, ...] = ()
