"""Create the first tables: jobs, outputs, bytes from the answers themselves, circuit breakers of accounts and hosts.

Every constraint has a name.

Revision 0001, the first, 2026-11-22.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BODY = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def partial(condition: str) -> dict[str, Any]:
    """Return the condition of a partial index, for the databases that have partial indexes."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "fetch_gates",
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("proven", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("reason", sa.String(length=600), nullable=True),
        sa.Column("since", MOMENT, nullable=True),
        sa.Column("until", MOMENT, nullable=True),
        sa.Column("probe_at", MOMENT, nullable=True),
        sa.Column("probes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("troubles", sa.Integer(), server_default="0", nullable=False),
        sa.Column("released_at", MOMENT, nullable=True),
        sa.Column("asked_at", MOMENT, nullable=True),
        sa.CheckConstraint("scope IN ('account', 'host')", name=op.f("ck_fetch_gates_known_scope")),
        sa.CheckConstraint("(reason IS NULL) = (since IS NULL)", name=op.f("ck_fetch_gates_hold_has_since")),
        sa.PrimaryKeyConstraint("scope", "name", name=op.f("pk_fetch_gates")),
        comment="accounts and API hosts: may they be asked, and if not, why and until when",
        if_not_exists=True,
    )
    op.create_table(
        "fetch_jobs",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("account", sa.String(length=64), nullable=False),
        sa.Column("remote_id", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("fetch_url", sa.String(length=500), nullable=False),
        sa.Column("fetch_base", sa.String(length=500), nullable=False),
        sa.Column("fetch_host", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("reference", sa.String(length=255), nullable=True),
        sa.Column("on_done", sa.String(length=255), nullable=True),
        sa.Column("eta", sa.Double(), nullable=True),
        sa.Column("polls", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failed_answers", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("unknown_answers", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("error_answers", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("empty_answers", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("struck_at", MOMENT, nullable=True),
        sa.Column("last_answer", sa.String(length=600), nullable=True),
        sa.Column("submitted_at", MOMENT, nullable=False),
        sa.Column("tracked_at", MOMENT, nullable=False),
        sa.Column("deadline_at", MOMENT, nullable=False),
        sa.Column("deadline_seconds", sa.Double(), nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("asked_at", MOMENT, nullable=True),
        sa.Column("ready_at", MOMENT, nullable=True),
        sa.Column("completed_at", MOMENT, nullable=True),
        sa.Column("told_at", MOMENT, nullable=True),
        sa.Column("claim_token", sa.String(length=32), nullable=True),
        sa.Column("claim_holder", sa.String(length=32), nullable=True),
        sa.Column("error_code", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('completed', 'failed', 'expired', 'cancelled')) = (completed_at IS NOT NULL)",
            name=op.f("ck_fetch_jobs_final_has_completed_at"),
        ),
        sa.CheckConstraint(
            "NOT (status IN ('completed', 'failed', 'expired', 'cancelled')) OR due_at IS NULL",
            name=op.f("ck_fetch_jobs_final_is_at_rest"),
        ),
        sa.CheckConstraint("status <> 'pending' OR due_at IS NOT NULL", name=op.f("ck_fetch_jobs_pending_is_due")),
        sa.CheckConstraint(
            "status IN ('pending', 'downloading', 'completed', 'failed', 'expired', 'cancelled')",
            name=op.f("ck_fetch_jobs_known_status"),
        ),
        sa.CheckConstraint(
            "status NOT IN ('downloading', 'completed') OR ready_at IS NOT NULL",
            name=op.f("ck_fetch_jobs_ready_has_ready_at"),
        ),
        sa.CheckConstraint(
            "status NOT IN ('failed', 'expired') OR error_code IS NOT NULL", name=op.f("ck_fetch_jobs_failed_has_code")
        ),
        sa.CheckConstraint(
            "claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)",
            name=op.f("ck_fetch_jobs_claim_is_leased"),
        ),
        sa.CheckConstraint("polls >= 0", name=op.f("ck_fetch_jobs_polls_count_up")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_jobs")),
        sa.UniqueConstraint("account", "fetch_base", "remote_id", name="uq_fetch_jobs_same_job"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_jobs_due",
        "fetch_jobs",
        ["account", "due_at"],
        **partial("due_at IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_jobs_holder",
        "fetch_jobs",
        ["claim_holder"],
        **partial("claim_holder IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_index("ix_fetch_jobs_reference", "fetch_jobs", ["reference"], if_not_exists=True)
    op.create_index("ix_fetch_jobs_remote_id", "fetch_jobs", ["remote_id"], if_not_exists=True)
    op.create_index("ix_fetch_jobs_status", "fetch_jobs", ["status", "id"], if_not_exists=True)
    op.create_index(
        "ix_fetch_jobs_untold",
        "fetch_jobs",
        ["completed_at"],
        **partial("completed_at IS NOT NULL AND on_done IS NOT NULL AND told_at IS NULL"),
        if_not_exists=True,
    )
    op.create_table(
        "fetch_outputs",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("job_id", ROW_ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("proxy_urls", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("location", sa.Text(), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.String(length=64), nullable=True),
        sa.Column("media_type", sa.String(length=64), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("bad_bodies", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("dead_since", MOMENT, nullable=True),
        sa.Column("dead_attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("renewed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("listed_at", MOMENT, nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("queued_at", MOMENT, nullable=True),
        sa.Column("stored_at", MOMENT, nullable=True),
        sa.Column("claim_token", sa.String(length=32), nullable=True),
        sa.Column("claim_holder", sa.String(length=32), nullable=True),
        sa.Column("error_code", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.CheckConstraint("(status = 'pending') = (due_at IS NOT NULL)", name=op.f("ck_fetch_outputs_pending_is_due")),
        sa.CheckConstraint(
            "status <> 'failed' OR error_code IS NOT NULL", name=op.f("ck_fetch_outputs_failed_has_code")
        ),
        sa.CheckConstraint(
            "status <> 'stored' OR (location IS NOT NULL AND sha256 IS NOT NULL AND size_bytes IS NOT NULL"
            " AND media_type IS NOT NULL AND stored_at IS NOT NULL)",
            name=op.f("ck_fetch_outputs_stored_is_described"),
        ),
        sa.CheckConstraint("status IN ('pending', 'stored', 'failed')", name=op.f("ck_fetch_outputs_known_status")),
        sa.CheckConstraint(
            "claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)",
            name=op.f("ck_fetch_outputs_claim_is_leased"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_outputs_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_outputs")),
        sa.UniqueConstraint("job_id", "position", name="uq_fetch_outputs_position"),
        sqlite_autoincrement=True,
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_outputs_oldest",
        "fetch_outputs",
        ["listed_at", "id"],
        **partial("due_at IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_outputs_due",
        "fetch_outputs",
        ["due_at"],
        **partial("due_at IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_outputs_holder",
        "fetch_outputs",
        ["claim_holder"],
        **partial("claim_holder IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_table(
        "fetch_output_bodies",
        sa.Column("output_id", ROW_ID, nullable=False),
        sa.Column("body", BODY, nullable=False),
        sa.ForeignKeyConstraint(
            ["output_id"], ["fetch_outputs.id"], name=op.f("fk_fetch_output_bodies_output_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("output_id", name=op.f("pk_fetch_output_bodies")),
        comment="bytes that an answer carried itself, until they are stored",
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the tables with all jobs."""
    for table in ("fetch_output_bodies", "fetch_outputs", "fetch_jobs", "fetch_gates"):
        op.drop_table(table)
