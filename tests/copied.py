"""A database with values of every kind in every table, and the comparison of two databases row by row."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, Table, insert, select

from tests.rows import NOW, job_values, output_values
from worker.store.copying import COPIED_TABLES
from worker.store.schema import (
    HELD_UNTIL,
    actions,
    bodies,
    breakers,
    candidates,
    counters,
    crashes,
    events,
    history,
    jobs,
    late_looks,
    moved_files,
    orders,
    outputs,
    paces,
    processes,
    promises,
    slots,
    unread,
)

CLAIM = {"claim_token": "token", "claim_holder": "holder"}
MOMENT = datetime(2026, 2, 28, 23, 59, 59, 999_999, UTC)
LATER = datetime(2126, 2, 28, tzinfo=UTC)
TEXT = "ünï©ode 🎨 \u202eRTL\u202c 'quotes' \"double\" back\\slash\\n % %s %(x)s :name ? {} \t tab\r\nline  "
LONG_TEXT = "x" * 70_000 + "ü🎨" * 200_000  # more than TEXT of MariaDB takes
BYTES = bytes(range(256)) * 20_000
FLOATS = (0.1, 1 / 3, 1e-300, 1.7976931348623157e308, 12_202_888.000000001)


def plant_rows(engine: Engine) -> None:
    """Insert rows with long, odd and extreme values into every table."""
    with engine.begin() as connection:
        _plant_jobs(connection)
        _plant_outputs(connection)
        rows: dict[Table, list[dict[str, Any]]] = {
            bodies: [{"output_id": 1, "body": BYTES}, {"output_id": 2, "body": b""}],
            events: [
                _event(1, LONG_TEXT, status="pending", due_at=MOMENT, **CLAIM),
                _event(2, TEXT, status="delivered", ended_at=MOMENT, http_status=204),
            ],
            unread: [
                {"job_id": 3, "at": MOMENT, "http_status": 200, "shape": TEXT, "body": TEXT * 500},
                {"job_id": 3, "at": NOW, "http_status": 502, "shape": "", "body": "", "recognised": True},
            ],
            promises: [{"job_id": 3, "urls": f'["{LONG_TEXT}"]', "tried_at": MOMENT, "end_status": "expired"}],
            late_looks: [{"job_id": 4, "looks": 3, "due_at": MOMENT}],
            paces: [{"account": "Ä", "kind": "", "state": "{}", "version": 7, "learned_at": MOMENT}],
            crashes: [{"scope": "job", "row_id": 2**53 + 1, "times": 2, "attempt": 5, "crashed_at": MOMENT}],
            breakers: [{"scope": "account", "name": "shop", "proven": True, "ceiling": 1 / 3, "paused_at": MOMENT}],
            counters: [_counter(number) for number in range(50)],
            history: [{"minute": NOW + timedelta(minutes=number), "body": TEXT} for number in range(3)],
            processes: [_process("holder", seen_at=NOW)],
            actions: [
                {
                    "at": MOMENT,
                    "source": "cli",
                    "who": TEXT,
                    "action": "hold",
                    "filter": TEXT,
                    "jobs": 2**40,
                    "job_id": 9,
                }
            ],
            orders: [
                _order(10, queue="default", due_at=NOW),
                _order(11, queue="default", takes_slot=True, attempt_token="t", due_at=LATER, **CLAIM),
                _order(12, payload=f'{{"prompt":"{LONG_TEXT}"}}', last_error=TEXT),
            ],
            candidates: [
                {"job_id": 10, "remote_id": "Ä-1", "named_at": MOMENT, "due_at": NOW, "tries": 2},
                {"job_id": 10, "remote_id": "ä-1", "named_at": MOMENT, "note": TEXT},
            ],
            slots: [{"account": "Ä", "slots": 5, "refused_at": MOMENT, "paused_at_taken": 3}],
            moved_files: [{"output_id": 2**40, "job_id": 1, "location": "file:///ü%20"}],
        }
        for table, values in rows.items():
            for row in values:
                connection.execute(insert(table).values(row))


def _plant_jobs(connection: Connection) -> None:
    ended: dict[str, Any] = {"due_at": None, "completed_at": MOMENT}
    rows: list[dict[str, Any]] = [
        {"status": "downloading", "due_at": MOMENT, "ready_at": MOMENT, **CLAIM},
        {"status": "completed", "ready_at": MOMENT, "default_address": True, **ended},
        {"status": "failed", "error_code": "not_found", "error_message": TEXT, **ended},
        {"status": "expired", "error_code": "expired", "last_answer": "ü" * 600, **ended},
        {"status": "cancelled", "reference": TEXT, "webhook_url": "https://shop.test/" + "x" * 1_900, **ended},
        {"due_at": HELD_UNTIL, "held_at": MOMENT},
        {"due_at": MOMENT, **CLAIM},
        {"account": "Default", "priority": -32_768, "polls": 2**31 - 1},
        {"account": "default ", "submitted_at": datetime(1970, 1, 1, tzinfo=UTC)},
        *({"eta": value, "pace_scale": -value, "deadline_seconds": value} for value in FLOATS),
    ]
    for number, changes in enumerate(rows):
        connection.execute(insert(jobs).values(job_values(f"R{number % 8}", fetch_base=f"base {number}", **changes)))


def _plant_outputs(connection: Connection) -> None:
    stored: dict[str, Any] = {"location": "file:///ü%20", "sha256": "ab" * 32, "media_type": "image/png"}
    rows: list[dict[str, Any]] = [
        {"due_at": MOMENT, "claimed_at": MOMENT, "received_bytes": 2**40, **CLAIM},
        {"url": "https://cdn.test/" + "ü" * 8_000, "proxy_urls": '["\\u0000", "\\\\"]', "renewed": True},
        {"status": "stored", "due_at": None, "stored_at": MOMENT, "size_bytes": 2**53 + 1, **stored},
        {"status": "failed", "due_at": None, "error_code": "gone", "error_message": TEXT, "dead_since": MOMENT},
    ]
    for number, changes in enumerate(rows):
        connection.execute(insert(outputs).values(output_values(1 + number // 3, number, **changes)))


def _event(job_id: int, body: str, **changes: Any) -> dict[str, Any]:
    row = {"event_id": f"evt_{job_id}", "job_id": job_id, "type": "job.failed", "url": "https://shop.test/hook"}
    return row | {"body": body, "created_at": MOMENT} | changes


def _order(job_id: int, **changes: Any) -> dict[str, Any]:
    row = {"id": job_id, "order_key": f"key {job_id}", "order_rank": -3, "host": "api.test", "endpoint": "v6/x"}
    return row | {"payload": "{}", "payload_sha256": "ab" * 32, "ordered_at": MOMENT} | changes


def _counter(number: int) -> dict[str, Any]:
    key = {"name": "delays", "account": "Shop" if number % 2 else "shop", "kind": "image", "label": "", "slot": number}
    return key | {"times": 2**53 + number, "total": number / 3}


def _process(holder: str, *, seen_at: datetime) -> dict[str, Any]:
    values = {"holder": holder, "name": f"celery@{holder}", "queues": "[]", "accounts": "{}", "version": "0.1.0"}
    return values | {"redis_answers": True, "started_at": seen_at, "seen_at": seen_at}


def add_process(engine: Engine, name: str, *, seen_at: datetime) -> None:
    """Insert the row of a worker process."""
    with engine.begin() as connection:
        connection.execute(insert(processes).values(_process(name, seen_at=seen_at)))


def plant_many(engine: Engine, count: int) -> None:
    """Insert completed jobs with an output each."""
    ended: dict[str, Any] = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}
    stored: dict[str, Any] = {
        "status": "stored",
        "due_at": None,
        "stored_at": NOW,
        "size_bytes": 9,
        "sha256": "ab" * 32,
    }
    stored |= {"location": "file:///x", "media_type": "image/png"}
    with engine.begin() as connection:
        for start in range(1, count + 1, 5_000):
            ids = range(start, min(start + 5_000, count + 1))
            connection.execute(insert(jobs), [{"id": number, **job_values(f"m{number}", **ended)} for number in ids])
            connection.execute(insert(outputs), [output_values(number, **stored) for number in ids])


Rows = dict[str, list[dict[str, Any]]]


def all_rows(engine: Engine) -> Rows:
    """Return all rows of all copied tables, by the name of the table and in the order of the primary key.

    The row of the audit trail that the copy itself adds is left out.
    """
    with engine.connect() as connection:
        return {
            table.name: sorted(
                (
                    dict(row)
                    for row in connection.execute(select(table)).mappings()
                    if row.get("action") != "copy-database"
                ),
                key=lambda row: tuple(row[column.name] for column in table.primary_key.columns),
            )
            for table in COPIED_TABLES
        }


def with_claims_released(rows: Rows, copy: Rows) -> Rows:
    """Return rows as their copy has to have them: claimed rows were due when they were copied, a moment ago.

    Orders keep their claim: the first sweep releases it.
    """
    expected = {}
    for name, table_rows in rows.items():
        key = "job_id" if name == orders.name else "id"
        due_times = {row[key]: row["due_at"] for row in copy[name] if "claim_token" in row}
        released = {} if name == orders.name else {"claim_token": None, "claim_holder": None}
        expected[name] = [
            row | {**released, "due_at": due_times[row[key]]} if row.get("claim_token") else row for row in table_rows
        ]
        for row in table_rows:
            assert not row.get("claim_token") or abs(datetime.now(UTC) - due_times[row[key]]) < timedelta(minutes=15)
    return expected
