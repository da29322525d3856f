"""The command line: `fetch-worker COMMAND`. Answers on stdout, messages on stderr; exit 0 done, 1 could not, 2 usage."""

import sys

import click

from worker import __version__
from worker.cli import act, look, run
from worker.errors import SettingsError, WorkerError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fetch-worker")
def group() -> None:
    """Polls a hosted image API until each job is ready, and stores every picture exactly once."""


for _command in (*run.COMMANDS, *act.COMMANDS, *look.COMMANDS):
    group.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Whatever we know how to say is said in one line, without a traceback."""
    try:
        code = group.main(arguments, prog_name="fetch-worker", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(wrong.exit_code)
    except SettingsError as wrong:
        click.echo(f"fetch-worker: {wrong}", err=True)
        sys.exit(2)
    except WorkerError as wrong:
        click.echo(f"fetch-worker: {wrong}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
