"""Jobs: insert, look up, count, nudge, cancel, retry and finish them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, bindparam, case, func, or_, select, update
from sqlalchemy.dialects import mysql, postgresql, sqlite

from worker.core.humanize import format_count
from worker.core.identity import FetchAddress
from worker.core.lifecycle import FINAL_STATES, ORDER_STATES, PRUNED, left_out_note
from worker.core.pacing.policy import PollPlan
from worker.core.reply import Link
from worker.store.bulk_write import INSERT_ROWS, JSON_BATCH_ROWS, batch_columns, batch_parameter
from worker.store.counters import Tally
from worker.store.late_looks import delete_looks
from worker.store.new_outputs import insert_outputs
from worker.store.orders import close_cancelled, order_again
from worker.store.promises import add_promises, clear_promised_end, reset_promises
from worker.store.schema import MYSQL_FAMILY, jobs, outputs, promises, waiting_account
from worker.store.sql_functions import HAS_DUE_TIME
from worker.store.transitions import clear_end, fresh_output, job_ended, output_failed

MAX_ID = 2**63 - 1  # the largest integer in the databases
NUDGED_MOST = 100  # if more jobs share a reference, a nudge says little about any of them
SAME_JOB = ("account", "fetch_base", "remote_id")
OUT_OF_ORDER = timedelta(minutes=10)  # how long a slow transaction may hold back its commit
IDENTITY = (jobs.c.account, jobs.c.fetch_base, jobs.c.remote_id)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to insert. Times are aware; `due_at` is the time of the first poll."""

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
    promised: tuple[str, ...] = ()  # links at which outputs will appear
    plan: PollPlan = PollPlan(0.0)  # noqa: RUF009  # an immutable tuple
    webhook_url: str | None = None
    default_address: bool = False  # the address comes from SD_API_URL

    @property
    def identity(self) -> tuple[str, str, str]:
        """The account, the fetch address without the id, and the remote id. Equal for two calls about the same job."""
        return (self.account, self.address.base, self.remote_id)


def insert_jobs(connection: Connection, new_jobs: Sequence[NewJob], *, now: datetime) -> list[tuple[int, bool]]:
    """Insert jobs, and return (id, whether it was created) in the given order. An existing job is not changed."""
    jobs_by_identity = {job.identity: job for job in new_jobs}
    created: dict[tuple[str, str, str], int] = {}
    # All transactions insert in this order, so that two batches with the same jobs can't deadlock.
    rows = [_job_row(jobs_by_identity[identity], now) for identity in sorted(jobs_by_identity)]
    size = JSON_BATCH_ROWS if connection.dialect.name == "postgresql" else INSERT_ROWS
    for start in range(0, len(rows), size):
        created |= _insert_missing(connection, rows[start : start + size])
    ids = created | _ids(connection, [identity for identity in jobs_by_identity if identity not in created])
    links_by_job = [
        (ids[identity], job.outputs)
        for identity, job in jobs_by_identity.items()
        if identity in created and job.outputs
    ]
    insert_outputs(connection, links_by_job, now=now, queued=False)
    add_promises(
        connection,
        {
            created[identity]: jobs_by_identity[identity].promised
            for identity in created
            if jobs_by_identity[identity].promised
        },
    )
    tally = Tally()
    for identity in sorted(created):
        if jobs_by_identity[identity].left_out:
            tally.left_out(jobs_by_identity[identity].account, jobs_by_identity[identity].left_out)
    tally.write(connection)
    not_reported = dict.fromkeys(created, True)
    return [(ids[job.identity], not_reported.pop(job.identity, False)) for job in new_jobs]


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
    """Move jobs whose address came from SD_API_URL to the base address `base`, and return their ids.

    A job is not moved if another job has its new address. The ids include jobs that were moved before.
    """
    movable = and_(jobs.c.id.in_(sorted(ids)), jobs.c.default_address.is_(True))
    rows = connection.execute(
        select(jobs.c.id, jobs.c.account, jobs.c.remote_id, jobs.c.fetch_base).where(movable).order_by(jobs.c.id)
    ).all()
    existing = _ids(connection, [(row.account, base, row.remote_id) for row in rows]) if rows else {}
    moved: set[int] = set()
    for row in rows:
        if row.fetch_base != base:
            if (row.account, base, row.remote_id) in existing:
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
            insertion = sqlite.insert(jobs).values(rows).on_conflict_do_nothing(index_elements=SAME_JOB)
            statement = insertion.returning(jobs.c.id, *IDENTITY)
        case _:
            return _insert_missing_mysql(connection, rows)
    rows_created = connection.execute(statement, parameters).all()
    return {(account, base, remote_id): job_id for job_id, account, base, remote_id in rows_created}


