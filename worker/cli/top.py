"""The command `top`: renders the live snapshot of `worker.operations.snapshot` in a terminal."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from worker.cli.output import json_option, print_json
from worker.core.display import display_text
from worker.core.humanize import format_bytes, format_duration
from worker.errors import WorkerError
from worker.operations.snapshot import NO_WORKER, AccountNow, LostClaimNow, Snapshot
from worker.operations.snapshot_reader import SnapshotReader
from worker.settings import load
from worker.store.engine import engine_for
from worker.store.reports.work_state import HEALTHY_SECONDS
from worker.system.terminal import cell, make_console

FILE_LINES = 1_000  # without a terminal, only the limits of `worker.operations.snapshot_reader` apply
GAP = "  "


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the screen. Its title is the header of the first column, `columns` are the headers of the others."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    alarming: bool = False  # red
    count: int = 0  # the total, if there are more than `rows`
    more: bool = False  # whether counting stopped at `count`

    @property
    def minimum_lines(self) -> int:
        """The number of lines that show at least the title, one row and the number of further rows."""
        return min(max(len(self.rows), self.count), 2) + 1

    @property
    def maximum_lines(self) -> int:
        """The number of lines that show every row."""
        return 1 + len(self.rows) + (self.count > len(self.rows))


@click.command()
@click.option("--every", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, metavar="SECONDS",
              help="The time between two refreshes.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print one snapshot and exit; the default if stdout is not a terminal.")
@json_option
def top(every: float, once: bool, as_json: bool) -> int:
    """Watch rates, holds, late work, downloads and problems live. `q` quits."""
    settings = load()
    reader = SnapshotReader(engine_for(settings.database), settings)
    console = make_console(height=FILE_LINES)
    if as_json:
        print_json(document(reader.read()))
    elif once or not console.is_terminal:
        console.print(render(reader.read(), console.width, console.height - 1), soft_wrap=True)
    else:
        _watch(reader, console, every)
    return 0


def document(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as a JSON document. `jobs_more` lists the states with more jobs than were counted."""
    fields = asdict(snapshot)
    fields["troubles"] = [trouble.document() for trouble in snapshot.troubles]
    fields["late_count"], fields["late_more"] = snapshot.late_count.count, snapshot.late_count.more
    fields["jobs"] = {counted.state: counted.count for counted in snapshot.jobs}
    fields["jobs_more"] = [counted.state for counted in snapshot.jobs if counted.more]
    return fields


# ── watching ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _watch(reader: SnapshotReader, console: Console, every: float) -> None:
    snapshot = reader.read()  # without a first snapshot, the error ends the command
    error = None
    try:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(render(snapshot, console.width, console.height, error), refresh=True)
                if pressed(every):
                    return
                try:
                    snapshot, error = reader.read(), None
                except WorkerError as failure:
                    error = str(failure)
    except KeyboardInterrupt:
        return


