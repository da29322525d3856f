"""Progress of the demo's jobs, read from the tables and shown live on a terminal, or else line by line."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, select

from worker.core.lifecycle import FINAL_STATES
from worker.operations.overview import why
from worker.settings import Settings
from worker.storage.local import path_of
from worker.store import schema
from worker.store.jobs import outputs_of
from worker.system.terminal import cell

WAITING_SHARE = 0.9  # a bar gets at most this far by waiting, because the API does not tell when a job is ready
OTHER_ROWS = 9  # rows of the terminal that are not used for jobs
PRINT_SECONDS = 1.0
MIN_REASON_WIDTH = 100  # columns; a narrower terminal does not show the reasons
STYLES = {"completed": "green", "failed": "red", "expired": "red", "cancelled": "yellow", "downloading": "cyan"}


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submitted prompt. `ready_at` is the true time, which only the stand-in knows."""

    remote_id: str
    prompt: str
    eta: float
    submitted_at: datetime
    ready_at: datetime


@dataclass(frozen=True, slots=True)
class DemoOutput:
    """One output. `location` is set once it is stored."""

    position: int
    status: str
    location: str | None
    size_bytes: int | None
    sha256: str | None
    stored_at: datetime | None


@dataclass(frozen=True, slots=True)
class DemoJob:
    """The current state of one job. `id` is None until the job is tracked."""

    submitted: Submitted
    id: int | None
    status: str
    polls: int
    seen_at: datetime | None
    files: tuple[DemoOutput, ...]
    reason: str

    @property
    def final(self) -> bool:
        """Whether its state is final."""
        return self.status in FINAL_STATES

    @property
    def stored(self) -> int:
        """The number of its files that are stored."""
        return sum(file.status == "stored" for file in self.files)

    @property
    def seen_after(self) -> float | None:
        """Seconds from ready until a poll saw it."""
        return None if self.seen_at is None else max(0.0, (self.seen_at - self.submitted.ready_at).total_seconds())

    @property
    def stored_after(self) -> float | None:
        """Seconds from ready until the last file was stored."""
        times = [file.stored_at for file in self.files if file.stored_at is not None]
        if not times or len(times) < len(self.files):
            return None
        return max(0.0, (max(times) - self.submitted.ready_at).total_seconds())


def read_progress(engine: Engine, settings: Settings, submitted: Sequence[Submitted]) -> list[DemoJob]:
    """Return the current state of every job."""
    names = [submission.remote_id for submission in submitted]
    with engine.connect() as connection:
        selected = connection.execute(select(schema.jobs).where(schema.jobs.c.remote_id.in_(names)))
        rows = {row.remote_id: row for row in selected}
        jobs: list[DemoJob] = []
        for submission in submitted:
            row = rows.get(submission.remote_id)
            if row is None:
                jobs.append(DemoJob(submission, None, "submitted", 0, None, (), "on its way to the worker"))
                continue
            outputs = outputs_of(connection, [row.id])
            files = tuple(
                DemoOutput(
                    output.position, output.status, output.location, output.size_bytes, output.sha256, output.stored_at
                )
                for output in outputs
            )
            reason = why(connection, row, outputs, settings)
            jobs.append(DemoJob(submission, row.id, row.status, row.polls, row.ready_at, files, reason))
    return jobs


def summary_line(jobs: Sequence[DemoJob]) -> str:
    """Return a summary of all jobs in one line."""
    states = Counter(job.status for job in jobs)
    states_text = ", ".join(f"{count} {state}" for state, count in states.most_common())
    files = sum(job.stored for job in jobs)
    polls = sum(job.polls for job in jobs)
    return f"{len(jobs)} jobs: {states_text}; {polls} polls, {files} pictures stored"


