"""The command line: `fetch-worker COMMAND`. Answers on stdout, messages on stderr; 0 done, 1 could not, 2 usage."""

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
    words = sys.argv[1:] if arguments is None else arguments
    if any(not _is_text(word) for word in words):
        click.echo("fetch-worker: an argument is no text in UTF-8", err=True)
        sys.exit(2)
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


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes of another encoding arrive as lone surrogates, which no database takes
        return False
    return True
