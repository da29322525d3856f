"""Commands that run processes: demo, up, sandbox, admin."""

from pathlib import Path

import click

from worker.demo.run import MAX_JOBS
from worker.demo.run import demo as run_demo
from worker.errors import SettingsError
from worker.launch.up import up as run_up
from worker.sandbox.command import main as run_sandbox
from worker.settings import load


@click.command()
@click.option("--jobs", type=click.IntRange(1, MAX_JOBS), default=12, show_default=True, help="Prompts to submit.")
@click.option("--longest", type=click.FloatRange(1, 600), default=8.0, show_default=True, metavar="SECONDS",
              help="The longest time until a job is ready; the shortest is 1 second.")  # fmt: skip
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder for all files; it must be new or empty.",
)
@click.option("--flower/--no-flower", default=True, show_default=True, help="Also start Flower to show the tasks.")
def demo(jobs: int, longest: float, folder: Path | None, flower: bool) -> int:
    """Run a demo: from prompts to stored pictures.

    It needs no key and no server, and ends by itself. It starts an embedded Redis, the stand-in of the API, Celery
    workers, beat and Flower, submits prompts, and shows the progress of each picture. It reads no settings. All
    files are in one new directory, which is kept.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise click.BadParameter(f"{folder} is not empty", param_hint="--folder")
    return run_demo(jobs=jobs, longest=longest, folder=folder, with_flower=flower)


@click.command()
def up() -> int:
    """Run the processes of the Procfile until Ctrl-C.

    Processes that die are restarted. Without REDIS_URL it also starts an embedded Redis on var/redis.sock.
    """
    return run_up()


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="")
def sandbox(words: tuple[str, ...]) -> int:
    """Run only the stand-in of the API. `sandbox --help` lists its options."""
    return run_sandbox(words)


@click.command()
@click.option("--address", help="The address to listen on. Default: ADMIN_ADDRESS, 127.0.0.1.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="The port to listen on; 0 chooses a free port. Default: ADMIN_PORT, 5556.",
)
def admin(address: str | None, port: int | None) -> None:
    """Serve the admin page for operators.

    It shows jobs, outputs, accounts and plots. It needs no API key, only the DATABASE_URL, REDIS_URL and
    STORAGE_URL of the workers. The password is ADMIN_PASSWORD; if that is not set, a new password is printed at the
    start. Who logs in with ADMIN_VIEWER_PASSWORD may look and change nothing.
    """
    settings = load("admin")
    try:
        from worker.admin.serve import listen_address_of, serve  # an optional dependency
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("worker"):
            raise
        raise SettingsError(f"`admin` needs {error.name}: pip install 'fetch-worker[admin]'") from None
    serve(settings, listen_address_of(settings, address, port))
