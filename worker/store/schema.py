"""The tables as SQLAlchemy Core objects, with the constraints that allow only valid states.

The tables share a database with an app's own tables, so their names begin with `fetch_`.

`due_at` is the queue. A row with a due time waits for work; a row without one needs no work. A claim moves `due_at`
forward by the length of the lease and writes a fencing token. A result is only written while that token is in the row.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects import mysql

VERSION_TABLE = "fetch_worker_version"
MYSQL_FAMILY = frozenset({"mysql", "mariadb"})  # the names of their dialects
HELD_UNTIL = datetime(9999, 1, 1, tzinfo=UTC)  # the due time of a job that an operator holds


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware UTC times on every database. A naive time is refused, because its time zone is unknown."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Return a type with microseconds on MySQL and MariaDB, whose default is whole seconds."""
        if dialect.name in MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert a time to UTC. Raises ValueError for a naive time."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a time zone can't be stored: {value!r}")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        """Return None on PostgreSQL, which returns aware UTC times: `worker.store.engine` sets the time zone."""
        return None if dialect.name == "postgresql" else super().result_processor(dialect, coltype)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time as an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite generates ids only for columns of type INTEGER
_LongText = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_Body = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

_FINAL = "status IN ('completed', 'failed', 'expired', 'cancelled')"

