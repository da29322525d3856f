"""The demo from start to end: starts its parts, submits prompts as a web app does, watches, and writes the page."""

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

from worker.demo.parts import DemoFailed, Parts, Stopped
from worker.demo.sheet import sheet
from worker.demo.watch import Display, Progress, Submitted, look, mean, results, seconds_text
from worker.errors import WorkerError
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.options import SandboxOptions
from worker.system.terminal import cell, make_console

MOST_JOBS = 500
SEED = 7
LEAST_SECONDS = 1.0
SPARE_SECONDS = 60.0  # beyond the time that the jobs themselves take, for a slow machine
LOOK_SECONDS = 0.15
HTTP_SECONDS = 10.0
SETTLE_SECONDS = 1.0
COULD_NOT = 1
INTERRUPTED = 130
PAGE = "contact-sheet.html"
QUEUE = "fetch-worker"
PICTURE_SIZE = 400  # pixels both ways: sharp enough, and quickly drawn

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
    """The exit code: 0 where all jobs completed, 1 where one did not, 130 where it was told to end."""
    began = time.monotonic()
    console = make_console()
    place = _place(folder)
    options = SandboxOptions(seed=SEED, min_seconds=LEAST_SECONDS, max_seconds=longest, size=PICTURE_SIZE)
    _say(console, f"Everything of this demo is in {place}")
    try:
        with Parts(place, options, with_flower=with_flower) as parts:
            try:
                _start(parts, console)
                submitted = _submit(parts, Behaviour(options), jobs)
                progress = _follow(parts, console, submitted, began, longest + SPARE_SECONDS + jobs)
            except (requests.RequestException, BrokerError, RedisError) as error:
                parts.wait(SETTLE_SECONDS)  # a part that died says it better
                raise DemoFailed(str(error)) from None
            _say(console, "Stopping the processes")
    except Stopped:
        _say(console, "Stopped; no process is left")
        return INTERRUPTED
    except (WorkerError, OSError) as error:
        _say(console, f"The demo failed: {error}. The logs are in {place / 'logs'}")
        return COULD_NOT
    return _report(console, place, progress, seconds=time.monotonic() - began)


def _place(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="fetch-worker-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def _start(parts: Parts, console: Console) -> None:
    with _busy(console, "Starting Redis, the stand-in of the API, two workers, beat and Flower"):
        parts.start()
        parts.until_ready()
    if parts.flower is not None:
        said = f"(user {parts.flower.user}, password {parts.flower.password})"
        _say(console, f"Flower shows the tasks while this runs: {parts.flower.url} {said}")


def _submit(parts: Parts, twin: Behaviour, jobs: int) -> list[Submitted]:
    """Submits every prompt as a web app would, and hands each answer over to the worker by a task's name.

    `twin` decides as the stand-in does; so the demo knows what nobody can of the real API: when a job is ready.
    """
    submitted: list[Submitted] = []
    with requests.Session() as session:
        session.trust_env = False
        for number in range(jobs):
            parts.check()
            prompt = PROMPTS[number % len(PROMPTS)]
            at = datetime.now(UTC)
            response = session.post(
                f"{parts.api['url']}/text2img", json={"key": parts.api["key"], "prompt": prompt}, timeout=HTTP_SECONDS
            )
            response.raise_for_status()
            answer = response.json()
            if not answer.get("id"):
                raise DemoFailed(f"the stand-in refused a prompt: {str(answer)[:200]}")
            shown = f"({answer['id']},)"  # what Flower shows of the whole answer
            parts.client.send_task("worker.track", [answer], queue=QUEUE, ignore_result=True, argsrepr=shown)
            job = twin.submit(prompt, now=at.timestamp())
            ready_at = datetime.fromtimestamp(job.ready_at, UTC)
            submitted.append(Submitted(str(answer["id"]), prompt, float(answer.get("eta") or 0), at, ready_at))
    return submitted


def _follow(
    parts: Parts, console: Console, submitted: Sequence[Submitted], began: float, most: float
) -> list[Progress]:
    """Shows how the jobs stand until all are final, for so many seconds at most."""
    engine = create_engine(parts.database)  # it only reads, and takes no lock as the worker's own engine does
    until = time.monotonic() + most
    try:
        with Display(console, began) as display:
            while True:
                progress = look(engine, parts.settings, submitted)
                display.show(progress)
                late = [one for one in progress if not one.final]
                if not late:
                    return progress
                if time.monotonic() > until:
                    raise DemoFailed(f"not done in time; job {late[0].id} is {late[0].status}: {late[0].reason}")
                parts.wait(LOOK_SECONDS)
    finally:
        engine.dispose()


def _report(console: Console, place: Path, progress: Sequence[Progress], *, seconds: float) -> int:
    """Writes the page, and says what came out."""
    page = place / PAGE
    page.write_text(sheet(progress, place, seconds=seconds), encoding="utf-8")
    pictures, polls = sum(one.stored for one in progress), sum(one.polls for one in progress)
    seen, stored = mean([one.seen_after for one in progress]), mean([one.stored_after for one in progress])
    console.print(results(progress, place))
    _say(console, f"{len(progress)} jobs, {pictures} pictures, {polls} polls ({polls / len(progress):.1f} per job)")
    _say(console, f"From ready to seen {seconds_text(seen)}, to stored {seconds_text(stored)}, on average")
    _say(console, f"The files are below {place / 'outputs'}")
    _say(console, f"Look at them: {page.as_uri()}")
    unfinished = [one for one in progress if one.status != "completed"]
    if unfinished:
        worst = unfinished[0]
        said = f"{len(unfinished)} of {len(progress)} jobs did not complete; job {worst.id}: {worst.reason}"
        _say(console, f"The demo failed: {said}. The logs are in {place / 'logs'}")
        return COULD_NOT
    return 0


def _say(console: Console, text: str) -> None:
    """One line, never folded: paths and addresses are there to be copied."""
    console.print(cell(text), soft_wrap=True)


def _busy(console: Console, text: str) -> AbstractContextManager[object]:
    if console.is_terminal:
        return console.status(text)
    _say(console, text)
    return nullcontext()
