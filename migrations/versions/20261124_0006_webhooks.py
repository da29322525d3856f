"""Webhooks: the URL of each job, and one event for each final state until it is delivered.

Revision 0006, after 0005, 2026-11-24.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def partial(condition: str) -> dict[str, Any]:
    """Return the condition of a partial index, for the databases that have partial indexes."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Add the columns and the table."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.add_column("fetch_jobs", sa.Column("webhook_url", sa.Text(), nullable=True), if_not_exists=repeatable)
    op.add_column("fetch_jobs", sa.Column("announced_at", MOMENT, nullable=True), if_not_exists=repeatable)
    op.create_index(
        "ix_fetch_jobs_unannounced",
        "fetch_jobs",
        ["completed_at"],
        **partial("completed_at IS NOT NULL AND webhook_url IS NOT NULL AND announced_at IS NULL"),
        if_not_exists=True,
    )
    op.create_index(  # for MariaDB, which has no partial indexes; empty on other databases
        "ix_fetch_jobs_unannounced_mysql",
        "fetch_jobs",
        ["announced_at", "webhook_url"],
        mysql_length={"webhook_url": 1},
        mariadb_length={"webhook_url": 1},
        **partial("false"),
        if_not_exists=True,
    )
    op.create_table(
        "fetch_events",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("event_id", sa.String(64), nullable=False),
        sa.Column("job_id", ROW_ID, nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("body", sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.Column("claim_token", sa.String(32), nullable=True),
        sa.Column("claim_holder", sa.String(32), nullable=True),
        sa.Column("http_status", sa.SmallInteger(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'failed')", name=op.f("ck_fetch_events_known_status")),
        sa.CheckConstraint("(status = 'pending') = (due_at IS NOT NULL)", name=op.f("ck_fetch_events_pending_is_due")),
        sa.CheckConstraint(
            "(status = 'pending') = (ended_at IS NULL)", name=op.f("ck_fetch_events_ended_has_ended_at")
        ),
        sa.CheckConstraint(
            "claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)",
            name=op.f("ck_fetch_events_claim_is_leased"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_events")),
        sa.UniqueConstraint("event_id", name="uq_fetch_events_event_id"),
        comment="what is told by webhook: one event for each final state of a job that has an address",
        sqlite_autoincrement=True,
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        if_not_exists=True,
    )
    op.create_index("ix_fetch_events_job_id", "fetch_events", ["job_id"], if_not_exists=True)
    op.create_index(
        "ix_fetch_events_due", "fetch_events", ["due_at"], **partial("due_at IS NOT NULL"), if_not_exists=True
    )
    op.create_index(
        "ix_fetch_events_holder",
        "fetch_events",
        ["claim_holder"],
        **partial("claim_holder IS NOT NULL"),
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the columns and the table."""
    op.drop_table("fetch_events")
    op.drop_index("ix_fetch_jobs_unannounced_mysql", table_name="fetch_jobs")
    op.drop_index("ix_fetch_jobs_unannounced", table_name="fetch_jobs")
    op.drop_column("fetch_jobs", "announced_at")
    op.drop_column("fetch_jobs", "webhook_url")