jobs = Table(
    "fetch_jobs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("account", String(64), nullable=False),
    Column("remote_id", String(128), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("fetch_url", String(500), nullable=False),
    Column("fetch_base", String(500), nullable=False),
    Column("fetch_host", String(255), nullable=False),
    Column("default_address", Boolean, nullable=False, server_default=text("false")),  # from SD_API_URL
    Column("status", String(16), nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("reference", String(255)),
    Column("on_done", String(255)),
    Column("webhook_url", Text),
    Column("eta", Double),
    Column("eta_at", UtcDateTime),  # when an answer brought the ETA; NULL if the submission did
    Column("not_ready_at", UtcDateTime),  # when the API last answered that the job is not ready
    Column("pace_scale", Double),  # how the value of a request grows: see `worker.core.pacing.policy.urgency`
    Column("pace_growth", Double),
    Column("polls", Integer, nullable=False, server_default="0"),
    Column("failed_answers", SmallInteger, nullable=False, server_default="0"),
    Column("unknown_answers", SmallInteger, nullable=False, server_default="0"),
    Column("error_answers", SmallInteger, nullable=False, server_default="0"),
    Column("empty_answers", SmallInteger, nullable=False, server_default="0"),
    Column("struck_at", UtcDateTime),  # when the last of these four counters was increased
    Column("last_answer", String(600)),  # the last answers, newest first, one per line: `worker.core.answer_history`
    Column("submitted_at", UtcDateTime, nullable=False),
    Column("tracked_at", UtcDateTime, nullable=False),
    Column("deadline_at", UtcDateTime, nullable=False),
    Column("deadline_seconds", Double, nullable=False),
    Column("due_at", UtcDateTime),
    Column("asked_at", UtcDateTime),  # when the job was last polled
    Column("ready_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    Column("told_at", UtcDateTime),  # when the `on_done` call was sent
    Column("on_done_attempts", SmallInteger, nullable=False, server_default="0"),  # calls that the broker refused
    Column("on_done_due_at", UtcDateTime),  # the call is not sent before this time; a claim moves it forward
    Column("on_done_error", String(255)),
    Column("announced_at", UtcDateTime),  # when the webhook event of the present final state was created
    Column("held_at", UtcDateTime),  # when an operator's hold began; `due_at` is `HELD_UNTIL` while it lasts
    Column("claim_token", String(32)),
    Column("claim_holder", String(32)),
    Column("error_code", String(32)),
    Column("error_message", Text),
    UniqueConstraint("account", "fetch_base", "remote_id", name="uq_fetch_jobs_same_job"),
    CheckConstraint(
        "status IN ('ordered', 'uncertain', 'pending', 'downloading', 'completed', 'failed', 'expired', 'cancelled')",
        name="known_status",
    ),
    CheckConstraint(f"({_FINAL}) = (completed_at IS NOT NULL)", name="final_has_completed_at"),
    CheckConstraint(f"NOT ({_FINAL}) OR due_at IS NULL", name="final_is_at_rest"),
    CheckConstraint("status <> 'pending' OR due_at IS NOT NULL", name="pending_is_due"),
    CheckConstraint("status NOT IN ('failed', 'expired') OR error_code IS NOT NULL", name="failed_has_code"),
    CheckConstraint("status NOT IN ('downloading', 'completed') OR ready_at IS NOT NULL", name="ready_has_ready_at"),
    CheckConstraint("claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)", name="claim_is_leased"),
    CheckConstraint("polls >= 0", name="polls_count_up"),
    # The index's last column changes with every claim and every answer, so PostgreSQL can't make heap-only (HOT)
    # updates of this table: 0 of 160,000 were. The fillfactor of 70 has another purpose: a new row version fits on the
    # same page. With it, 80,000 polls of 20,000 jobs grew the table by 15 to 24 MiB; without it by 57 to 100 MiB.
    Index("ix_fetch_jobs_best", "account", "priority", "fetch_host", "due_at", **_where("due_at IS NOT NULL")),
    Index("ix_fetch_jobs_remote_id", "remote_id"),
    Index("ix_fetch_jobs_reference", "reference", **_where("reference IS NOT NULL")),
    # On PostgreSQL the index leaves out pending jobs, because their rows change all the time.
    Index("ix_fetch_jobs_status", "status", "id", postgresql_where=text("status <> 'pending'")),
    Index("ix_fetch_jobs_holder", "claim_holder", **_where("claim_holder IS NOT NULL")),
    Index(
        "ix_fetch_jobs_untold",
        "completed_at",
        **_where("completed_at IS NOT NULL AND on_done IS NOT NULL AND told_at IS NULL"),
    ),
    Index(
        "ix_fetch_jobs_unannounced",
        "completed_at",
        **_where("completed_at IS NOT NULL AND webhook_url IS NOT NULL AND announced_at IS NULL"),
    ),
    # MariaDB has no partial indexes and would read all final jobs. These two replace the two above there. On the other
    # databases they are empty.
    Index(
        "ix_fetch_jobs_unannounced_mysql",
        "announced_at",
        "webhook_url",
        mysql_length={"webhook_url": 1},
        mariadb_length={"webhook_url": 1},
        **_where("false"),
    ),
    Index(
        "ix_fetch_jobs_untold_mysql",
        "told_at",
        "on_done",
        mysql_length={"on_done": 1},
        mariadb_length={"on_done": 1},
        **_where("false"),
    ),
    sqlite_autoincrement=True,  # an id is never used again, because files are named after ids
)

# A generated column on MariaDB and MySQL, which have no partial indexes. It holds the account of each job that has a
# due time and is NULL for other jobs, so its index contains only jobs with a due time. The other databases don't have
# this column, and no statement writes it. Therefore it is not part of the table above.
waiting_account = literal_column("fetch_jobs.waiting_account", String(64))
MYSQL_ONLY = frozenset({"waiting_account", "ix_fetch_jobs_waiting"})

IS_HELD = jobs.c.due_at >= HELD_UNTIL  # an operator holds the job; written with `due_at` because its index is read

outputs = Table(
    "fetch_outputs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("url", Text, nullable=False),
    Column("proxy_urls", Text, nullable=False),  # JSON list
    Column("status", String(16), nullable=False),
    Column("location", Text),
    Column("size_bytes", BigInteger),
    Column("sha256", String(64)),
    Column("media_type", String(64)),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("bad_bodies", SmallInteger, nullable=False, server_default="0"),
    Column("dead_since", UtcDateTime),
    Column("dead_attempts", SmallInteger, nullable=False, server_default="0"),
    Column("renewed", Boolean, nullable=False, server_default=text("false")),
    Column("listed_at", UtcDateTime, nullable=False),  # when an answer first listed the output
    Column("due_at", UtcDateTime),
    Column("queued_at", UtcDateTime),
    Column("stored_at", UtcDateTime),
    Column("claimed_at", UtcDateTime),  # when the last attempt began
    Column("received_bytes", BigInteger),  # bytes received by the running attempt, updated every few seconds
    Column("claim_token", String(32)),
    Column("claim_holder", String(32)),
    Column("error_code", String(32)),
    Column("error_message", Text),
    UniqueConstraint("job_id", "position", name="uq_fetch_outputs_position"),
    CheckConstraint("status IN ('pending', 'stored', 'failed')", name="known_status"),
    CheckConstraint("(status = 'pending') = (due_at IS NOT NULL)", name="pending_is_due"),
    CheckConstraint(
        "status <> 'stored' OR (location IS NOT NULL AND sha256 IS NOT NULL AND size_bytes IS NOT NULL"
        " AND media_type IS NOT NULL AND stored_at IS NOT NULL)",
        name="stored_is_described",
    ),
    CheckConstraint("status <> 'failed' OR error_code IS NOT NULL", name="failed_has_code"),
    CheckConstraint("claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)", name="claim_is_leased"),
    Index("ix_fetch_outputs_oldest", "listed_at", "id", **_where("due_at IS NOT NULL")),
    Index("ix_fetch_outputs_due", "due_at", **_where("due_at IS NOT NULL")),
    Index("ix_fetch_outputs_holder", "claim_holder", **_where("claim_holder IS NOT NULL")),
    sqlite_autoincrement=True,
)

bodies = Table(
    "fetch_output_bodies",
    metadata,
    Column("output_id", _Id, ForeignKey("fetch_outputs.id", ondelete="CASCADE"), primary_key=True),
    Column("body", _Body, nullable=False),
    comment="bytes that an answer carried itself, until they are stored",
)

events = Table(
    "fetch_events",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("event_id", String(64), nullable=False),  # the id that the receiver gets
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(16), nullable=False),
    Column("url", Text, nullable=False),
    Column("body", _LongText, nullable=False),  # the same for each attempt
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("claim_token", String(32)),
    Column("claim_holder", String(32)),
    Column("http_status", SmallInteger),  # of the last attempt
    Column("error_message", Text),
    UniqueConstraint("event_id", name="uq_fetch_events_event_id"),
    CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="known_status"),
    CheckConstraint("(status = 'pending') = (due_at IS NOT NULL)", name="pending_is_due"),
    CheckConstraint("(status = 'pending') = (ended_at IS NULL)", name="ended_has_ended_at"),
    CheckConstraint("claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)", name="claim_is_leased"),
    Index("ix_fetch_events_job_id", "job_id"),
    Index("ix_fetch_events_due", "due_at", **_where("due_at IS NOT NULL")),
    Index("ix_fetch_events_holder", "claim_holder", **_where("claim_holder IS NOT NULL")),
    comment="what is told by webhook: one event for each final state of a job that has an address",
    sqlite_autoincrement=True,
)

unread = Table(
    "fetch_unread",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("http_status", SmallInteger, nullable=False),
    Column("shape", String(255), nullable=False),
    Column("body", _LongText, nullable=False),  # the first 64 KiB, without API keys
    Column("recognised", Boolean, nullable=False, server_default=text("false")),  # a rule read it and ended the job
    Index("ix_fetch_unread_job_id", "job_id"),
    Index("ix_fetch_unread_shape", "shape"),
    comment="the last answers that no rule reads, and the last answer of each job that ended without an output",
    sqlite_autoincrement=True,
)

promises = Table(
    "fetch_promises",
    metadata,
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("urls", _LongText, nullable=False),  # JSON list
    Column("tried_at", UtcDateTime),  # when the first attempt began; the three columns below are set with it
    Column("end_status", String(16)),
    Column("end_code", String(32)),
    Column("end_message", Text),
    comment="links at which the API promised outputs, and how a job would have ended without them",
)

late_looks = Table(
    "fetch_late_looks",
    metadata,
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("looks", SmallInteger, nullable=False, server_default="0"),
    Column("due_at", UtcDateTime, nullable=False),
    Index("ix_fetch_late_looks_due_at", "due_at"),
    comment="expired jobs that are asked about again, how often they were, and when next",
)

orders = Table(
    "fetch_orders",
    metadata,
    Column(
        "job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), key="id", primary_key=True, autoincrement=False
    ),
    Column("order_key", String(64), nullable=False),  # equal for two deliveries of one message
    # The account while the order waits, takes a slot at the API, or is uncertain. NULL afterwards, so that the index on
    # it contains only a few rows on every database.
    Column("queue", String(64)),
    Column("takes_slot", Boolean, nullable=False, server_default=text("false")),
    Column("order_rank", SmallInteger, nullable=False),  # the negative priority: the index is read upwards
    Column("host", String(255), nullable=False),
    Column("endpoint", String(500), nullable=False),
    Column("payload", _LongText, nullable=False),  # a JSON object without the API key
    Column("payload_sha256", String(64), nullable=False),
    Column("ordered_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime),
    Column("slot_until", UtcDateTime),  # when a slot is free again whose job can't be polled; NULL: when its job ends
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("attempted_at", UtcDateTime),  # written right before the first byte of the last request
    Column("attempt_token", String(32)),  # of a request whose answer is not recorded yet
    Column("claim_token", String(32)),
    Column("claim_holder", String(32)),
    Column("last_error", Text),  # why the order was not taken yet, or what is known about a lost answer
    CheckConstraint("claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)", name="claim_is_leased"),
    CheckConstraint("queue IS NOT NULL OR due_at IS NULL", name="due_is_queued"),
    UniqueConstraint("order_key", name="uq_fetch_orders_order_key"),
    Index("ix_fetch_orders_queue", "queue", "takes_slot", "order_rank", "id"),
    Index("ix_fetch_orders_holder", "claim_holder", **_where("claim_holder IS NOT NULL")),
    comment="what apps ordered: the payload of each order, and whether it was sent",
)

candidates = Table(
    "fetch_candidates",
    metadata,
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("remote_id", String(128), primary_key=True),
    Column("named_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime),  # when the API is asked about it; NULL: it is decided
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("note", Text),  # what the API said about it
    Index("ix_fetch_candidates_due_at", "due_at", **_where("due_at IS NOT NULL")),
    comment="remote ids that calls of the API named for orders whose answer is not known",
)

slots = Table(
    "fetch_slots",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("slots", Integer),  # NULL: nothing was learned yet
    Column("refused_at", UtcDateTime),
    Column("raised_at", UtcDateTime),
    Column("paused_until", UtcDateTime),
    Column("paused_at_taken", Integer, nullable=False, server_default="0"),
    comment="how many orders of each account may wait at the API, as its refusals showed",
)

paces = Table(
    "fetch_paces",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("kind", String(64), primary_key=True),  # empty for the account as a whole
    Column("state", Text, nullable=False),  # JSON snapshot of a model
    Column("version", Integer, nullable=False),
    Column("learned_at", UtcDateTime, nullable=False),
    comment="how long jobs of each kind take, as polls showed",
)

crashes = Table(
    "fetch_crashes",
    metadata,
    Column("scope", String(8), primary_key=True),  # job or output
    Column("row_id", BigInteger, primary_key=True, autoincrement=False),
    Column("times", Integer, nullable=False),  # consecutive crashes
    Column("attempt", Integer, nullable=False),  # the row's counter of attempts at the last crash
    Column("crashed_at", UtcDateTime, nullable=False),
    comment="jobs and outputs whose process died, how often in a row",
)

breakers = Table(
    "fetch_gates",
    metadata,
    Column("scope", String(16), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("proven", Boolean, nullable=False, server_default=text("false")),
    Column("reason", String(600)),
    Column("since", UtcDateTime),
    Column("until", UtcDateTime),
    Column("probe_at", UtcDateTime),
    Column("probes", Integer, nullable=False, server_default="0"),
    Column("troubles", Integer, nullable=False, server_default="0"),
    Column("released_at", UtcDateTime),
    Column("asked_at", UtcDateTime),
    Column("ceiling", Double),
    Column("cut_at", UtcDateTime),
    Column("paused_at", UtcDateTime),  # when an operator's hold began
    CheckConstraint("scope IN ('account', 'host')", name="known_scope"),
    CheckConstraint("(reason IS NULL) = (since IS NULL)", name="hold_has_since"),
    comment="accounts and API hosts: may they be asked, and if not, why and until when",
)

counters = Table(
    "fetch_totals",
    metadata,
    Column("name", String(24), primary_key=True),
    Column("account", String(64), primary_key=True),
    Column("kind", String(64), primary_key=True),
    Column("label", String(64), primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("times", BigInteger, nullable=False),
    Column("total", Double, nullable=False),
    comment="what has happened so far: counts and sums, in slots that add up",
)

history = Table(
    "fetch_history",
    metadata,
    Column("minute", UtcDateTime, primary_key=True),
    Column("body", Text, nullable=False),  # JSON
    comment="how everything stood, once a minute",
)

processes = Table(
    "fetch_processes",
    metadata,
    Column("holder", String(32), primary_key=True),  # the name of the process in its claims
    Column("name", String(255), nullable=False),  # the name of its Celery node
    Column("queues", Text, nullable=False),  # JSON list
    Column("accounts", Text, nullable=False),  # JSON object: the requests per second of each account that has a key
    Column("version", String(32), nullable=False),
    Column("redis_answers", Boolean, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("seen_at", UtcDateTime, nullable=False),
    comment="worker processes: which queues and accounts they serve, and when they last said so",
)

actions = Table(
    "fetch_actions",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("source", String(16), nullable=False),  # cli, page, flower, python or task
    Column("who", String(255), nullable=False),
    Column("action", String(32), nullable=False),
    Column("filter", Text, nullable=False),  # which jobs, as options of the command line
    Column("jobs", BigInteger, nullable=False),  # how many jobs changed
    Column("job_id", BigInteger),  # if the action named one job; the row stays when the job is pruned
    Index("ix_fetch_actions_job_id", "job_id"),
    comment="what operators and apps changed by hand: when, from where, who, and how many jobs",
    sqlite_autoincrement=True,
)

moved_files = Table(
    "fetch_moved_files",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("output_id", BigInteger, nullable=False),  # no foreign key: the row stays when the job is pruned
    Column("job_id", BigInteger, nullable=False),
    Column("location", Text, nullable=False),
    comment="old files of outputs that `move-storage` has moved, until they are removed",
    sqlite_autoincrement=True,
)

copies = Table(
    "fetch_copies",
    metadata,
    Column("source", String(16), primary_key=True),  # an identifier: `worker.store.database_identity`
    Column("position", Text, nullable=False),  # JSON object: the last copied id of each table
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    comment="the database whose rows `copy-database` has copied into this one",
)
