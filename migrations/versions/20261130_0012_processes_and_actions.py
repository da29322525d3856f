"""Tables for the worker processes, which record that they run, and for the actions of operators.

Revision 0012, after 0011, 2026-11-30.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
OPTIONS = {
    f"{family}_{name}": value
    for family in ("mysql", "mariadb")  # two dialects in SQLAlchemy
    for name, value in (("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def upgrade() -> None:
    """Add the tables."""
    op.create_table(
        "fetch_processes",
        sa.Column("holder", sa.String(32), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("queues", sa.Text(), nullable=False),
        sa.Column("accounts", sa.Text(), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("redis_answers", sa.Boolean(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("seen_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("holder", name=op.f("pk_fetch_processes")),
        comment="worker processes: which queues and accounts they serve, and when they last said so",
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_table(
        "fetch_actions",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("who", sa.String(255), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("filter", sa.Text(), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_actions")),
        comment="what operators and apps changed by hand: when, from where, who, and how many jobs",
        sqlite_autoincrement=True,
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_index("ix_fetch_actions_job_id", "fetch_actions", ["job_id"], if_not_exists=True)


def downgrade() -> None:
    """Drop the tables."""
    for name in ("fetch_actions", "fetch_processes"):
        op.drop_table(name, if_exists=True)
