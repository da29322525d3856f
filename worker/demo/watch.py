"""How the demo's jobs stand, read from their tables, and how that is shown: live on a terminal, else line by line."""

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

ALMOST = 0.9  # as far as a bar gets by waiting alone: nobody knows when a job is ready
ROWS_LEFT_FREE = 9  # of the terminal's height, for what stands around the jobs
SAY_SECONDS = 1.0
NARROW = 100  # columns; below it the reasons are left out
STYLES = {"completed": "green", "failed": "red", "expired": "red", "cancelled": "yellow", "downloading": "cyan"}


@dataclass(frozen=True, slots=True)
class Submitted:
    """What was asked of the API. `ready_at` is when it is ready in truth, which only the stand-in knows."""

    remote_id: str
    prompt: str
    eta: float
    submitted_at: datetime
    ready_at: datetime


@dataclass(frozen=True, slots=True)
class File:
    """One output. `location` is set once it is stored."""

    position: int
    status: str
    location: str | None
    size_bytes: int | None
    sha256: str | None
    stored_at: datetime | None


@dataclass(frozen=True, slots=True)
class Progress:
    """One job as it stands. `id` is None until it was tracked."""

    submitted: Submitted
    id: int | None
    status: str
    polls: int
    seen_at: datetime | None
    files: tuple[File, ...]
    reason: str

    @property
    def final(self) -> bool:
        """Whether it will not change any more."""
        return self.status in FINAL_STATES

    @property
    def stored(self) -> int:
        """How many of its files are there."""
        return sum(file.status == "stored" for file in self.files)

    @property
    def seen_after(self) -> float | None:
        """Seconds from ready to seen."""
        return None if self.seen_at is None else max(0.0, (self.seen_at - self.submitted.ready_at).total_seconds())

    @property
    def stored_after(self) -> float | None:
        """Seconds from ready to the last file stored."""
        times = [file.stored_at for file in self.files if file.stored_at is not None]
        if not times or len(times) < len(self.files):
            return None
        return max(0.0, (max(times) - self.submitted.ready_at).total_seconds())


def look(engine: Engine, settings: Settings, submitted: Sequence[Submitted]) -> list[Progress]:
    """How every job stands now."""
    names = [one.remote_id for one in submitted]
    with engine.connect() as connection:
        found = connection.execute(select(schema.jobs).where(schema.jobs.c.remote_id.in_(names)))
        rows = {row.remote_id: row for row in found}
        progress: list[Progress] = []
        for one in submitted:
            row = rows.get(one.remote_id)
            if row is None:
                progress.append(Progress(one, None, "submitted", 0, None, (), "on its way to the worker"))
                continue
            outputs = outputs_of(connection, [row.id])
            files = tuple(
                File(each.position, each.status, each.location, each.size_bytes, each.sha256, each.stored_at)
                for each in outputs
            )
            reason = why(connection, row, outputs, settings)
            progress.append(Progress(one, row.id, row.status, row.polls, row.ready_at, files, reason))
    return progress


def summary(progress: Sequence[Progress]) -> str:
    """All jobs in one line."""
    states = Counter(one.status for one in progress)
    said = ", ".join(f"{count} {state}" for state, count in states.most_common())
    files = sum(one.stored for one in progress)
    polls = sum(one.polls for one in progress)
    return f"{len(progress)} jobs: {said}; {polls} polls, {files} pictures stored"


class Display:
    """Shows progress inside its `with` block: a table that is drawn anew, or a line where nobody watches."""

    def __init__(self, console: Console, began: float) -> None:
        self._console, self._began = console, began
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._said, self._said_at = "", -SAY_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Sequence[Progress]) -> None:
        """Shows how the jobs stand."""
        seconds = time.monotonic() - self._began
        if self._live is not None:
            self._live.update(view(progress, self._console, now=datetime.now(UTC), seconds=seconds), refresh=True)
            return
        said = summary(progress)
        if said != self._said and (seconds - self._said_at >= SAY_SECONDS or all(one.final for one in progress)):
            self._said, self._said_at = said, seconds
            self._console.print(cell(f"{seconds:5.1f} s  {said}"), soft_wrap=True)


def results(progress: Sequence[Progress], folder: Path) -> RenderableType:
    """What came out of each job, and the names of its files below the folder."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "prompt", "state", "polls", "seen after", "stored after", "files"):
        numbers = name in ("job", "polls", "seen after", "stored after")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=name == "prompt", overflow="ellipsis")
    for one in progress:
        places = [path_of(file.location).relative_to(folder) for file in one.files if file.location is not None]
        files = f"{places[0].parent}/ ×{len(places)}" if places else one.reason
        state = Text(one.status, style=STYLES.get(one.status, ""))
        after = [seconds_text(one.seen_after), seconds_text(one.stored_after)]
        table.add_row(str(one.id or ""), cell(one.submitted.prompt), state, str(one.polls), *after, cell(files))
    return table


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def seconds_text(value: float | None) -> str:
    """Seconds as people read them."""
    return "–" if value is None else f"{value:.1f} s"


def view(progress: Sequence[Progress], console: Console, *, now: datetime, seconds: float) -> RenderableType:
    """All jobs as a table of bars, for a terminal of this size."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("job", justify="right", style="dim")
    table.add_column("prompt", ratio=5, no_wrap=True, overflow="ellipsis")
    table.add_column("", width=16)
    table.add_column("state", width=11)
    table.add_column("polls", justify="right", width=5)
    table.add_column("files", width=5)
    if console.width >= NARROW:
        table.add_column("why", ratio=4, no_wrap=True, overflow="ellipsis", style="dim")
    shown = _shown(progress, max(3, console.height - ROWS_LEFT_FREE))
    for one in shown:
        style = STYLES.get(one.status, "yellow")
        done = _fraction(one, now)
        bar = ProgressBar(total=1.0, completed=done, width=16, complete_style=style, finished_style=style)
        cells: list[RenderableType] = [
            "" if one.id is None else str(one.id),
            cell(one.submitted.prompt),
            bar,
            Text(one.status, style=style),
            str(one.polls),
            _squares(one),
        ]
        if console.width >= NARROW:
            cells.append(cell("" if one.status == "completed" else one.reason))
        table.add_row(*cells)
    hidden = len(progress) - len(shown)
    parts: list[RenderableType] = [table]
    if hidden:
        parts.append(Text(f"… and {hidden} more", style="dim"))
    return Group(*parts, Text(), cell(f"{seconds:.1f} s  {summary(progress)}", "bold"))


def _shown(progress: Sequence[Progress], most: int) -> list[Progress]:
    """As many as fit: in order, those that are under way before those that are done."""
    if len(progress) <= most:
        return list(progress)
    kept = sorted(range(len(progress)), key=lambda number: progress[number].final)[:most]
    return [progress[number] for number in sorted(kept)]


def _fraction(one: Progress, now: datetime) -> float:
    if one.final:
        return 1.0
    if one.status == "downloading":
        return ALMOST + (1 - ALMOST) * one.stored / max(len(one.files), 1)
    waited = (now - one.submitted.submitted_at).total_seconds()
    return min(ALMOST, ALMOST * waited / max(one.submitted.eta, 0.1))


def _squares(one: Progress) -> Text:
    marks = {"stored": ("■", "green"), "failed": ("■", "red")}
    return Text.assemble(*(marks.get(file.status, ("□", "dim")) for file in one.files))
