"""Mark the jobs whose address comes from SD_API_URL, so that they can follow when this setting is corrected.

Revision 0011, after 0010, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. The origin of existing jobs' addresses is unknown, so they keep their addresses."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.add_column(
        "fetch_jobs",
        sa.Column("default_address", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        if_not_exists=repeatable,
    )


def downgrade() -> None:
    """Drop the column."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.drop_column("fetch_jobs", "default_address", if_exists=repeatable)
