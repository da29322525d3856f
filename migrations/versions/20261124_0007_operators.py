"""Counters and their history, holds by operators, download progress, and an index for unsent `on_done` on MariaDB.

Revision 0007, after 0006, 2026-11-24.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
ADDED = (
    ("fetch_jobs", "held_at", MOMENT),
    ("fetch_outputs", "claimed_at", MOMENT),
    ("fetch_outputs", "received_bytes", sa.BigInteger()),
    ("fetch_gates", "paused_at", MOMENT),
)


def upgrade() -> None:
    """Add the columns and the tables."""
    repeatable = op.get_context().dialect.name != "sqlite"  # SQLite has no such clause for columns, and rolls back
    for table, name, type_ in ADDED:
        op.add_column(table, sa.Column(name, type_, nullable=True), if_not_exists=repeatable)
    op.create_index(  # for MariaDB, which has no partial indexes and read all final jobs; empty on other databases
        "ix_fetch_jobs_untold_mysql",
        "fetch_jobs",
        ["told_at", "on_done"],
        mysql_length={"on_done": 1},
        mariadb_length={"on_done": 1},
        postgresql_where=sa.text("false"),
        sqlite_where=sa.text("false"),
        if_not_exists=True,
    )
    op.create_table(
        "fetch_totals",
        sa.Column("name", sa.String(24), nullable=False),
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("slot", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("times", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", "account", "kind", "label", "slot", name=op.f("pk_fetch_totals")),
        comment="what has happened so far: counts and sums, in slots that add up",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        if_not_exists=True,
    )
    op.create_table(
        "fetch_history",
        sa.Column("minute", MOMENT, nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("minute", name=op.f("pk_fetch_history")),
        comment="how everything stood, once a minute",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the columns and the tables."""
    op.drop_table("fetch_history")
    op.drop_table("fetch_totals")
    op.drop_index("ix_fetch_jobs_untold_mysql", table_name="fetch_jobs")
    for table, name, _ in reversed(ADDED):
        op.drop_column(table, name)
