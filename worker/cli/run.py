"""Commands that run processes: demo, up, sandbox, admin."""

from pathlib import Path

import click

from worker.demo.run import MOST_JOBS
from worker.demo.run import demo as run_demo
from worker.errors import SettingsError
from worker.launch.up import up as run_up
from worker.sandbox.command import main as run_sandbox
from worker.settings import load


@click.command()
@click.option("--jobs", type=click.IntRange(1, MOST_JOBS), default=12, show_default=True, help="Prompts to submit.")
@click.option("--longest", type=click.FloatRange(1, 600), default=8.0, show_default=True, metavar="SECONDS",
              help="A job is ready after 1 to so many seconds.")  # fmt: skip
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where everything goes; new or empty.")
@click.option("--flower/--no-flower", default=True, show_default=True, help="Show the tasks in Flower meanwhile.")
def demo(jobs: int, longest: float, folder: Path | None, flower: bool) -> int:
    """See the whole job happen: no key, no server, ends by itself.

    Starts an embedded Redis, the stand-in of the API, Celery workers, beat and Flower, submits prompts, and shows how
    each picture gets home. Reads no settings; everything is in one new directory, which is kept.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise click.BadParameter(f"{folder} is not empty", param_hint="--folder")
    return run_demo(jobs=jobs, longest=longest, folder=folder, with_flower=flower)


@click.command()
def up() -> int:
    """Run the Procfile's processes, and start again what dies, until Ctrl-C.

    Without REDIS_URL it brings an embedded Redis on var/redis.sock.
    """
    return run_up()


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="")
def sandbox(words: tuple[str, ...]) -> int:
    """Run the stand-in of the API alone (`sandbox --help` lists its options)."""
    return run_sandbox(words)


@click.command()
@click.option("--address", help="What to listen on; default: ADMIN_ADDRESS, 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Default: ADMIN_PORT, 5556; 0 takes a free one.")
def admin(address: str | None, port: int | None) -> None:
    """Serve a web page for operators: jobs, outputs, accounts, plots.

    It needs no API key: DATABASE_URL, REDIS_URL and STORAGE_URL as the workers have them are enough. The password is
    ADMIN_PASSWORD, or one that is shown as it starts.
    """
    settings = load("admin")
    try:
        from worker.admin.serve import place_of, serve  # an extra: the other commands do without it
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("worker"):
            raise
        raise SettingsError(f"`admin` needs {missing.name}: pip install 'fetch-worker[admin]'") from None
    serve(settings, place_of(settings, address, port))


COMMANDS: tuple[click.Command, ...] = (demo, up, sandbox, admin)
