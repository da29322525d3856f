"""The command `demo`."""

from pathlib import Path

import click

from worker.demo.run import MAX_JOBS
from worker.demo.run import demo as run_demo


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
