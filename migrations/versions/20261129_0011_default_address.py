"""Mark the jobs whose address comes from SD_API_URL, so that they can follow when this setting is corrected.

Revision 0011, after 0010, 2026-11-29.
"""

import sqlalchemy as sa

from worker.store.schema_steps import add_column, drop_column

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. The origin of existing jobs' addresses is unknown, so they keep their addresses."""
    add_column(
        "fetch_jobs", sa.Column("default_address", sa.Boolean(), nullable=False, server_default=sa.text("false"))
    )


def downgrade() -> None:
    """Drop the column."""
    drop_column("fetch_jobs", "default_address")
