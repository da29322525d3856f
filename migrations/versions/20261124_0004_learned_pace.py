"""Store how long jobs take, per account and kind, and for each job when it was last seen not ready.

The previous version of the worker leaves the new columns empty. Jobs with empty columns are polled first.

Every constraint has a name.

Revision 0004, after 0003, 2026-11-24.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    """Add the table and the columns."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    op.create_table(
        "fetch_paces",
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("learned_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("account", "kind", name="pk_fetch_paces"),
        comment="how long jobs of each kind take, as polls showed",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        if_not_exists=True,
    )
    for name, kind in (
        ("eta_at", MOMENT),
        ("not_ready_at", MOMENT),
        ("pace_scale", sa.Double()),
        ("pace_growth", sa.Double()),
    ):
        op.add_column("fetch_jobs", sa.Column(name, kind, nullable=True), if_not_exists=repeatable)


def downgrade() -> None:
    """Drop the table and the columns."""
    for name in ("pace_growth", "pace_scale", "not_ready_at", "eta_at"):
        op.drop_column("fetch_jobs", name)
    op.drop_table("fetch_paces")
