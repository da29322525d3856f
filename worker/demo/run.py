"""The demo from start to end: start processes, submit prompts as a web app does, show progress, write the page."""

import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import requests
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from rich.console import Console
from sqlalchemy import create_engine

from worker.demo.contact_sheet import contact_sheet
from worker.demo.display import DemoJob, Display, figures, job_table, read_progress
from worker.demo.processes import FLOWER_USER, DemoFailed, DemoProcesses, Stopped, demo_processes
from worker.errors import WorkerError
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.jobs import SandboxJob
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
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="fetch-worker-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()
    options = SandboxOptions(seed=SEED, min_seconds=MIN_SECONDS, max_seconds=longest, size=PICTURE_SIZE)
    _say(console, f"All files of this demo are in {folder}")
    try:
        with demo_processes(folder, options, with_flower=with_flower) as processes:
            try:
                _start(processes, console)
                orders = _submit(processes, Behaviour(options), jobs)
                with Display(console, folder, started_at) as display:
                    demo_jobs = _follow(processes, display, orders, longest + SPARE_SECONDS + jobs)
            except (requests.RequestException, BrokerError, RedisError) as error:
                processes.wait(SETTLE_SECONDS)  # if a process died, this raises a better error
                raise DemoFailed(str(error)) from None
            _say(console, "Stopping the processes")
    except Stopped:
        _say(console, "Stopped; all processes have ended")
        return EXIT_INTERRUPTED
    except (WorkerError, OSError) as error:
        _say(console, f"The demo failed: {error}. The logs are in {folder / 'logs'}")
        return EXIT_FAILED
    return _report(console, folder, demo_jobs, seconds=time.monotonic() - started_at)


def _start(processes: DemoProcesses, console: Console) -> None:
    text = "Starting Redis, the stand-in of the API, two workers, beat and Flower"
    if not console.is_terminal:
        _say(console, text)
    with console.status(text):  # shows nothing if this is no terminal
        processes.start()
    if processes.flower_listens:
        login = f"(user {FLOWER_USER}, password {processes.flower_password})"
        _say(console, f"Flower shows the tasks while this runs: http://127.0.0.1:{processes.flower_port} {login}")


def _submit(processes: DemoProcesses, model: Behaviour, jobs: int) -> list[SandboxJob]:
    """Submit every prompt as a web app would, and pass each answer to the worker by task name.

    `model` is a copy of the stand-in's model. Its jobs tell when they are ready, which the API does not tell.
    """
    orders: list[SandboxJob] = []
    with requests.Session() as session:
        session.trust_env = False
        for prompt in islice(cycle(PROMPTS), jobs):
            processes.check()
            orders.append(model.submit(prompt, now=time.time()))
            body = {"key": processes.api["key"], "prompt": prompt}
            response = session.post(f"{processes.api['url']}/text2img", json=body, timeout=HTTP_SECONDS)
            response.raise_for_status()
            answer = response.json()
            if not answer.get("id"):
                raise DemoFailed(f"the stand-in refused a prompt: {str(answer)[:200]}")
            arguments = f"({answer['id']},)"  # shown by Flower instead of the whole answer
            processes.client.send_task("worker.track", [answer], queue=QUEUE, ignore_result=True, argsrepr=arguments)
    return orders


def _follow(
    processes: DemoProcesses, display: Display, orders: Sequence[SandboxJob], max_seconds: float
) -> list[DemoJob]:
    """Show the progress until all jobs are final, for at most this many seconds."""
    engine = create_engine(processes.database)  # read only; unlike the worker's own engine it takes no lock
    deadline = time.monotonic() + max_seconds
    try:
        while True:
            demo_jobs = read_progress(engine, processes.settings, orders)
            display.show(demo_jobs)
            unfinished = next((job for job in demo_jobs if not job.final), None)
            if unfinished is None:
                return demo_jobs
            if time.monotonic() > deadline:
                reason = f"{unfinished.status}: {unfinished.reason}"
                raise DemoFailed(f"not done in time; job {unfinished.id} is {reason}")
            processes.wait(CHECK_SECONDS)
    finally:
        engine.dispose()


def _report(console: Console, folder: Path, demo_jobs: Sequence[DemoJob], *, seconds: float) -> int:
    """Write the page and print the results."""
    page = folder / PAGE
    page.write_text(contact_sheet(demo_jobs, folder, seconds=seconds), encoding="utf-8")
    total = figures(demo_jobs)
    console.print(job_table(demo_jobs, folder, console))
    polls = f"{total['polls']} polls ({total['polls per job']} per job)"
    _say(console, f"{total['jobs']} jobs, {total['pictures']} pictures, {polls}")
    seen, stored = total["mean, ready to seen"], total["mean, ready to stored"]
    _say(console, f"From ready to seen {seen}, to stored {stored}, on average")
    _say(console, f"The files are below {folder / 'outputs'}")
    _say(console, f"To look at them: {page.as_uri()}")
    unfinished = [job for job in demo_jobs if job.status != "completed"]
    if unfinished:
        summary = f"{len(unfinished)} of {len(demo_jobs)} jobs did not complete"
        reason = f"job {unfinished[0].id}: {unfinished[0].reason}"
        _say(console, f"The demo failed: {summary}; {reason}. The logs are in {folder / 'logs'}")
        return EXIT_FAILED
    return 0


def _say(console: Console, text: str) -> None:
    """Print one line without wrapping, so that paths and URLs can be copied."""
    console.print(cell(text), soft_wrap=True)
