"""The command group, and the output of errors: one line, without a traceback."""

import io
import os

import click

from worker import __version__
from worker.cli.lazy_group import LazyCommand, LazyGroup
from worker.core.display import display_lines
from worker.errors import SettingsError, WorkerError
from worker.system.own_package import advice, other_worker, python_path
from worker.system.terminal import echo
from worker.system.who import acting, user_name

ANYWHERE = ("doctor", "demo", "sandbox", "docs")  # these import no `worker` from the working directory


COMMANDS = {
    "admin": LazyCommand("worker.cli.admin:admin", "Serve the admin page for operators."),
    "attach": LazyCommand("worker.cli.order:attach", "Name the remote job of an uncertain order."),
    "cancel": LazyCommand("worker.cli.change_jobs:cancel", "Cancel jobs."),
    "compare-api": LazyCommand("worker.cli.compare:compare_api", "Compare answers of the API and of the stand-in."),
    "copy-database": LazyCommand(
        "worker.cli.copy_database:copy_database",
        "Copy all rows of DATABASE_URL into an empty database.",
    ),
    "demo": LazyCommand("worker.cli.demo:demo", "Run a demo: from prompts to stored pictures."),
    "docs": LazyCommand("worker.cli.docs:docs", "List the topics of the manual, or print the page of TOPIC."),
    "doctor": LazyCommand("worker.cli.doctor:doctor", "Check everything that the worker depends on."),
    "hold": LazyCommand("worker.cli.change_jobs:hold", "Stop polling pending jobs until they are resumed."),
    "list": LazyCommand("worker.cli.list_jobs:list_jobs", "List jobs, newest first."),
    "metrics": LazyCommand("worker.cli.metrics:metrics", "Print or serve Prometheus metrics."),
    "migrate": LazyCommand("worker.cli.migrate:migrate", "Create the tables, or migrate them to this version."),
    "move-storage": LazyCommand(
        "worker.cli.move_storage:move_storage", "Move stored outputs to the storage of STORAGE_URL."
    ),
    "notify": LazyCommand("worker.cli.notify:notify", "Send the webhooks of jobs again."),
    "order": LazyCommand("worker.cli.order:order", "Order a job that the workers send to the API."),
    "parse": LazyCommand("worker.cli.parse:parse", "Show how the worker reads an answer of the API."),
    "prune": LazyCommand("worker.cli.prune:prune", "Remove finished jobs of a minimum age."),
    "resume": LazyCommand("worker.cli.change_jobs:resume", "Continue jobs at once."),
    "retry": LazyCommand("worker.cli.change_jobs:retry", "Retry failed or expired jobs at once, with a new deadline."),
    "sandbox": LazyCommand("worker.cli.sandbox:sandbox", "Run only the stand-in of the API."),
    "show": LazyCommand("worker.cli.show:show", "Show jobs, explain their state, and say what to do."),
    "simulate": LazyCommand("worker.cli.simulate:simulate_command", "Simulate polls and delays of a trace of jobs."),
    "status": LazyCommand("worker.cli.status:status", "Show jobs by state, accounts, holds and late work."),
    "top": LazyCommand("worker.cli.top:top", "Watch rates, holds, late work, downloads and problems live."),
    "track": LazyCommand("worker.cli.track:track", "Track jobs by remote id or by submit answer (JSON)."),
    "unread": LazyCommand("worker.cli.unread:unread", "List answers that no rule recognises, by shape."),
    "up": LazyCommand("worker.cli.up:up", "Run the processes of the Procfile until Ctrl-C."),
    "verify": LazyCommand("worker.cli.verify:verify", "Check the stored files of all jobs or of some jobs."),
}  # a test compares the sentences with the help of the commands


@click.group(
    cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="fetch-worker")
@click.pass_context
def group(context: click.Context) -> None:
    """Poll a hosted image API until each job is ready, and store every picture exactly once."""
    shadowing_module = other_worker(python_path(os.environ.get("PYTHONPATH", "")))
    if shadowing_module is not None and context.invoked_subcommand not in ANYWHERE:
        raise SettingsError(advice(shadowing_module))


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
