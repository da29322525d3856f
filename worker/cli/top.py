"""The command `top`: renders the live snapshot of `worker.operations.snapshot` in a terminal."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from worker.operations.overview import HEALTHY_SECONDS
from worker.operations.snapshot import NO_WORKER, Snapshot
from worker.operations.snapshot_reader import SnapshotReader
from worker.settings import load
from worker.store.engine import engine_for
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
    return [section(snapshot) for section in SECTIONS]


def _accounts(snapshot: Snapshot) -> Section:
    rows = [
        (
            account.account,
            _or_dash(account.used, "{:.1f}".format),
            f"{account.rps:g}" + ("" if account.ceiling is None else f" (learned: {account.ceiling:g})"),
            _or_dash(account.left, str),
            _since(account.since, snapshot.at),
            _in(account.until, snapshot.at),
            "open" if account.reason is None else f"HELD: {account.reason}",
        )
        for account in sorted(snapshot.accounts, key=lambda account: account.reason is None)
    ]
    return Section("ACCOUNTS", ("per second", "of", "free now", "held for", "next try", "state"), rows)


def _held_hosts(snapshot: Snapshot) -> Section:
    at = snapshot.at
    rows = [(host.host, _since(host.since, at), _in(host.until, at), host.reason) for host in snapshot.hosts]
    return Section("HELD HOSTS", ("held for", "next try", "why"), rows, alarming=True)


def _lost_claims(snapshot: Snapshot) -> Section:
    rows = []
    for claim in snapshot.claims:
        ended, seconds = claim.over_seconds > 0, format_duration(abs(claim.over_seconds))
        state = "is dead" if claim.dead else "is silent" if ended else "has held it longer than any work takes"
        lease = f"ended {seconds} ago" if ended else f"ends in {seconds}"
        rows.append((f"{claim.what} {claim.id}", lease, f"{claim.holder} {state}"))
    return Section("LOST CLAIMS", ("its lease", "its process"), rows, alarming=True)


def _late_jobs(snapshot: Snapshot) -> Section:
    rows = [
        (
            str(job.id),
            job.account,
            format_duration(job.late_seconds),
            _or_dash(job.past_deadline_seconds, format_duration),
            job.why,
        )
        for job in snapshot.late
    ]
    count = snapshot.late_count
    return Section("LATE JOBS", ("account", "late", "past deadline", "why"), rows, count=count.count, more=count.more)


def _overdue_jobs(snapshot: Snapshot) -> Section:
    rows = [
        (str(job.id), job.account, format_duration(job.past_deadline_seconds), format_duration(job.asked_in_seconds))
        for job in snapshot.overdue
    ]
    return Section("PAST DEADLINE", ("account", "for", "polled in"), rows)


def _unstored(snapshot: Snapshot) -> Section:
    rows = [
        (
            group.code or "no error",
            f"{group.count:,}{'+' if snapshot.unstored_more else ''}",
            format_duration(group.oldest_seconds),
            str(group.job_id),
            _in_seconds(group.next_seconds),
            group.host or "-",
            group.message or "",
        )
        for group in snapshot.unstored
    ]
    return Section("NOT STORED", ("outputs", "oldest", "of job", "next try", "host", "last error"), rows)


def _downloads(snapshot: Snapshot) -> Section:
    rows = [
        (
            str(transfer.output_id),
            str(transfer.job_id),
            _or_dash(transfer.age_seconds, format_duration),
            _or_dash(transfer.bytes, format_bytes),
            _or_dash(transfer.bytes_per_second, format_bytes),
            str(transfer.attempts),
            transfer.host,
        )
        for transfer in snapshot.transfers
    ]
    return Section("DOWNLOADS", ("job", "age", "bytes", "per second", "attempt", "host"), rows)


def _late_webhooks(snapshot: Snapshot) -> Section:
    rows = [
        (
            webhook.receiver,
            f"{webhook.count:,}",
            format_duration(webhook.late_seconds),
            str(webhook.attempts),
            str(webhook.http_status or "-"),
            webhook.message or "",
        )
        for webhook in snapshot.webhooks
    ]
    return Section("LATE WEBHOOKS", ("events", "oldest", "attempts", "HTTP", "last error"), rows)


def _failures(snapshot: Snapshot) -> Section:
    rows = [(str(job.id), job.account, job.kind, job.code, _since(job.at, snapshot.at)) for job in snapshot.failures]
    return Section("LAST FAILURES", ("account", "kind", "code", "ago"), rows)


def _ready_to_seen(snapshot: Snapshot) -> Section:
    seconds = snapshot.kinds_seconds
    period = "since counting began" if seconds is None else f"the last {format_duration(seconds)}"
    rows = [
        (
            kind.account,
            kind.kind,
            f"{kind.jobs:,}",
            _or_dash(kind.delay_p50, format_duration),
            _or_dash(kind.delay_p95, format_duration),
            _or_dash(kind.polls_per_job, "{:.1f}".format),
            "",
        )
        for kind in snapshot.kinds
    ]
    return Section("READY TO SEEN", ("kind", "jobs", "p50", "p95", "polls per job", f"({period})"), rows)


SECTIONS = (
    *(_accounts, _held_hosts, _lost_claims, _late_jobs, _overdue_jobs, _unstored, _downloads, _late_webhooks),
    *(_failures, _ready_to_seen),
)


def _or_dash(value: float | None, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


def _since(moment: datetime | None, now: datetime) -> str:
    return "-" if moment is None else format_duration((now - moment).total_seconds())


def _in(moment: datetime | None, now: datetime) -> str:
    return "-" if moment is None else _in_seconds((moment - now).total_seconds())


def _in_seconds(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds > 0 else f"due for {format_duration(-seconds)}"
