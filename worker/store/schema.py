"""The tables, as SQLAlchemy Core sees them: names, columns, and the constraints that keep the state machine honest.

They stand beside an app's own tables, hence the `fetch_` names. `due_at` is the queue: a row with one waits for work,
a row without is at rest. A claim moves `due_at` forward by the lease and writes a token that fences the result.
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
HELD_UNTIL = datetime(9999, 1, 1, tzinfo=UTC)  # when a job is due that an operator holds


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC times on every database. A naive time is refused, since nobody can know what it means."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Microseconds also on MySQL and MariaDB, where seconds are the default."""
        if dialect.name in MYSQL_FAMILY:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses a naive time (ValueError); everything else is stored as UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone can't be stored: {value!r}")
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        """None on PostgreSQL, where times come aware and in UTC: `worker.store.engine` sets the zone."""
        return None if dialect.name == "postgresql" else super().result_processor(dialect, coltype)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Times come back aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only where the type is INTEGER
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
    Column("default_address", Boolean, nullable=False, server_default=text("false")),  # it is that of SD_API_URL
    Column("status", String(16), nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("reference", String(255)),
    Column("on_done", String(255)),
    Column("webhook_url", Text),
    Column("eta", Double),
    Column("eta_at", UtcDateTime),  # when it came, where that was after the submission
    Column("not_ready_at", UtcDateTime),  # when the API last said so
    Column("pace_scale", Double),  # how the worth of a request grows: see `worker.core.pacing.policy.urgency`
    Column("pace_growth", Double),
    Column("polls", Integer, nullable=False, server_default="0"),
    Column("failed_answers", SmallInteger, nullable=False, server_default="0"),
    Column("unknown_answers", SmallInteger, nullable=False, server_default="0"),
    Column("error_answers", SmallInteger, nullable=False, server_default="0"),
    Column("empty_answers", SmallInteger, nullable=False, server_default="0"),
    Column("struck_at", UtcDateTime),
    Column("last_answer", String(600)),  # the last ones, newest first, a line each: see `worker.core.answer_history`
    Column("submitted_at", UtcDateTime, nullable=False),
    Column("tracked_at", UtcDateTime, nullable=False),
    Column("deadline_at", UtcDateTime, nullable=False),
    Column("deadline_seconds", Double, nullable=False),
    Column("due_at", UtcDateTime),
    Column("asked_at", UtcDateTime),
    Column("ready_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    Column("told_at", UtcDateTime),
    Column("on_done_attempts", SmallInteger, nullable=False, server_default="0"),  # that the broker refused
    Column("on_done_due_at", UtcDateTime),  # not sent before; also while a process sends it
    Column("on_done_error", String(255)),
    Column("announced_at", UtcDateTime),  # when the event of the present final state was made
    Column("held_at", UtcDateTime),  # since when an operator holds it: its due time is `HELD_UNTIL` then
    Column("claim_token", String(32)),
    Column("claim_holder", String(32)),
    Column("error_code", String(32)),
    Column("error_message", Text),
    UniqueConstraint("account", "fetch_base", "remote_id", name="uq_fetch_jobs_same_job"),
    CheckConstraint(
        "status IN ('pending', 'downloading', 'completed', 'failed', 'expired', 'cancelled')", name="known_status"
    ),
    CheckConstraint(f"({_FINAL}) = (completed_at IS NOT NULL)", name="final_has_completed_at"),
    CheckConstraint(f"NOT ({_FINAL}) OR due_at IS NULL", name="final_is_at_rest"),
    CheckConstraint("status <> 'pending' OR due_at IS NOT NULL", name="pending_is_due"),
    CheckConstraint("status NOT IN ('failed', 'expired') OR error_code IS NOT NULL", name="failed_has_code"),
    CheckConstraint("status NOT IN ('downloading', 'completed') OR ready_at IS NOT NULL", name="ready_has_ready_at"),
    CheckConstraint("claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)", name="claim_is_leased"),
    CheckConstraint("polls >= 0", name="polls_count_up"),
    # Its last column changes with every claim and every answer, so PostgreSQL can't make heap-only (HOT) updates here:
    # 0 of 160,000 were. The fillfactor of 70 is kept for another reason: a new row version finds room on its own page.
    # 80,000 polls of 20,000 jobs let the table grow by 15 to 24 MiB with it, and by 57 to 100 MiB without it.
    Index("ix_fetch_jobs_best", "account", "priority", "fetch_host", "due_at", **_where("due_at IS NOT NULL")),
    Index("ix_fetch_jobs_remote_id", "remote_id"),
    Index("ix_fetch_jobs_reference", "reference", **_where("reference IS NOT NULL")),
    # Where a database can: without the jobs that wait, whose rows change all the time.
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
    # The same two for MariaDB, which has no partial indexes and would go through all final jobs; empty everywhere else.
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
    sqlite_autoincrement=True,  # ids are never used twice: files are named after them
)

# MariaDB and MySQL have no partial indexes. There this generated column holds the account of each job that has a due
# time, and is NULL for all others, so that its index leaves out the jobs at rest. No other database has the column, and
# nothing writes it, so it is no part of the table above.
waiting_account = literal_column("fetch_jobs.waiting_account", String(64))
MYSQL_ONLY = frozenset({"waiting_account", "ix_fetch_jobs_waiting"})

outputs = Table(
    "fetch_outputs",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("url", Text, nullable=False),
    Column("proxy_urls", Text, nullable=False),  # a JSON list
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
    Column("listed_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime),
    Column("queued_at", UtcDateTime),
    Column("stored_at", UtcDateTime),
    Column("claimed_at", UtcDateTime),  # when the last attempt began
    Column("received_bytes", BigInteger),  # of the attempt that is under way, as of a few seconds ago
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
    Column("event_id", String(64), nullable=False),  # what the receiver knows it by
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(16), nullable=False),
    Column("url", Text, nullable=False),
    Column("body", _LongText, nullable=False),  # the same each time
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
    Column("body", _LongText, nullable=False),  # scrubbed, its first 64 KiB
    Column("recognised", Boolean, nullable=False, server_default=text("false")),  # a rule read it; its job ended by it
    Index("ix_fetch_unread_job_id", "job_id"),
    Index("ix_fetch_unread_shape", "shape"),
    comment="the last answers that no rule reads, and the last answer of each job that ended without an output",
    sqlite_autoincrement=True,
)

promises = Table(
    "fetch_promises",
    metadata,
    Column("job_id", _Id, ForeignKey("fetch_jobs.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("urls", _LongText, nullable=False),  # a JSON list
    Column("tried_at", UtcDateTime),  # since when they are tried; the three below are set with it
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

paces = Table(
    "fetch_paces",
    metadata,
    Column("account", String(64), primary_key=True),
    Column("kind", String(64), primary_key=True),  # empty: the account as a whole
    Column("state", Text, nullable=False),  # a model's snapshot, JSON
    Column("version", Integer, nullable=False),
    Column("learned_at", UtcDateTime, nullable=False),
    comment="how long jobs of each kind take, as polls showed",
)

crashes = Table(
    "fetch_crashes",
    metadata,
    Column("scope", String(8), primary_key=True),  # job or output
    Column("row_id", BigInteger, primary_key=True, autoincrement=False),
    Column("times", Integer, nullable=False),  # in a row
    Column("attempt", Integer, nullable=False),  # the row's own count of attempts at the last crash
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
    Column("paused_at", UtcDateTime),  # since when an operator holds it
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