class Display:
    """Shows the progress inside its `with` block: a live table on a terminal, or else a line now and then."""

    def __init__(self, console: Console, started_at: float) -> None:
        self._console, self._started_at = console, started_at
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last_text, self._last_printed_at = "", -PRINT_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, jobs: Sequence[DemoJob]) -> None:
        """Show the current state of the jobs."""
        seconds = time.monotonic() - self._started_at
        if self._live is not None:
            self._live.update(progress_table(jobs, self._console, now=datetime.now(UTC), seconds=seconds), refresh=True)
            return
        text = summary_line(jobs)
        if text != self._last_text and (
            seconds - self._last_printed_at >= PRINT_SECONDS or all(job.final for job in jobs)
        ):
            self._last_text, self._last_printed_at = text, seconds
            self._console.print(cell(f"{seconds:5.1f} s  {text}"), soft_wrap=True)


def result_table(jobs: Sequence[DemoJob], folder: Path) -> RenderableType:
    """Return a table with the result of each job and its files, relative to the folder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "prompt", "state", "polls", "seen after", "stored after", "files"):
        numbers = name in ("job", "polls", "seen after", "stored after")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=name == "prompt", overflow="ellipsis")
    for job in jobs:
        paths = [path_of(file.location).relative_to(folder) for file in job.files if file.location is not None]
        files = f"{paths[0].parent}/ ×{len(paths)}" if paths else job.reason
        state = Text(job.status, style=STYLES.get(job.status, ""))
        after = [seconds_text(job.seen_after), seconds_text(job.stored_after)]
        table.add_row(str(job.id or ""), cell(job.submitted.prompt), state, str(job.polls), *after, cell(files))
    return table


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def seconds_text(value: float | None) -> str:
    """Return seconds as text."""
    return "–" if value is None else f"{value:.1f} s"


def progress_table(jobs: Sequence[DemoJob], console: Console, *, now: datetime, seconds: float) -> RenderableType:
    """Return all jobs as a table with progress bars that fits the terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("job", justify="right", style="dim")
    table.add_column("prompt", ratio=5, no_wrap=True, overflow="ellipsis")
    table.add_column("", width=16)
    table.add_column("state", width=11)
    table.add_column("polls", justify="right", width=5)
    table.add_column("files", width=5)
    if console.width >= MIN_REASON_WIDTH:
        table.add_column("why", ratio=4, no_wrap=True, overflow="ellipsis", style="dim")
    visible = _fitting(jobs, max(3, console.height - OTHER_ROWS))
    for job in visible:
        style = STYLES.get(job.status, "yellow")
        done = _fraction(job, now)
        bar = ProgressBar(total=1.0, completed=done, width=16, complete_style=style, finished_style=style)
        cells: list[RenderableType] = [
            "" if job.id is None else str(job.id),
            cell(job.submitted.prompt),
            bar,
            Text(job.status, style=style),
            str(job.polls),
            _squares(job),
        ]
        if console.width >= MIN_REASON_WIDTH:
            cells.append(cell("" if job.status == "completed" else job.reason))
        table.add_row(*cells)
    hidden = len(jobs) - len(visible)
    items: list[RenderableType] = [table]
    if hidden:
        items.append(Text(f"… and {hidden} more", style="dim"))
    return Group(*items, Text(), cell(f"{seconds:.1f} s  {summary_line(jobs)}", "bold"))


def _fitting(jobs: Sequence[DemoJob], limit: int) -> list[DemoJob]:
    """Return as many jobs as fit, in order. Unfinished jobs are preferred."""
    if len(jobs) <= limit:
        return list(jobs)
    chosen = sorted(range(len(jobs)), key=lambda number: jobs[number].final)[:limit]
    return [jobs[number] for number in sorted(chosen)]


def _fraction(job: DemoJob, now: datetime) -> float:
    if job.final:
        return 1.0
    if job.status == "downloading":
        return WAITING_SHARE + (1 - WAITING_SHARE) * job.stored / max(len(job.files), 1)
    waited = (now - job.submitted.submitted_at).total_seconds()
    return min(WAITING_SHARE, WAITING_SHARE * waited / max(job.submitted.eta, 0.1))


def _squares(job: DemoJob) -> Text:
    marks = {"stored": ("■", "green"), "failed": ("■", "red")}
    return Text.assemble(*(marks.get(file.status, ("□", "dim")) for file in job.files))
