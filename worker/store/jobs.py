"""Jobs: put in once, looked up, listed, cancelled, retried, nudged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, bindparam, case, func, or_, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite

from worker.core.identity import FetchAddress
from worker.core.lifecycle import FINAL_STATES, PRUNED, left_out_note
from worker.core.pacing.policy import PollPlan
from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, JSON_BATCH_ROWS, batch_columns, batch_parameter
from worker.store.counters import Tally
from worker.store.job_values import clear_end
from worker.store.late_looks import delete_looks
from worker.store.listing import insert_outputs
from worker.store.promises import add_promises, clear_promised_end, reset_promises
from worker.store.schema import MYSQL_FAMILY, jobs, outputs, promises, waiting_account
from worker.store.sql_functions import HAS_DUE_TIME

MAX_ID = 2**63 - 1  # what the databases' integers hold
NUDGED_MOST = 100  # a reference that more jobs share says little about any of them
SAME_JOB = ("account", "fetch_base", "remote_id")
OUT_OF_ORDER = timedelta(minutes=10)  # how long a slow transaction may hold back its commit
IDENTITY = (jobs.c.account, jobs.c.fetch_base, jobs.c.remote_id)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be put in. Times are aware; `due_at` is when it is asked about first."""

    account: str
    remote_id: str
    address: FetchAddress
    kind: str
    priority: int
    reference: str | None
    on_done: str | None
    eta: float | None
    submitted_at: datetime
    deadline_at: datetime
    due_at: datetime
    outputs: tuple[Link, ...] = ()
    left_out: int = 0  # outputs that the answer listed beyond these
    promised: tuple[str, ...] = ()  # addresses where outputs are to appear
    plan: PollPlan = PollPlan(0.0)  # noqa: RUF009  # a tuple
    webhook_url: str | None = None
    default_address: bool = False  # the address is that of SD_API_URL

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes two calls be about the same job: account, fetch address without the id, remote id."""
        return (self.account, self.address.base, self.remote_id)


def insert_jobs(connection: Connection, new: Sequence[NewJob], *, now: datetime) -> list[tuple[int, bool]]:
    """Puts jobs in, each once: (id, whether it is new) in the order given. A job that is there stays as it is."""
    wanted = {job.identity: job for job in new}
    created: dict[tuple[str, str, str], int] = {}
    # Always in the same order: two batches with the same jobs could block each other for good.
    rows = [_job_row(wanted[identity], now) for identity in sorted(wanted)]
    size = JSON_BATCH_ROWS if connection.dialect.name == "postgresql" else INSERT_ROWS
    for start in range(0, len(rows), size):
        created |= _insert_missing(connection, rows[start : start + size])
    known = created | _ids(connection, [identity for identity in wanted if identity not in created])
    ready = [(known[identity], job.outputs) for identity, job in wanted.items() if identity in created and job.outputs]
    insert_outputs(connection, ready, now=now, queued=False)
    add_promises(
        connection, {created[identity]: wanted[identity].promised for identity in created if wanted[identity].promised}
    )
    tally = Tally()
    for identity in sorted(created):
        if wanted[identity].left_out:
            tally.left_out(wanted[identity].account, wanted[identity].left_out)
    tally.write(connection)
    first = dict.fromkeys(created, True)
    return [(known[job.identity], first.pop(job.identity, False)) for job in new]


def _job_row(job: NewJob, now: datetime) -> dict[str, Any]:
    return {
        "account": job.account,
        "remote_id": job.remote_id,
        "kind": job.kind,
        "fetch_url": job.address.url,
        "fetch_base": job.address.base,
        "fetch_host": job.address.host,
        "default_address": job.default_address,
        "status": "downloading" if job.outputs else "pending",
        "priority": job.priority,
        "reference": job.reference,
        "on_done": job.on_done,
        "webhook_url": job.webhook_url,
        "eta": job.eta,
        "submitted_at": job.submitted_at,
        "tracked_at": now,
        "deadline_at": job.deadline_at,
        "deadline_seconds": (job.deadline_at - job.submitted_at).total_seconds(),
        "due_at": None if job.outputs else job.due_at,
        "ready_at": now if job.outputs else None,
        "pace_scale": job.plan.scale,
        "pace_growth": job.plan.growth,
        "error_message": left_out_note(len(job.outputs), job.left_out) if job.left_out else None,
    }


def readdress(connection: Connection, ids: Sequence[int], base: str, host: str) -> set[int]:
    """Move those of these jobs to the base address `base` whose address was that of SD_API_URL; their ids.

    A job stays where it is if another one is at its new address already. The ids include jobs that were moved before.
    """
    mine = and_(jobs.c.id.in_(sorted(ids)), jobs.c.default_address.is_(True))
    rows = connection.execute(
        select(jobs.c.id, jobs.c.account, jobs.c.remote_id, jobs.c.fetch_base).where(mine).order_by(jobs.c.id)
    ).all()
    there = _ids(connection, [(row.account, base, row.remote_id) for row in rows]) if rows else {}
    moved: set[int] = set()
    for row in rows:
        if row.fetch_base != base:
            if (row.account, base, row.remote_id) in there:
                continue
            address = {"fetch_url": f"{base}/{row.remote_id}", "fetch_base": base, "fetch_host": host}
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(**address))
        moved.add(row.id)
    return moved


def _insert_missing(connection: Connection, rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], int]:
    statement: Any
    parameters: dict[str, Any] = {}
    match connection.dialect.name:
        case "postgresql":
            first = rows[0]
            differ = tuple(
                name for name in first if name == "remote_id" or any(row[name] != first[name] for row in rows)
            )
            same = tuple(name for name in first if name not in differ)
            statement = _insert_new(differ, same)
            parameters = batch_parameter(differ, rows) | {f"same_{name}": first[name] for name in same}
        case "sqlite":
            new = sqlite.insert(jobs).values(rows).on_conflict_do_nothing(index_elements=SAME_JOB)
            statement = new.returning(jobs.c.id, *IDENTITY)
        case _:
            return _insert_missing_mysql(connection, rows)
    found = connection.execute(statement, parameters).all()
    return {(account, base, remote_id): job_id for job_id, account, base, remote_id in found}


@cache
def _insert_new(differ: tuple[str, ...], same: tuple[str, ...]) -> Any:
    """Jobs that are handed over together have most columns in common: those travel once."""
    fresh = batch_columns(jobs, differ)
    values = [fresh[name] for name in differ]
    values += [bindparam(f"same_{name}", type_=jobs.c[name].type).label(name) for name in same]
    new = postgresql.insert(jobs).from_select([*differ, *same], select(*values))
    return new.on_conflict_do_nothing(index_elements=SAME_JOB).returning(jobs.c.id, *IDENTITY)


def _insert_missing_mysql(connection: Connection, rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], int]:
    created = {}
    for row in rows:
        done = connection.execute(mysql.insert(jobs).prefix_with("IGNORE").values(row))
        if done.rowcount:
            created[(row["account"], row["fetch_base"], row["remote_id"])] = int(done.lastrowid)
    return created


def _ids(connection: Connection, identities: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], int]:
    """Return the ids of these jobs, which are all there.

    In a caller's own transaction MariaDB may show a snapshot that is older than a job that another one has put in.
    Only a locking read finds that job.
    """
    ids = _visible_ids(connection, identities)
    hidden = [identity for identity in identities if identity not in ids]
    return ids | _visible_ids(connection, hidden, locking=True) if hidden else ids


def _visible_ids(
    connection: Connection, identities: Sequence[tuple[str, str, str]], *, locking: bool = False
) -> dict[tuple[str, str, str], int]:
    ids: dict[tuple[str, str, str], int] = {}
    for start in range(0, len(identities), INSERT_ROWS):
        same = [
            and_(jobs.c.account == account, jobs.c.fetch_base == base, jobs.c.remote_id == remote_id)
            for account, base, remote_id in identities[start : start + INSERT_ROWS]
        ]
        query = select(jobs.c.id, jobs.c.account, jobs.c.fetch_base, jobs.c.remote_id).where(or_(*same))
        rows = connection.execute(query.with_for_update(read=True) if locking else query)
        ids |= {(row.account, row.fetch_base, row.remote_id): row.id for row in rows}
    return ids


# ── looking up ────────────────────────────────────────────────────────────────────────────────────────────────────────


def job_row(connection: Connection, job_id: int) -> Row[Any] | None:
    """The whole row of one job, or None."""
    if not 0 < job_id <= MAX_ID:
        return None
    return connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()


def jobs_by_remote(connection: Connection, remote_id: str, account: str | None) -> Sequence[Row[Any]]:
    """All jobs with this remote id (families may share ids), newest first."""
    query = select(jobs).where(jobs.c.remote_id == remote_id).order_by(jobs.c.id.desc())
    return connection.execute(query if account is None else query.where(jobs.c.account == account)).all()


def outputs_of(connection: Connection, job_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """The outputs of these jobs, by job and position."""
    query = select(outputs).where(outputs.c.job_id.in_(job_ids)).order_by(outputs.c.job_id, outputs.c.position)
    return connection.execute(query).all()


def count_by_state(connection: Connection) -> dict[str, int]:
    """How many jobs there are in each state. It counts in indexes, since there may be millions.

    Jobs that are due to be asked about are pending, or downloading and in want of fresh links.
    """
    rest = select(jobs.c.status, func.count()).where(jobs.c.status != "pending").group_by(jobs.c.status)
    found = {row[0]: row[1] for row in connection.execute(rest)}
    due = select(func.count()).select_from(jobs).where(HAS_DUE_TIME)
    renewing = due.where(jobs.c.status == "downloading")
    pending = connection.execute(due).scalar_one() - connection.execute(renewing).scalar_one()
    return found | ({"pending": pending} if pending else {})


def waiting_accounts(connection: Connection) -> list[str]:
    """Return the accounts that have jobs with a due time, in order. The query leaps through the index."""
    query = _WAITING_ACCOUNTS_MYSQL if connection.dialect.name in MYSQL_FAMILY else _WAITING_ACCOUNTS
    return sorted(set(connection.execute(query).scalars()))


def _waiting_accounts() -> Select[Any]:
    waiting = jobs.c.due_at.is_not(None)
    first = select(func.min(jobs.c.account).label("account")).where(waiting).cte("accounts", recursive=True)
    following = select(func.min(jobs.c.account)).where(waiting, jobs.c.account > first.c.account).scalar_subquery()
    accounts = first.union_all(select(following).where(first.c.account.is_not(None)))
    return select(accounts.c.account).where(accounts.c.account.is_not(None))


_WAITING_ACCOUNTS = _waiting_accounts()
_WAITING_ACCOUNTS_MYSQL = (  # grouped by all these columns the server reads one entry of the index per group
    select(waiting_account, jobs.c.priority, jobs.c.fetch_host, func.min(jobs.c.due_at))
    .where(HAS_DUE_TIME)
    .group_by(waiting_account, jobs.c.priority, jobs.c.fetch_host)
)


def first_tracked(connection: Connection, moment: datetime) -> int:
    """Return about the first id of the jobs tracked at this moment or later. Halving the ids reads a few rows.

    Ids follow the time of tracking, but a slow transaction may be out of order by up to `OUT_OF_ORDER`.
    """
    low, last = connection.execute(select(func.min(jobs.c.id), func.max(jobs.c.id))).one()
    if last is None:
        return 0
    high = int(last) + 1
    while low < high:
        middle = (low + high) // 2
        following = select(jobs.c.id, jobs.c.tracked_at).where(jobs.c.id >= middle).order_by(jobs.c.id).limit(1)
        row = connection.execute(following).one_or_none()
        if row is not None and row.tracked_at < moment:
            low = row.id + 1
        else:
            high = middle
    return int(low)


def measured_durations(connection: Connection, *, limit: int) -> list[tuple[float, float | None, str, float | None]]:
    """The last jobs that were polled to their end: (submitted, duration, kind, eta), in seconds, the first at 0.

    A job was ready some time between its last two answers; the middle is taken. One that expired never was.
    """
    query = (
        select(jobs.c.submitted_at, jobs.c.not_ready_at, jobs.c.ready_at, jobs.c.kind, jobs.c.eta, jobs.c.eta_at)
        .where(jobs.c.polls > 0, or_(jobs.c.ready_at.is_not(None), jobs.c.status == "expired"))
        .order_by(jobs.c.id.desc())
        .limit(limit)
    )
    rows = sorted(connection.execute(query).all(), key=lambda row: row.submitted_at)
    return [
        (
            (row.submitted_at - rows[0].submitted_at).total_seconds(),
            None if row.ready_at is None else _middle(row.submitted_at, row.not_ready_at, row.ready_at),
            row.kind,
            row.eta if row.eta_at is None else None,
        )
        for row in rows
    ]


def _middle(submitted_at: datetime, not_ready_at: datetime | None, ready_at: datetime) -> float:
    last = submitted_at if not_ready_at is None else min(not_ready_at, ready_at)
    return max(0.0, ((last - submitted_at) + (ready_at - submitted_at)).total_seconds() / 2)


# ── acting ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def nudge(connection: Connection, remote_id: str, account: str | None, *, now: datetime, least: timedelta) -> int:
    """Brings the next request about all jobs with this remote id forward; how many that were."""
    found = [row for row in jobs_by_remote(connection, remote_id, account) if row.status == "pending"]
    return _bring_forward(connection, found, now=now, least=least)


def nudge_reference(connection: Connection, reference: str, *, now: datetime, least: timedelta) -> int:
    """The same for the jobs with this reference; of very many the newest."""
    query = select(jobs.c.id, jobs.c.asked_at).where(jobs.c.reference == reference, jobs.c.status == "pending")
    found = connection.execute(query.order_by(jobs.c.id.desc()).limit(NUDGED_MOST)).all()
    return _bring_forward(connection, found, now=now, least=least)


def _bring_forward(connection: Connection, found: Iterable[Any], *, now: datetime, least: timedelta) -> int:
    moved = 0
    for row in found:
        due = now if row.asked_at is None else max(now, row.asked_at + least)
        done = connection.execute(
            update(jobs)
            .where(
                jobs.c.id == row.id,
                jobs.c.status == "pending",
                jobs.c.claim_token.is_(None),
                jobs.c.held_at.is_(None),
                jobs.c.due_at > due,
            )
            .values(due_at=due, pace_scale=None, pace_growth=None)
        )
        moved += done.rowcount
    return moved


def cancel(connection: Connection, job_id: int, tally: Tally, *, now: datetime) -> bool:
    """Cancels a job that is not final: its unstored outputs end, stored files stay. False where it changed nothing.

    The caller writes the tally, as the last thing of its transaction.
    """
    return bool(cancel_all(connection, [job_id], tally, now=now))


def cancel_all(connection: Connection, job_ids: Iterable[int], tally: Tally, *, now: datetime) -> set[int]:
    """The same for some hundred jobs at once; the ids of those it changed."""
    unfinished = select(jobs.c.id, jobs.c.account, jobs.c.kind)
    unfinished = unfinished.where(jobs.c.id.in_(list(job_ids)), jobs.c.status.not_in(FINAL_STATES))
    rows = connection.execute(unfinished.order_by(jobs.c.id).with_for_update()).all()
    if not rows:
        return set()
    ids = {row.id for row in rows}
    free = {"due_at": None, "claim_token": None, "claim_holder": None}
    connection.execute(
        update(jobs).where(jobs.c.id.in_(ids)).values(status="cancelled", completed_at=now, held_at=None, **free)
    )
    cancel_outputs(connection, outputs.c.job_id.in_(ids))
    for row in rows:
        tally.finished(row.account, row.kind, "cancelled")
    return ids


def cancel_outputs(connection: Connection, which: ColumnElement[bool]) -> int:
    """End the outputs that still wait, of cancelled jobs; return how many. Stored files stay."""
    cancelled = {"status": "failed", "error_code": "cancelled", "error_message": "the job was cancelled"}
    free = {"due_at": None, "claim_token": None, "claim_holder": None}
    waiting = update(outputs).where(which, outputs.c.status == "pending")
    return connection.execute(waiting.values(**cancelled, **free)).rowcount


def fresh_output(now: datetime) -> dict[str, Any]:
    """The values of an output that is to be tried as if it had just been listed; its attempts are kept."""
    return {
        "status": "pending",
        "due_at": now,
        "queued_at": None,
        "listed_at": now,
        "bad_bodies": 0,
        "dead_since": None,
        "dead_attempts": 0,
        "renewed": False,
        "error_code": None,
        "error_message": None,
    }


def retry(connection: Connection, job_id: int, *, now: datetime) -> bool:
    """Takes a failed or expired job up again, at once and with its whole deadline. False where it changed nothing."""
    return bool(retry_all(connection, [job_id], now=now))


def retry_all(connection: Connection, job_ids: Iterable[int], *, now: datetime) -> set[int]:
    """The same for some hundred jobs at once; the ids of those it changed."""
    ended = select(jobs.c.id, jobs.c.deadline_seconds)
    ended = ended.where(jobs.c.id.in_(list(job_ids)), jobs.c.status.in_(("failed", "expired")))
    locked = connection.execute(ended.order_by(jobs.c.id).with_for_update()).all()
    pruned = select(outputs.c.job_id).where(
        outputs.c.job_id.in_([row.id for row in locked]), outputs.c.error_code == PRUNED
    )
    going = set(connection.execute(pruned).scalars())  # their files are being removed
    rows = [row for row in locked if row.id not in going]
    if not rows:
        return set()
    ids = {row.id for row in rows}
    reset_promises(connection, sorted(ids))
    failed = (outputs.c.job_id.in_(ids), outputs.c.status == "failed")
    renewed = set(connection.execute(select(outputs.c.job_id).where(*failed)).scalars())
    connection.execute(update(outputs).where(*failed).values(fresh_output(now)))
    delete_looks(connection, ids)
    alike: dict[tuple[bool, float], list[int]] = {}
    for row in rows:
        alike.setdefault((row.id in renewed, row.deadline_seconds), []).append(row.id)
    for (downloading, deadline_seconds), some in alike.items():
        connection.execute(
            update(jobs)
            .where(jobs.c.id.in_(some))
            .values(
                status="downloading" if downloading else "pending",
                due_at=None if downloading else now,
                pace_scale=None,
                pace_growth=None,
                deadline_at=now + timedelta(seconds=deadline_seconds),
                **clear_end(),
                failed_answers=0,
                unknown_answers=0,
                error_answers=0,
                empty_answers=0,
                struck_at=None,
            )
        )
    return ids


def finish_job_if_done(connection: Connection, job_id: int, tally: Tally, *, now: datetime) -> str | None:
    """End a job whose outputs are all final; return its final state, or None where it is not there yet.

    Where its outputs were promised links, and none of them brought anything, the job ends as it would have without
    them. A job without any outputs has lost them, and ends as failed: `retry` asks the API for them again. The caller
    holds the job's row, knows that it is being downloaded, and writes the tally.
    """
    of_job = [select(column).where(jobs.c.id == job_id).scalar_subquery() for column in (jobs.c.account, jobs.c.kind)]
    saved = (promises.c.end_status, promises.c.end_code, promises.c.end_message)
    of_promise = [select(column).where(promises.c.job_id == job_id).scalar_subquery() for column in saved]
    total, stored, waiting, account, kind, end_status, end_code, end_message = connection.execute(
        select(
            func.count(),
            _count(outputs.c.status == "stored"),
            _count(outputs.c.status == "pending"),
            *of_job,
            *of_promise,
        ).where(outputs.c.job_id == job_id)
    ).one()
    if waiting:
        return None
    if end_status is not None and stored:
        clear_promised_end(connection, job_id)
        delete_looks(connection, [job_id])  # planned for the case that it expires
    values: dict[str, Any] = {"error_code": None}  # its message stays: it may say that outputs were left out
    status = "completed"
    if end_status is not None and not stored:
        status = end_status  # it never was ready
        values = {"error_code": end_code, "error_message": end_message, "ready_at": None}
    elif not total:
        status, message = "failed", "its outputs are missing in the database; `retry` asks for them again"
        values = {"error_code": "no_output", "error_message": message}
    elif total != stored:
        status, message = "failed", f"{total - stored} of {total} outputs could not be stored"
        values = {"error_code": "output_failed", "error_message": message}
    free = {"due_at": None, "claim_token": None, "claim_holder": None}
    connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(status=status, completed_at=now, **free, **values)
    )
    tally.finished(account, kind, status)
    return status


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)
