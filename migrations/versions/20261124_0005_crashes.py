"""Count the consecutive crashes of processes that worked on a job or an output.

The previous version of the worker does not use the table.

Every constraint has a name.

Revision 0005, after 0004, 2026-11-24.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "fetch_crashes",
        sa.Column("scope", sa.String(8), nullable=False),
        sa.Column("row_id", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("times", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("crashed_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("scope", "row_id", name="pk_fetch_crashes"),
        comment="jobs and outputs whose process died, how often in a row",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("fetch_crashes")