@cache
def _insert_new(differ: tuple[str, ...], same: tuple[str, ...]) -> Any:
    """Return the INSERT statement for PostgreSQL. Values that are equal in all rows are sent only once."""
    batch = batch_columns(jobs, differ)
    values = [batch[name] for name in differ]
    values += [bindparam(f"same_{name}", type_=jobs.c[name].type).label(name) for name in same]
    insertion = postgresql.insert(jobs).from_select([*differ, *same], select(*values))
    return insertion.on_conflict_do_nothing(index_elements=SAME_JOB).returning(jobs.c.id, *IDENTITY)


def _insert_missing_mysql(connection: Connection, rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], int]:
    created = {}
    for row in rows:
        result = connection.execute(mysql.insert(jobs).prefix_with("IGNORE").values(row))
        if result.rowcount:
            created[(row["account"], row["fetch_base"], row["remote_id"])] = int(result.lastrowid)
    return created


def _ids(connection: Connection, identities: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], int]:
    """Return the ids of these jobs, which all exist.

    In a caller's transaction, MariaDB may read a snapshot that is older than a job of another transaction. Only a
    locking read finds that job.
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
    """Return the row of a job, or None."""
    if not 0 < job_id <= MAX_ID:
        return None
    return connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()


def job_rows(connection: Connection, job_ids: Sequence[int]) -> list[Row[Any]]:
    """Return the rows of the jobs with these ids that exist, some hundred per query."""
    known = [job_id for job_id in job_ids if 0 < job_id <= MAX_ID]
    return [
        row
        for start in range(0, len(known), INSERT_ROWS)
        for row in connection.execute(select(jobs).where(jobs.c.id.in_(known[start : start + INSERT_ROWS])))
    ]


def jobs_by_remote(connection: Connection, remote_id: str, account: str | None) -> Sequence[Row[Any]]:
    """Return all jobs with this remote id, newest first. Endpoint families may use the same ids."""
    query = select(jobs).where(jobs.c.remote_id == remote_id).order_by(jobs.c.id.desc())
    return connection.execute(query if account is None else query.where(jobs.c.account == account)).all()


def outputs_of(connection: Connection, job_ids: Sequence[int]) -> Sequence[Row[Any]]:
    """Return the outputs of these jobs, ordered by job and position."""
    query = select(outputs).where(outputs.c.job_id.in_(job_ids)).order_by(outputs.c.job_id, outputs.c.position)
    return connection.execute(query).all()


def count_by_state(connection: Connection) -> dict[str, int]:
    """Return the number of jobs in each state. It reads only indexes, because there may be millions of jobs."""
    pending = count_pending(connection)
    return count_not_pending(connection) | ({"pending": pending} if pending else {})


def count_not_pending(connection: Connection) -> dict[str, int]:
    """Return the number of jobs in each state but `pending`."""
    not_pending = select(jobs.c.status, func.count()).where(jobs.c.status != "pending").group_by(jobs.c.status)
    return {row[0]: row[1] for row in connection.execute(not_pending)}


def count_pending(connection: Connection) -> int:
    """Return the number of pending jobs.

    A job with a due time is pending, or it is downloading and waits for fresh links.
    """
    with_due_time = select(func.count()).select_from(jobs).where(HAS_DUE_TIME)
    renewing = with_due_time.where(jobs.c.status == "downloading")
    return int(connection.execute(with_due_time).scalar_one() - connection.execute(renewing).scalar_one())


def waiting_accounts(connection: Connection) -> list[str]:
    """Return the sorted accounts that have jobs with a due time. The query jumps through the index."""
    query = _WAITING_ACCOUNTS_MYSQL if connection.dialect.name in MYSQL_FAMILY else _WAITING_ACCOUNTS
    return sorted(set(connection.execute(query).scalars()))


def _waiting_accounts() -> Select[Any]:
    waiting = jobs.c.due_at.is_not(None)
    first = select(func.min(jobs.c.account).label("account")).where(waiting).cte("accounts", recursive=True)
    next_account = select(func.min(jobs.c.account)).where(waiting, jobs.c.account > first.c.account).scalar_subquery()
    accounts = first.union_all(select(next_account).where(first.c.account.is_not(None)))
    return select(accounts.c.account).where(accounts.c.account.is_not(None))


_WAITING_ACCOUNTS = _waiting_accounts()
_WAITING_ACCOUNTS_MYSQL = (  # grouped by all these columns, so that the server reads one index entry per group
    select(waiting_account, jobs.c.priority, jobs.c.fetch_host, func.min(jobs.c.due_at))
    .where(HAS_DUE_TIME)
    .group_by(waiting_account, jobs.c.priority, jobs.c.fetch_host)
)


def first_tracked(connection: Connection, moment: datetime) -> int:
    """Return approximately the first id of the jobs tracked at this time or later, by binary search over the ids.

    Ids are in the order of tracking, but a slow transaction may be out of order by up to `OUT_OF_ORDER`.
    """
    low, last = connection.execute(select(func.min(jobs.c.id), func.max(jobs.c.id))).one()
    if last is None:
        return 0
    high = int(last) + 1
    while low < high:
        middle = (low + high) // 2
        next_job = select(jobs.c.id, jobs.c.tracked_at).where(jobs.c.id >= middle).order_by(jobs.c.id).limit(1)
        row = connection.execute(next_job).one_or_none()
        if row is not None and row.tracked_at < moment:
            low = row.id + 1
        else:
            high = middle
    return int(low)


def measured_durations(connection: Connection, *, limit: int) -> list[tuple[float, float | None, str, float | None]]:
    """Return (submitted, duration, kind, eta) of the newest polled jobs that became ready or expired, in seconds.

    `submitted` is relative to the first of these jobs. A job became ready between its last two answers, so its duration
    is the middle between them. The duration of an expired job is None.
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