@contextmanager
def _keys() -> Iterator[Any]:
    """Yield a function that waits for a number of seconds and returns true as soon as `q` is pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    handle = sys.stdin.fileno()
    settings = termios.tcgetattr(handle)
    tty.setcbreak(handle)
    try:
        yield lambda seconds: _quit_pressed(handle, seconds)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, settings)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _quit_pressed(handle: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([handle], [], [], remaining)
        if ready:
            typed = os.read(handle, 64)
            if not typed or b"q" in typed.lower():
                return True
    return False


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def render(snapshot: Snapshot, width: int, height: int, error: str | None = None) -> Group:
    """Render a snapshot for a terminal of this size, the most important section first, each cut to its share."""
    lines = [*_head(snapshot, error)]
    sections = [section for section in _sections(snapshot) if section.rows]
    for section, line_count in zip(sections, _line_counts(sections, height - len(lines)), strict=True):
        lines += _lines(section, line_count, width)
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(*lines[:height])


def _head(snapshot: Snapshot, error: str | None) -> Iterator[Text]:
    last_request = "never" if snapshot.asked_seconds is None else f"{format_duration(snapshot.asked_seconds)} ago"
    line = Text(f"fetch-worker {snapshot.at:%H:%M:%S} UTC", style="bold")
    silent = snapshot.asked_seconds is None or snapshot.asked_seconds > HEALTHY_SECONDS
    if silent and any(job.why == NO_WORKER for job in snapshot.late):
        line.append(f"{GAP}NO WORKER POLLS", style="bold red")
    line.append(f"{GAP}last request {last_request}, {snapshot.asking:,} in flight", style="not bold")
    yield line
    job_counts = [f"{jobs.count:,}{'+' if jobs.more else ''} {jobs.state}" for jobs in snapshot.jobs if jobs.count]
    line = Text(GAP.join(job_counts) or "no jobs yet")
    if snapshot.claims or snapshot.late or snapshot.overdue or snapshot.unstored:
        line.append(f"{GAP}(`fetch-worker show ID` says why, and what to do)", style="dim")
    yield line
    if error is not None:
        yield cell(error, "bold red")
    if not snapshot.budget_known:
        yield Text("Redis is not reachable, so the number of free requests is unknown", style="red")


def _line_counts(sections: Sequence[Section], height: int) -> list[int]:
    """Divide the lines: a title for each section, then in order the minimum of each, then the rest evenly."""
    lines = [1 for _ in sections]
    free = height - len(sections)
    for index, section in enumerate(sections):
        if section.minimum_lines - 1 <= free:
            lines[index] = section.minimum_lines
            free -= section.minimum_lines - 1
    while free > 0:
        cut = [
            index
            for index, section in enumerate(sections)
            if section.minimum_lines <= lines[index] < section.maximum_lines
        ]
        if not cut:
            break
        for index in cut[:free]:
            lines[index] += 1
        free -= len(cut[:free])
    return lines


def _lines(section: Section, line_count: int, width: int) -> list[Text]:
    count = max(len(section.rows), section.count)
    shown = section.rows[:count] if line_count > count else section.rows[: max(line_count - 2, 0)]
    table = [(section.title, *section.columns), *shown]
    cells = [[display_text(text) for text in row] for row in table]
    widths = [max(cell_len(row[place]) for row in cells) for place in range(len(cells[0]))]
    style = "bold red" if section.alarming else "bold"
    lines = [Text(_joined(row, widths), style=style if not place else "") for place, row in enumerate(cells)]
    more = f"… and {count - len(shown):,}{'+' if section.more else ''} more"
    if line_count == 1:
        return [Text(f"{section.title} {more}", style=style)]
    return lines if len(shown) == count else [*lines, Text(more, style="dim")]


def _joined(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = (text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True))
    return GAP.join(padded).rstrip()


def _sections(snapshot: Snapshot) -> list[Section]:
    """Return the sections, the most important first: problems before normal work."""
    seconds, late = snapshot.kinds_seconds, snapshot.late_count
    period = "since counting began" if seconds is None else f"the last {format_duration(seconds)}"
    sections = []
    for table in TABLES:
        cells = (table.first, *table.columns.values())
        rows = [[cell_of(item, snapshot) for cell_of in cells] for item in table.items(snapshot)]
        columns = [name.format(period=period) for name in table.columns]
        section = Section(table.title, columns, rows, table.alarming)
        sections.append(replace(section, count=late.count, more=late.more) if table is LATE_JOBS else section)
    return sections


Cell = Callable[[Any, Snapshot], str]


@dataclass(frozen=True, slots=True)
class _Table:
    """A section: what it lists, the cells of the first column, and those of the other columns by header."""

    title: str
    items: Callable[[Snapshot], Sequence[Any]]
    first: Cell
    columns: Mapping[str, Cell]
    alarming: bool = False


def _field(name: str, form: Callable[[Any], str] = str, *, missing: str = "-") -> Cell:
    """Return the cell of a field. `missing` stands for `None` and for an empty text."""

    def cell_of(item: Any, _: Snapshot) -> str:
        value = getattr(item, name)
        return missing if value is None or value == "" else form(value)

    return cell_of


def _duration(name: str) -> Cell:
    return _field(name, format_duration)


def _since(name: str) -> Cell:
    """Return the cell of a past moment."""
    return lambda item, snapshot: _field(name, lambda moment: format_duration(_seconds(snapshot.at, moment)))(
        item, snapshot
    )


def _until(name: str) -> Cell:
    """Return the cell of a moment to come."""
    return lambda item, snapshot: _field(name, lambda moment: _in(_seconds(moment, snapshot.at)))(item, snapshot)


def _seconds(later: datetime, earlier: datetime) -> float:
    return (later - earlier).total_seconds()


def _in(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds > 0 else f"due for {format_duration(-seconds)}"


def _lease(claim: LostClaimNow, _: Snapshot) -> str:
    seconds = format_duration(abs(claim.over_seconds))
    return f"ended {seconds} ago" if claim.over_seconds > 0 else f"ends in {seconds}"


def _holder(claim: LostClaimNow, _: Snapshot) -> str:
    silent = "is silent" if claim.over_seconds > 0 else "has held it longer than any work takes"
    return f"{claim.holder} {'is dead' if claim.dead else silent}"


def _rate(account: AccountNow, _: Snapshot) -> str:
    return f"{account.rps:g}" + ("" if account.ceiling is None else f" (learned: {account.ceiling:g})")


def _ordered(account: AccountNow, _: Snapshot) -> str:
    uncertain = f" ({account.uncertain:,} uncertain)" if account.uncertain else ""
    return f"{account.ordered:,}{uncertain}"


def _slots(account: AccountNow, _: Snapshot) -> str:
    return f"{account.slots_taken} of {account.slots}"


_one_decimal = "{:.1f}".format
_thousands = "{:,}".format
LATE_JOBS = _Table("LATE JOBS", lambda snapshot: snapshot.late, _field("id"), {
    "account": _field("account"), "late": _duration("late_seconds"),
    "past deadline": _duration("past_deadline_seconds"), "why": _field("why"),
})  # fmt: skip
TABLES = (
    _Table("TROUBLES", lambda snapshot: snapshot.troubles, _field("code"), {
        "": _field("text"), "what to do": _field("command"),
    }, alarming=True),
    _Table("ACCOUNTS", lambda snapshot: sorted(snapshot.accounts, key=lambda account: account.reason is None),
        _field("account"), {
        "per second": _field("used", _one_decimal), "of": _rate, "free now": _field("left"),
        "ordered": _ordered, "slots": _slots, "held for": _since("since"), "next try": _until("until"),
        "state": _field("reason", "HELD: {}".format, missing="open"),
    }),
    _Table("HELD HOSTS", lambda snapshot: snapshot.hosts, _field("host"), {
        "held for": _since("since"), "next try": _until("until"), "why": _field("reason"),
    }, alarming=True),
    _Table("LOST CLAIMS", lambda snapshot: snapshot.claims, lambda claim, _: f"{claim.what} {claim.id}", {
        "its lease": _lease, "its process": _holder,
    }, alarming=True),
    LATE_JOBS,
    _Table("PAST DEADLINE", lambda snapshot: snapshot.overdue, _field("id"), {
        "account": _field("account"), "for": _duration("past_deadline_seconds"),
        "polled in": _duration("asked_in_seconds"),
    }),
    _Table("NOT STORED", lambda snapshot: snapshot.unstored, _field("code", missing="no error"), {
        "outputs": lambda group, snapshot: f"{group.count:,}{'+' if snapshot.unstored_more else ''}",
        "oldest": _duration("oldest_seconds"), "of job": _field("job_id"), "next try": _field("next_seconds", _in),
        "host": _field("host"), "last error": _field("message", missing=""),
    }),
    _Table("DOWNLOADS", lambda snapshot: snapshot.transfers, _field("output_id"), {
        "job": _field("job_id"), "age": _duration("age_seconds"), "bytes": _field("bytes", format_bytes),
        "per second": _field("bytes_per_second", format_bytes), "attempt": _field("attempts"), "host": _field("host"),
    }),
    _Table("LATE WEBHOOKS", lambda snapshot: snapshot.webhooks, _field("receiver"), {
        "events": _field("count", _thousands), "oldest": _duration("late_seconds"), "attempts": _field("attempts"),
        "HTTP": _field("http_status"), "last error": _field("message", missing=""),
    }),
    _Table("LAST FAILURES", lambda snapshot: snapshot.failures, _field("id"), {
        "account": _field("account"), "kind": _field("kind"), "code": _field("code"), "ago": _since("at"),
    }),
    _Table("READY TO SEEN", lambda snapshot: snapshot.kinds, _field("account"), {
        "kind": _field("kind"), "jobs": _field("jobs", _thousands), "p50": _duration("delay_p50"),
        "p95": _duration("delay_p95"), "polls per job": _field("polls_per_job", _one_decimal),
        "({period})": lambda kind, _: "",
    }),
)  # fmt: skip
