"""Progress of the demo's jobs, read from the tables and shown live on a terminal, or else line by line."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, Row, select

from worker.core.lifecycle import FINAL_STATES
from worker.operations.explain import why
from worker.operations.job_context import read_context
from worker.sandbox.jobs import SandboxJob
from worker.settings import Settings
from worker.storage.local import path_of
from worker.store import schema
from worker.store.jobs import outputs_of
from worker.system.terminal import cell

WAITING_SHARE = 0.9  # a bar gets at most this far by waiting, the rest by downloads
OTHER_ROWS = 9  # rows of the terminal that are not used for jobs
PRINT_SECONDS = 1.0
MIN_REASON_WIDTH = 100  # columns; a narrower terminal does not show the reasons
STYLES = {"completed": "green", "failed": "red", "expired": "red", "cancelled": "yellow", "downloading": "cyan"}
MARKS = {"stored": ("■", "green"), "failed": ("■", "red")}


@dataclass(frozen=True, slots=True)
class DemoJob:
    """The current state of one job. `id` is None until the job is tracked. `outputs` are rows of the table.

    `order` is the job in the stand-in. It alone knows when the job is ready.
    """

    order: SandboxJob
    id: int | None = None
    status: str = "submitted"
    polls: int = 0
    seen_at: datetime | None = None
    outputs: Sequence[Row[Any]] = ()
    reason: str = "on its way to the worker"

    @property
    def final(self) -> bool:
        """Whether its state is final."""
        return self.status in FINAL_STATES

    @property
    def stored(self) -> list[Row[Any]]:
        """Its outputs that are stored."""
        return [output for output in self.outputs if output.status == "stored"]

    @property
    def seen_after(self) -> float | None:
        """Seconds from ready until a poll saw it."""
        return None if self.seen_at is None else max(0.0, self.seen_at.timestamp() - self.order.ready_at)

    @property
    def stored_after(self) -> float | None:
        """Seconds from ready until the last file was stored."""
        if not self.outputs or len(self.stored) < len(self.outputs):
            return None
        stored_at: float = max(output.stored_at.timestamp() for output in self.outputs)
        return max(0.0, stored_at - self.order.ready_at)


def seconds_text(value: float | None) -> str:
    """Return seconds as text."""
    return "–" if value is None else f"{value:.1f} s"


def figures(jobs: Sequence[DemoJob]) -> dict[str, str]:
    """Return the totals of all jobs by name, and the mean times from ready to seen and to stored."""
    pictures, polls = sum(len(job.stored) for job in jobs), sum(job.polls for job in jobs)
    return {
        "jobs": str(len(jobs)),
        "pictures": str(pictures),
        "polls": str(polls),
        "polls per job": f"{polls / len(jobs):.1f}",
        "mean, ready to seen": seconds_text(_mean([job.seen_after for job in jobs])),
        "mean, ready to stored": seconds_text(_mean([job.stored_after for job in jobs])),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def read_progress(engine: Engine, settings: Settings, orders: Sequence[SandboxJob]) -> list[DemoJob]:
    """Return the current state of every job."""
    jobs = {order.id: DemoJob(order) for order in orders}
    with engine.connect() as connection:
        for row in connection.execute(select(schema.jobs).where(schema.jobs.c.remote_id.in_(jobs))).all():
            outputs = outputs_of(connection, [row.id])
            reason = why(read_context(connection, row, outputs, [], settings))
            order = jobs[row.remote_id].order
            jobs[row.remote_id] = DemoJob(order, row.id, row.status, row.polls, row.ready_at, outputs, reason)
    return list(jobs.values())


class Display:
    """Shows the progress inside its `with` block: a live table on a terminal, or else a line now and then."""

    def __init__(self, console: Console, folder: Path, started_at: float) -> None:
        self._console, self._folder, self._started_at = console, folder, started_at
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._last_text, self._last_printed_at = "", -PRINT_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, jobs: Sequence[DemoJob]) -> None:
        """Show the current state of the jobs, on a terminal as many as fit. Unfinished jobs are preferred."""
        seconds = time.monotonic() - self._started_at
        states = ", ".join(f"{count} {state}" for state, count in Counter(job.status for job in jobs).most_common())
        total = figures(jobs)
        text = f"{total['jobs']} jobs: {states}; {total['polls']} polls, {total['pictures']} pictures stored"
        if self._live is not None:
            rows = max(3, self._console.height - OTHER_ROWS)
            visible = sorted(sorted(range(len(jobs)), key=lambda number: jobs[number].final)[:rows])
            table = job_table([jobs[number] for number in visible], self._folder, self._console)
            more = f"… and {len(jobs) - len(visible)} more" if len(visible) < len(jobs) else ""
            summary = cell(f"{seconds:.1f} s  {text}", "bold")
            self._live.update(Group(table, Text(more, style="dim"), summary), refresh=True)
        elif text != self._last_text and (
            seconds - self._last_printed_at >= PRINT_SECONDS or all(job.final for job in jobs)
        ):
            self._last_text, self._last_printed_at = text, seconds
            self._console.print(cell(f"{seconds:5.1f} s  {text}"), soft_wrap=True)


def job_table(jobs: Sequence[DemoJob], folder: Path, console: Console) -> Table:
    """Return the jobs as a table: with bars on a terminal, and with the reason or the files if it is wide enough."""
    bars, reasons = console.is_terminal, console.width >= MIN_REASON_WIDTH
    table = Table(box=None, pad_edge=False, header_style="bold", expand=bars)
    table.add_column("job", justify="right")
    table.add_column("prompt", ratio=5, no_wrap=True, overflow="ellipsis")
    if bars:
        table.add_column("", width=16 if reasons else 8)
    table.add_column("state", width=11)
    for name in ("polls", "seen", "stored"):
        table.add_column(f"{name} after" if reasons and name != "polls" else name, justify="right", no_wrap=True)
    table.add_column("", width=5)
    if reasons:
        table.add_column("", ratio=4, no_wrap=True, overflow="ellipsis", style="dim")
    for job in jobs:
        style = STYLES.get(job.status, "yellow")
        cells: list[RenderableType] = [str(job.id or ""), cell(job.order.prompt)]
        if bars:
            cells.append(ProgressBar(total=1.0, completed=_share(job), complete_style=style, finished_style=style))
        cells += [Text(job.status, style=style), str(job.polls)]
        cells += [seconds_text(job.seen_after), seconds_text(job.stored_after)]
        cells.append(Text.assemble(*(MARKS.get(output.status, ("□", "dim")) for output in job.outputs)))
        paths = [path_of(output.location).relative_to(folder) for output in job.stored]
        cells.append(cell(f"{paths[0].parent}/" if paths and job.status == "completed" else job.reason))
        table.add_row(*cells[: len(table.columns)])
    return table


def _share(job: DemoJob) -> float:
    """Return how much of a job's bar is filled."""
    if job.final:
        return 1.0
    if job.status == "downloading":
        return WAITING_SHARE + (1 - WAITING_SHARE) * len(job.stored) / max(len(job.outputs), 1)
    waited = time.time() - job.order.submitted_at
    return min(WAITING_SHARE, WAITING_SHARE * waited / (job.order.ready_at - job.order.submitted_at))
