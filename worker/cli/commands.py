"""All commands in one group, and how their errors are said: in one line, without a traceback."""

import io
import os

import click

from worker import __version__
from worker.cli import act, compare, control, docs, find, look, metrics, parse, prune, run, simulate, top, unread
from worker.core.display import display_lines
from worker.errors import SettingsError, WorkerError
from worker.system.own_package import advice, other_worker, python_path
from worker.system.terminal import echo

ANYWHERE = ("doctor", "demo", "sandbox", "docs")  # they start nothing by our package's name in the working directory


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fetch-worker")
@click.pass_context
def group(context: click.Context) -> None:
    """Polls a hosted image API until each job is ready, and stores every picture exactly once."""
    other = other_worker(python_path(os.environ.get("PYTHONPATH", "")))
    if other is not None and context.invoked_subcommand not in ANYWHERE:
        raise SettingsError(advice(other))


for _module in (run, act, compare, control, find, look, top, unread, metrics, parse, prune, simulate, docs):
    for _command in _module.COMMANDS:
        group.add_command(_command)


def run_command(words: list[str]) -> int:
    """Runs a command; its exit code."""
    if any(not _is_text(word) for word in words):
        echo("fetch-worker: an argument is no text in UTF-8", err=True)
        return 2
    try:
        code = group.main(words, prog_name="fetch-worker", standalone_mode=False)
    except click.exceptions.Abort:
        echo("stopped", err=True)
        return 130
    except click.ClickException as wrong:
        written = io.StringIO()
        wrong.show(written)
        click.echo(display_lines(written.getvalue()), err=True, nl=False)
        return wrong.exit_code
    except SettingsError as wrong:
        echo(f"fetch-worker: {wrong}", err=True)
        return 2
    except WorkerError as wrong:
        echo(f"fetch-worker: {wrong}", err=True)
        return 1
    except Exception as error:
        line = _database_line(error)
        if line is None:
            raise
        echo(f"fetch-worker: {line}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _database_line(error: Exception) -> str | None:
    """Return the one line for an error of the database that a command did not expect, or None for any other error."""
    from sqlalchemy.exc import SQLAlchemyError  # most commands have it loaded by then; the others need not load it

    if not isinstance(error, SQLAlchemyError):
        return None
    from worker.settings import load
    from worker.store.database_errors import to_worker_error

    return str(to_worker_error(error, load().database))


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes of another encoding arrive as lone surrogates, which no database takes
        return False
    return True
