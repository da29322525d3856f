"""The command `top`: the live snapshot of `worker.operations.snapshot`, drawn in a terminal."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from worker.cli.output import json_option, moment, print_json
from worker.core.display import display_text
from worker.core.humanize import format_bytes, format_duration
from worker.errors import WorkerError
from worker.operations.overview import HEALTHY_SECONDS
from worker.operations.snapshot import (
    NO_WORKER,
    AccountNow,
    Frame,
    LateJob,
    LostClaim,
    Overdue,
    SnapshotReader,
    Transfer,
    Unstored,
)
from worker.settings import load
from worker.store.engine import engine_for
from worker.system.terminal import cell, make_console

FILE_LINES = 1_000  # where nobody watches, nothing is cut but what is cut by `worker.operations.snapshot`
GAP = "  "


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the frame. Its title stands over the first column, `columns` over the others."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    alarming: bool = False  # red
    count: int = 0  # where there are more than `rows`
    more: bool = False  # and more than could be counted

    @property
    def least(self) -> int:
        """The lines that show anything of it: the title, a row, and how many more there are."""
        return min(max(len(self.rows), self.count), 2) + 1

    @property
    def most(self) -> int:
        """The lines that show all there is to show of it."""
        return 1 + len(self.rows) + (self.count > len(self.rows))


@click.command()
@click.option("--every", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, metavar="SECONDS",
              help="How often it is read anew.")  # fmt: skip
@click.option("--once", is_flag=True, help="One frame, as it is where stdout is no terminal.")
@json_option
def top(every: float, once: bool, as_json: bool) -> int:
    """Watch everything that goes on: rates, holds, late work, downloads, troubles. `q` ends it."""
    settings = load()
    watcher = SnapshotReader(engine_for(settings.database), settings)
    console = make_console(height=FILE_LINES)
    if as_json:
        print_json(document(watcher.frame()))
    elif once or not console.is_terminal:
        console.print(drawn(watcher.frame(), console.width, console.height - 1), soft_wrap=True)
    else:
        _watch(watcher, console, every)
    return 0


def document(frame: Frame) -> dict[str, Any]:
    """A frame as JSON takes it: jobs by state, `jobs_more` names the states with more than could be counted."""
    told = asdict(frame)
    told["late_count"], told["late_more"] = frame.late_count.count, frame.late_count.more
    told["jobs"] = {one.state: one.count for one in frame.jobs}
    told["jobs_more"] = [one.state for one in frame.jobs if one.more]
    plain: dict[str, Any] = _plain(told)
    return plain


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return moment(value)
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


# ── watching ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _watch(watcher: SnapshotReader, console: Console, every: float) -> None:
    frame = watcher.frame()  # where this can't be had, there is nothing to watch
    trouble = None
    try:
        with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as shown:
            while True:
                shown.update(drawn(frame, console.width, console.height, trouble), refresh=True)
                if pressed(every):
                    return
                try:
                    frame, trouble = watcher.frame(), None
                except WorkerError as away:
                    trouble = str(away)
    except KeyboardInterrupt:
        return


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds, and is true as soon as `q` is pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    tty.setcbreak(handle)
    try:
        yield lambda seconds: _ended(handle, seconds)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _ended(handle: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([handle], [], [], left)
        if ready:
            typed = os.read(handle, 64)
            if not typed or b"q" in typed.lower():
                return True
    return False


# ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(frame: Frame, width: int, height: int, trouble: str | None = None) -> Group:
    """A frame in a terminal of this size: the most important first, each part cut to what there is room for."""
    lines = [*_head(frame, trouble)]
    parts = [section for section in _sections(frame) if section.rows]
    for section, room in zip(parts, _rooms(parts, height - len(lines)), strict=True):
        lines += _lines(section, room, width)
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(*lines[:height])


def _head(frame: Frame, trouble: str | None) -> Iterator[Text]:
    asked = "never" if frame.asked_seconds is None else f"{format_duration(frame.asked_seconds)} ago"
    line = Text(f"fetch-worker {frame.at:%H:%M:%S} UTC", style="bold")
    silent = frame.asked_seconds is None or frame.asked_seconds > HEALTHY_SECONDS
    if silent and any(job.why == NO_WORKER for job in frame.late):
        line.append(f"{GAP}NO WORKER ASKS", style="bold red")
    line.append(f"{GAP}last request {asked}, {frame.asking:,} under way", style="not bold")
    yield line
    counts = [f"{one.count:,}{'+' if one.more else ''} {one.state}" for one in frame.jobs if one.count]
    line = Text(GAP.join(counts) or "no jobs yet")
    if frame.claims or frame.late or frame.overdue or frame.unstored:
        line.append(f"{GAP}(`fetch-worker show ID`: why, and what to do)", style="dim")
    yield line
    if trouble is not None:
        yield cell(trouble, "bold red")
    if not frame.budget_known:
        yield Text("Redis is away: what is left of the budget is not known", style="red")


def _rooms(parts: Sequence[Section], height: int) -> list[int]:
    """How many lines each part gets: a title each; then, in order, what shows anything of it; then evenly."""
    rooms = [1 for _ in parts]
    left = height - len(parts)
    for place, part in enumerate(parts):
        if part.least - 1 <= left:
            rooms[place] = part.least
            left -= part.least - 1
    while left > 0:
        short = [place for place, part in enumerate(parts) if part.least <= rooms[place] < part.most]
        if not short:
            break
        for place in short[:left]:
            rooms[place] += 1
        left -= len(short[:left])
    return rooms


def _lines(section: Section, room: int, width: int) -> list[Text]:
    count = max(len(section.rows), section.count)
    shown = section.rows[:count] if room > count else section.rows[: max(room - 2, 0)]
    table = [(section.title, *section.columns), *shown]
    cells = [[display_text(text) for text in row] for row in table]
    widths = [max(cell_len(row[place]) for row in cells) for place in range(len(cells[0]))]
    style = "bold red" if section.alarming else "bold"
    lines = [Text(_joined(row, widths), style=style if not place else "") for place, row in enumerate(cells)]
    more = f"… and {count - len(shown):,}{'+' if section.more else ''} more"
    if room == 1:
        return [Text(f"{section.title} {more}", style=style)]
    return lines if len(shown) == count else [*lines, Text(more, style="dim")]


def _joined(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
    return GAP.join(padded).rstrip()


def _sections(frame: Frame) -> list[Section]:
    """The parts, the most important first; of troubles before what goes well."""
    told = "since counting began" if frame.kinds_seconds is None else f"the last {format_duration(frame.kinds_seconds)}"
    at = frame.at
    return [
        Section(
            "ACCOUNTS",
            ("per second", "of", "free now", "held for", "next try", "state"),
            [_account_row(one, at) for one in sorted(frame.accounts, key=lambda one: one.reason is None)],
        ),
        Section(
            "HELD HOSTS",
            ("held for", "next try", "why"),
            [(one.host, _since(one.since, at), _in(one.until, at), one.reason) for one in frame.hosts],
            alarming=True,
        ),
        Section("LOST CLAIMS", ("its lease", "its process"), [_claim_row(one) for one in frame.claims], True),
        Section(
            "LATE JOBS",
            ("account", "late", "past deadline", "why"),
            [_late_row(one) for one in frame.late],
            count=frame.late_count.count,
            more=frame.late_count.more,
        ),
        Section("PAST DEADLINE", ("account", "for", "asked in"), [_overdue_row(one) for one in frame.overdue]),
        Section(
            "NOT STORED",
            ("outputs", "oldest", "of job", "next try", "host", "last said"),
            [_unstored_row(one, frame.unstored_more) for one in frame.unstored],
        ),
        Section(
            "DOWNLOADS",
            ("job", "age", "bytes", "per second", "attempt", "host"),
            [_transfer_row(one) for one in frame.transfers],
        ),
        Section(
            "LATE WEBHOOKS",
            ("events", "oldest", "attempts", "HTTP", "last said"),
            [
                (
                    one.receiver,
                    f"{one.count:,}",
                    format_duration(one.late_seconds),
                    str(one.attempts),
                    str(one.http_status or "-"),
                    one.message or "",
                )
                for one in frame.webhooks
            ],
        ),
        Section(
            "LAST FAILURES",
            ("account", "kind", "code", "ago"),
            [
                (str(one.id), one.account, one.kind, one.code, format_duration((at - one.at).total_seconds()))
                for one in frame.failures
            ],
        ),
        Section(
            "READY TO SEEN",
            ("kind", "jobs", "p50", "p95", "polls per job", f"({told})"),
            [
                (
                    one.account,
                    one.kind,
                    f"{one.jobs:,}",
                    _or_dash(one.delay_p50, format_duration),
                    _or_dash(one.delay_p95, format_duration),
                    _or_dash(one.polls_per_job, lambda number: f"{number:.1f}"),
                    "",
                )
                for one in frame.kinds
            ],
        ),
    ]


def _account_row(one: AccountNow, now: datetime) -> Sequence[str]:
    ceiling = "" if one.ceiling is None else f" (it took {one.ceiling:g})"
    return (
        one.account,
        _or_dash(one.used, lambda number: f"{number:.1f}"),
        f"{one.rps:g}{ceiling}",
        "-" if one.left is None else str(one.left),
        _since(one.since, now),
        _in(one.until, now),
        "open" if one.reason is None else f"HELD: {one.reason}",
    )


def _claim_row(one: LostClaim) -> Sequence[str]:
    over = (
        f"over for {format_duration(one.over_seconds)}"
        if one.over_seconds > 0
        else f"ends in {format_duration(-one.over_seconds)}"
    )
    what = "is dead" if one.dead else "is silent" if one.over_seconds > 0 else "has it longer than any work takes"
    return (f"{one.what} {one.id}", over, f"{one.holder} {what}")


def _overdue_row(one: Overdue) -> Sequence[str]:
    return (str(one.id), one.account, format_duration(one.past_deadline_seconds), format_duration(one.asked_in_seconds))


def _late_row(one: LateJob) -> Sequence[str]:
    past = _or_dash(one.past_deadline_seconds, format_duration)
    return (str(one.id), one.account, format_duration(one.late_seconds), past, one.why)


def _unstored_row(one: Unstored, more: bool) -> Sequence[str]:
    next_try = (
        f"in {format_duration(one.next_seconds)}"
        if one.next_seconds > 0
        else f"due for {format_duration(-one.next_seconds)}"
    )
    count = f"{one.count:,}{'+' if more else ''}"
    oldest = (format_duration(one.oldest_seconds), str(one.job_id))
    return (one.code or "none yet", count, *oldest, next_try, one.host or "-", one.message or "")


def _transfer_row(one: Transfer) -> Sequence[str]:
    return (
        str(one.output_id),
        str(one.job_id),
        _or_dash(one.age_seconds, format_duration),
        _or_dash(one.bytes, format_bytes),
        _or_dash(one.bytes_per_second, format_bytes),
        str(one.attempts),
        one.host,
    )


def _or_dash(value: float | None, said: Any) -> str:
    return "-" if value is None else str(said(value))


def _since(moment: datetime | None, now: datetime) -> str:
    return "-" if moment is None else format_duration((now - moment).total_seconds())


def _in(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return "-"
    left = (moment - now).total_seconds()
    return f"in {format_duration(left)}" if left > 0 else f"due for {format_duration(-left)}"


COMMANDS: tuple[click.Command, ...] = (top,)
