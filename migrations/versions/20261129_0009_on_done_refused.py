"""Columns for `on_done` calls that a broker refuses: number of attempts, time of the next attempt, last error.

Revision 0009, after 0008, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
COLUMNS = ("on_done_attempts", "on_done_due_at", "on_done_error")


def upgrade() -> None:
    """Add the columns."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.add_column(
        "fetch_jobs",
        sa.Column("on_done_attempts", sa.SmallInteger(), nullable=False, server_default="0"),
        if_not_exists=repeatable,
    )
    op.add_column("fetch_jobs", sa.Column("on_done_due_at", MOMENT, nullable=True), if_not_exists=repeatable)
    op.add_column("fetch_jobs", sa.Column("on_done_error", sa.String(255), nullable=True), if_not_exists=repeatable)


def downgrade() -> None:
    """Drop the columns."""
    for name in reversed(COLUMNS):
        op.drop_column("fetch_jobs", name)
