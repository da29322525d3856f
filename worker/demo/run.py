"""The demo from start to end: start processes, submit prompts as a web app does, show progress, write the page."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

import requests
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from rich.console import Console
from sqlalchemy import create_engine

from worker.demo.contact_sheet import contact_sheet
from worker.demo.display import DemoJob, Display, Submitted, mean, read_progress, result_table, seconds_text
from worker.demo.processes import DemoFailed, DemoProcesses, Stopped
from worker.errors import WorkerError
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.options import SandboxOptions
from worker.system.terminal import cell, make_console

MAX_JOBS = 500
SEED = 7
MIN_SECONDS = 1.0
SPARE_SECONDS = 60.0  # allowed beyond the duration of the jobs, for a slow machine
CHECK_SECONDS = 0.15
HTTP_SECONDS = 10.0
SETTLE_SECONDS = 1.0
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
PAGE = "contact-sheet.html"
QUEUE = "fetch-worker"
PICTURE_SIZE = 400  # width and height in pixels: sharp enough, and drawn quickly

PROMPTS = (
    "a lighthouse above a calm sea at sunset",
    "mountains under the northern aurora",
    "an astronaut drifting past a violet nebula",
    "a fox in a misty pine forest",
    "rainy neon streets of a city at midnight",
    "tulips in a spring meadow",
    "golden dunes and one camel",
    "a lake at dawn, still as glass",
    "liquid silk in candy colours",
    "a volcano waking under ember clouds",
    "a sailing boat on a bright summer sea",
    "a cabin in the woods under the stars",
)


def demo(*, jobs: int, longest: float, folder: Path | None, with_flower: bool) -> int:
    """Run the demo. Return the exit code: 0 if all jobs completed, 1 if one did not, 130 after a signal."""
    started_at = time.monotonic()
    console = make_console()
    run_folder = _make_folder(folder)
    options = SandboxOptions(seed=SEED, min_seconds=MIN_SECONDS, max_seconds=longest, size=PICTURE_SIZE)
    _say(console, f"All files of this demo are in {run_folder}")
    try:
        with DemoProcesses(run_folder, options, with_flower=with_flower) as processes:
            try:
                _start(processes, console)
                submitted = _submit(processes, Behaviour(options), jobs)
                demo_jobs = _follow(processes, console, submitted, started_at, longest + SPARE_SECONDS + jobs)
            except (requests.RequestException, BrokerError, RedisError) as error:
                processes.wait(SETTLE_SECONDS)  # if a process died, this raises a better error
                raise DemoFailed(str(error)) from None
            _say(console, "Stopping the processes")
    except Stopped:
        _say(console, "Stopped; all processes have ended")
        return EXIT_INTERRUPTED
    except (WorkerError, OSError) as error:
        _say(console, f"The demo failed: {error}. The logs are in {run_folder / 'logs'}")
        return EXIT_FAILED
    return _report(console, run_folder, demo_jobs, seconds=time.monotonic() - started_at)


def _make_folder(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="fetch-worker-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def _start(processes: DemoProcesses, console: Console) -> None:
    with _busy(console, "Starting Redis, the stand-in of the API, two workers, beat and Flower"):
        processes.start()
        processes.until_ready()
    if processes.flower is not None:
        login = f"(user {processes.flower.user}, password {processes.flower.password})"
        _say(console, f"Flower shows the tasks while this runs: {processes.flower.url} {login}")


def _submit(processes: DemoProcesses, model: Behaviour, jobs: int) -> list[Submitted]:
    """Submit every prompt as a web app would, and pass each answer to the worker by task name.

    `model` is a copy of the stand-in's model, from which the demo knows when a job is ready. The API does not tell
    that.
    """
    submitted: list[Submitted] = []
    with requests.Session() as session:
        session.trust_env = False
        for number in range(jobs):
            processes.check()
            prompt = PROMPTS[number % len(PROMPTS)]
            at = datetime.now(UTC)
            response = session.post(
                f"{processes.api['url']}/text2img",
                json={"key": processes.api["key"], "prompt": prompt},
                timeout=HTTP_SECONDS,
            )
            response.raise_for_status()
            answer = response.json()
            if not answer.get("id"):
                raise DemoFailed(f"the stand-in refused a prompt: {str(answer)[:200]}")
            arguments = f"({answer['id']},)"  # shown by Flower instead of the whole answer
            processes.client.send_task("worker.track", [answer], queue=QUEUE, ignore_result=True, argsrepr=arguments)
            job = model.submit(prompt, now=at.timestamp())
            ready_at = datetime.fromtimestamp(job.ready_at, UTC)
            submitted.append(Submitted(str(answer["id"]), prompt, float(answer.get("eta") or 0), at, ready_at))
    return submitted


def _follow(
    processes: DemoProcesses, console: Console, submitted: Sequence[Submitted], started_at: float, max_seconds: float
) -> list[DemoJob]:
    """Show the progress until all jobs are final, for at most this many seconds."""
    engine = create_engine(processes.database)  # read only; unlike the worker's own engine it takes no lock
    deadline = time.monotonic() + max_seconds
    try:
        with Display(console, started_at) as display:
            while True:
                demo_jobs = read_progress(engine, processes.settings, submitted)
                display.show(demo_jobs)
                unfinished = [job for job in demo_jobs if not job.final]
                if not unfinished:
                    return demo_jobs
                if time.monotonic() > deadline:
                    raise DemoFailed(
                        f"not done in time; job {unfinished[0].id} is {unfinished[0].status}: {unfinished[0].reason}"
                    )
                processes.wait(CHECK_SECONDS)
    finally:
        engine.dispose()


def _report(console: Console, run_folder: Path, demo_jobs: Sequence[DemoJob], *, seconds: float) -> int:
    """Write the page and print the results."""
    page = run_folder / PAGE
    page.write_text(contact_sheet(demo_jobs, run_folder, seconds=seconds), encoding="utf-8")
    pictures, polls = sum(job.stored for job in demo_jobs), sum(job.polls for job in demo_jobs)
    seen, stored = mean([job.seen_after for job in demo_jobs]), mean([job.stored_after for job in demo_jobs])
    console.print(result_table(demo_jobs, run_folder))
    _say(
        console,
        f"{len(demo_jobs)} jobs, {pictures} pictures, {polls} polls ({polls / len(demo_jobs):.1f} per job)",
    )
    _say(console, f"From ready to seen {seconds_text(seen)}, to stored {seconds_text(stored)}, on average")
    _say(console, f"The files are below {run_folder / 'outputs'}")
    _say(console, f"To look at them: {page.as_uri()}")
    unfinished = [job for job in demo_jobs if job.status != "completed"]
    if unfinished:
        first = unfinished[0]
        summary = f"{len(unfinished)} of {len(demo_jobs)} jobs did not complete; job {first.id}: {first.reason}"
        _say(console, f"The demo failed: {summary}. The logs are in {run_folder / 'logs'}")
        return EXIT_FAILED
    return 0


def _say(console: Console, text: str) -> None:
    """Print one line without wrapping, so that paths and URLs can be copied."""
    console.print(cell(text), soft_wrap=True)


def _busy(console: Console, text: str) -> AbstractContextManager[object]:
    if console.is_terminal:
        return console.status(text)
    _say(console, text)
    return nullcontext()
