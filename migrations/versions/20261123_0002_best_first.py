"""Claims best first at any size, and what rate limits taught about an account.

The index of due jobs goes by priority and host before time, so that a claim reads no row that it does not take, and
that of references leaves out jobs that have none. On PostgreSQL that of states leaves out the jobs that wait, and the
hot table keeps room in its pages and is vacuumed early: each request writes its row twice.

Every constraint has a name.

Revision 0002, after 0001, 2026-11-23.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from worker.store.schema_steps import add_column, create_index, drop_index

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
    """The condition of a partial index, where the database has such."""
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    """Add the columns and the index; the old index is of no more use."""
    add_column("fetch_gates", sa.Column("ceiling", sa.Double(), nullable=True))
    add_column("fetch_gates", sa.Column("cut_at", MOMENT, nullable=True))
    create_index(
        "ix_fetch_jobs_best",
        "fetch_jobs",
        ["account", "priority", "fetch_host", "due_at"],
        **partial("due_at IS NOT NULL"),
    )
    drop_index("ix_fetch_jobs_due", "fetch_jobs")
    drop_index("ix_fetch_jobs_reference", "fetch_jobs")
    create_index("ix_fetch_jobs_reference", "fetch_jobs", ["reference"], **partial("reference IS NOT NULL"))
    if op.get_bind().dialect.name == "postgresql":
        drop_index("ix_fetch_jobs_status", "fetch_jobs")
        create_index(
            "ix_fetch_jobs_status", "fetch_jobs", ["status", "id"], postgresql_where=sa.text("status <> 'pending'")
        )
        op.execute(f"ALTER TABLE fetch_jobs SET ({', '.join(f'{name} = {value}' for name, value in HOT.items())})")


def downgrade() -> None:
    """Back to the first tables."""
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