# ── actions ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def nudge(connection: Connection, remote_id: str, account: str | None, *, now: datetime, poll_min: timedelta) -> int:
    """Move the next poll of all jobs with this remote id forward; return how many jobs changed.

    The next poll is due now, or `poll_min` after the last one.
    """
    rows = [row for row in jobs_by_remote(connection, remote_id, account) if row.status == "pending"]
    return _bring_forward(connection, rows, now=now, poll_min=poll_min)


def nudge_reference(connection: Connection, reference: str, *, now: datetime, poll_min: timedelta) -> int:
    """Do the same for the jobs with this reference, at most for the newest `NUDGED_MOST`."""
    query = select(jobs.c.id, jobs.c.asked_at).where(jobs.c.reference == reference, jobs.c.status == "pending")
    rows = connection.execute(query.order_by(jobs.c.id.desc()).limit(NUDGED_MOST)).all()
    return _bring_forward(connection, rows, now=now, poll_min=poll_min)


def _bring_forward(connection: Connection, rows: Iterable[Any], *, now: datetime, poll_min: timedelta) -> int:
    moved = 0
    for row in rows:
        due = now if row.asked_at is None else max(now, row.asked_at + poll_min)
        result = connection.execute(
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
        moved += result.rowcount
    return moved


def cancel(connection: Connection, job_id: int, tally: Tally, *, now: datetime) -> bool:
    """Cancel a job that is not final. Its unstored outputs fail, and stored files stay. Return whether it changed.

    The caller writes the tally as the last step of its transaction.
    """
    return bool(cancel_all(connection, [job_id], tally, now=now))


def cancel_all(connection: Connection, job_ids: Iterable[int], tally: Tally, *, now: datetime) -> set[int]:
    """Cancel up to a few hundred jobs, and return the ids of the changed jobs."""
    unfinished = select(jobs.c.id, jobs.c.account, jobs.c.kind, jobs.c.status)
    unfinished = unfinished.where(jobs.c.id.in_(list(job_ids)), jobs.c.status.not_in(FINAL_STATES))
    rows = connection.execute(unfinished.order_by(jobs.c.id).with_for_update()).all()
    if not rows:
        return set()
    ids = {row.id for row in rows}
    connection.execute(update(jobs).where(jobs.c.id.in_(ids)).values(job_ended("cancelled", now)))
    cancel_outputs(connection, outputs.c.job_id.in_(ids))
    close_cancelled(connection, [row.id for row in rows if row.status in ORDER_STATES])
    for row in rows:
        tally.finished(row.account, row.kind, "cancelled")
    return ids


def cancel_outputs(connection: Connection, which: ColumnElement[bool]) -> int:
    """End the waiting outputs of cancelled jobs; return how many. Stored files stay."""
    waiting = update(outputs).where(which, outputs.c.status == "pending")
    return connection.execute(waiting.values(output_failed("cancelled", "the job was cancelled"))).rowcount


def retry(connection: Connection, job_id: int, *, now: datetime) -> bool:
    """Try a failed or expired job, or an uncertain order, again, with a new deadline. Return whether it changed."""
    return bool(retry_all(connection, [job_id], now=now))


def retry_all(connection: Connection, job_ids: Iterable[int], *, now: datetime) -> set[int]:
    """Retry up to a few hundred jobs, and return the ids of the changed jobs. Orders are sent again."""
    retryable = select(jobs.c.id, jobs.c.deadline_seconds, jobs.c.remote_id)
    retryable = retryable.where(jobs.c.id.in_(list(job_ids)), jobs.c.status.in_(("failed", "expired", "uncertain")))
    locked_rows = connection.execute(retryable.order_by(jobs.c.id).with_for_update()).all()
    pruned = select(outputs.c.job_id).where(
        outputs.c.job_id.in_([row.id for row in locked_rows]), outputs.c.error_code == PRUNED
    )
    being_pruned = set(connection.execute(pruned).scalars())
    unnamed = {row.id for row in locked_rows if not row.remote_id}
    if unnamed:
        order_again(connection, unnamed, now=now)
    rows = [row for row in locked_rows if row.id not in being_pruned and row.id not in unnamed]
    if not rows:
        return unnamed
    ids = {row.id for row in rows}
    reset_promises(connection, sorted(ids))
    failed = (outputs.c.job_id.in_(ids), outputs.c.status == "failed")
    with_outputs = set(connection.execute(select(outputs.c.job_id).where(*failed)).scalars())
    connection.execute(update(outputs).where(*failed).values(fresh_output(now)))
    delete_looks(connection, ids)
    ids_by_values: dict[tuple[bool, float], list[int]] = {}
    for row in rows:
        ids_by_values.setdefault((row.id in with_outputs, row.deadline_seconds), []).append(row.id)
    for (downloading, deadline_seconds), same_ids in ids_by_values.items():
        connection.execute(
            update(jobs)
            .where(jobs.c.id.in_(same_ids))
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
    return ids | unnamed


def finish_job_if_done(connection: Connection, job_id: int, tally: Tally, *, now: datetime) -> str | None:
    """Finish a job if all its outputs are final. Return its final state, or None if outputs are still pending.

    If the outputs were promised links and none was stored, the job ends as it would have without them. A job whose
    output rows are missing fails; `retry` asks the API for the outputs again. The caller has locked the job's row,
    knows that the job is downloading, and writes the tally.
    """
    job_columns = [
        select(column).where(jobs.c.id == job_id).scalar_subquery() for column in (jobs.c.account, jobs.c.kind)
    ]
    end_columns = (promises.c.end_status, promises.c.end_code, promises.c.end_message)
    promise_columns = [select(column).where(promises.c.job_id == job_id).scalar_subquery() for column in end_columns]
    total, stored, waiting, account, kind, end_status, end_code, end_message = connection.execute(
        select(
            func.count(),
            _count(outputs.c.status == "stored"),
            _count(outputs.c.status == "pending"),
            *job_columns,
            *promise_columns,
        ).where(outputs.c.job_id == job_id)
    ).one()
    if waiting:
        return None
    if end_status is not None and stored:
        clear_promised_end(connection, job_id)
        delete_looks(connection, [job_id])  # they were planned in case it expires
    values: dict[str, Any] = {"error_code": None}  # the message is kept: it may say that outputs were left out
    status = "completed"
    if end_status is not None and not stored:
        status = end_status  # the job never became ready
        values = {"error_code": end_code, "error_message": end_message, "ready_at": None}
    elif not total:
        status, message = "failed", "its outputs are missing in the database; `retry` asks for them again"
        values = {"error_code": "no_output", "error_message": message}
    elif total != stored:
        status, message = "failed", f"{total - stored} of {format_count(total, 'output')} could not be stored"
        values = {"error_code": "output_failed", "error_message": message}
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(job_ended(status, now) | values))
    tally.finished(account, kind, status)
    return status


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)
