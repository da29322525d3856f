"""Columns for `on_done` calls that a broker refuses: number of attempts, time of the next attempt, last error.

Revision 0009, after 0008, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from worker.store.schema_steps import add_column

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
COLUMNS = ("on_done_attempts", "on_done_due_at", "on_done_error")


def upgrade() -> None:
    """Add the columns."""
    add_column("fetch_jobs", sa.Column("on_done_attempts", sa.SmallInteger(), nullable=False, server_default="0"))
    add_column("fetch_jobs", sa.Column("on_done_due_at", MOMENT, nullable=True))
    add_column("fetch_jobs", sa.Column("on_done_error", sa.String(255), nullable=True))


def downgrade() -> None:
    """Drop the columns."""
    for name in reversed(COLUMNS):
        op.drop_column("fetch_jobs", name)
