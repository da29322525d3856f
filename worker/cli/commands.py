"""The command group, and the output of errors: one line, without a traceback."""

import io
import os

import click

from worker import __version__
from worker.cli import change_jobs
from worker.cli.compare import compare_api
from worker.cli.docs import docs
from worker.cli.doctor import doctor
from worker.cli.list_jobs import list_jobs
from worker.cli.metrics import metrics
from worker.cli.migrate import migrate
from worker.cli.move_storage import move_storage
from worker.cli.parse import parse
from worker.cli.prune import prune
from worker.cli.run import admin, demo, sandbox, up
from worker.cli.show import show
from worker.cli.simulate import simulate_command
from worker.cli.status import status
from worker.cli.top import top
from worker.cli.track import track
from worker.cli.unread import unread
from worker.cli.verify import verify
from worker.core.display import display_lines
from worker.errors import SettingsError, WorkerError
from worker.store.audit import acting
from worker.system.own_package import advice, other_worker, python_path
from worker.system.terminal import echo
from worker.system.who import user_name

ANYWHERE = ("doctor", "demo", "sandbox", "docs")  # these import no `worker` from the working directory


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fetch-worker")
@click.pass_context
def group(context: click.Context) -> None:
    """Poll a hosted image API until each job is ready, and store every picture exactly once."""
    shadowing_module = other_worker(python_path(os.environ.get("PYTHONPATH", "")))
    if shadowing_module is not None and context.invoked_subcommand not in ANYWHERE:
        raise SettingsError(advice(shadowing_module))


COMMANDS = (
    migrate, demo, up, sandbox, admin, track, verify, compare_api, *change_jobs.COMMANDS, list_jobs, show, status,
    doctor, top, unread, metrics, parse, prune, move_storage, simulate_command, docs,
)  # fmt: skip
for _command in COMMANDS:
    group.add_command(_command)


def run_command(arguments: list[str]) -> int:
    """Run a command. Return its exit code."""
    if any(not _is_text(argument) for argument in arguments):
        echo("fetch-worker: an argument is not valid UTF-8", err=True)
        return 2
    try:
        with acting("cli", user_name()):
            code = group.main(arguments, prog_name="fetch-worker", standalone_mode=False)
    except click.exceptions.Abort:
        echo("stopped", err=True)
        return 130
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        click.echo(display_lines(message.getvalue()), err=True, nl=False)
        return error.exit_code
    except SettingsError as error:
        echo(f"fetch-worker: {error}", err=True)
        return 2
    except WorkerError as error:
        echo(f"fetch-worker: {error}", err=True)
        return 1
    except Exception as error:
        line = _database_line(error)
        if line is None:
            raise
        echo(f"fetch-worker: {line}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _database_line(error: Exception) -> str | None:
    """Return the line to print for an unexpected database error, or `None` for any other error."""
    from sqlalchemy.exc import SQLAlchemyError  # imported here: some commands never need it

    if not isinstance(error, SQLAlchemyError):
        return None
    from worker.settings import load
    from worker.store.database_errors import to_worker_error

    return str(to_worker_error(error, load().database))


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:  # bytes of another encoding become lone surrogates, which databases refuse
        return False
    return True
