"""Indexes for claims in the best order with any number of jobs, and columns for the learned rate limit of an account.

The index of due jobs has priority and host before the due time, so that a claim reads only the rows that it takes. The
index of references leaves out jobs without one. On PostgreSQL, the index of states leaves out pending jobs. There the
table of jobs also has free space in its pages and is vacuumed early, because each request updates its row twice.

Every constraint has a name.

Revision 0002, after 0001, 2026-11-23.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
HOT = {
    "fillfactor": "70",
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_analyze_scale_factor": "0.05",
    "autovacuum_vacuum_cost_delay": "0",
}


def partial(condition: str) -> dict[str, Any]:
    """Return the condition of a partial index, for the databases that have partial indexes."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Add the columns and the new index, and drop the old index."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.add_column("fetch_gates", sa.Column("ceiling", sa.Double(), nullable=True), if_not_exists=repeatable)
    op.add_column("fetch_gates", sa.Column("cut_at", MOMENT, nullable=True), if_not_exists=repeatable)
    op.create_index(
        "ix_fetch_jobs_best",
        "fetch_jobs",
        ["account", "priority", "fetch_host", "due_at"],
        **partial("due_at IS NOT NULL"),
        if_not_exists=True,
    )
    op.drop_index("ix_fetch_jobs_due", table_name="fetch_jobs", if_exists=True)
    op.drop_index("ix_fetch_jobs_reference", table_name="fetch_jobs", if_exists=True)
    op.create_index(
        "ix_fetch_jobs_reference", "fetch_jobs", ["reference"], **partial("reference IS NOT NULL"), if_not_exists=True
    )
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_fetch_jobs_status", table_name="fetch_jobs", if_exists=True)
        op.create_index(
            "ix_fetch_jobs_status",
            "fetch_jobs",
            ["status", "id"],
            postgresql_where=sa.text("status <> 'pending'"),
            if_not_exists=True,
        )
        op.execute(f"ALTER TABLE fetch_jobs SET ({', '.join(f'{name} = {value}' for name, value in HOT.items())})")


def downgrade() -> None:
    """Restore the first tables."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE fetch_jobs RESET ({', '.join(HOT)})")
        op.drop_index("ix_fetch_jobs_status", table_name="fetch_jobs")
        op.create_index("ix_fetch_jobs_status", "fetch_jobs", ["status", "id"])
    op.drop_index("ix_fetch_jobs_reference", table_name="fetch_jobs")
    op.create_index("ix_fetch_jobs_reference", "fetch_jobs", ["reference"])
    op.create_index("ix_fetch_jobs_due", "fetch_jobs", ["account", "due_at"], **partial("due_at IS NOT NULL"))
    op.drop_index("ix_fetch_jobs_best", table_name="fetch_jobs")
    op.drop_column("fetch_gates", "cut_at")
    op.drop_column("fetch_gates", "ceiling")
