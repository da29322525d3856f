"""Tables for answers that no rule reads, for promised links, and for late looks at expired jobs.

Revision 0010, after 0009, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
OPTIONS = {
    f"{family}_{name}": value
    for family in ("mysql", "mariadb")  # two dialects in SQLAlchemy
    for name, value in (("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def upgrade() -> None:
    """Add the tables."""
    op.create_table(
        "fetch_unread",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("job_id", ROW_ID, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("http_status", sa.SmallInteger(), nullable=False),
        sa.Column("shape", sa.String(255), nullable=False),
        sa.Column("body", LONG_TEXT, nullable=False),
        sa.Column("recognised", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_unread_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_unread")),
        comment="the last answers that no rule reads, and the last answer of each job that ended without an output",
        sqlite_autoincrement=True,
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_index("ix_fetch_unread_job_id", "fetch_unread", ["job_id"], if_not_exists=True)
    op.create_index("ix_fetch_unread_shape", "fetch_unread", ["shape"], if_not_exists=True)
    op.create_table(
        "fetch_promises",
        sa.Column("job_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("urls", LONG_TEXT, nullable=False),
        sa.Column("tried_at", MOMENT, nullable=True),
        sa.Column("end_status", sa.String(16), nullable=True),
        sa.Column("end_code", sa.String(32), nullable=True),
        sa.Column("end_message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_promises_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fetch_promises")),
        comment="links at which the API promised outputs, and how a job would have ended without them",
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_table(
        "fetch_late_looks",
        sa.Column("job_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("looks", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("due_at", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_late_looks_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fetch_late_looks")),
        comment="expired jobs that are asked about again, how often they were, and when next",
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_index("ix_fetch_late_looks_due_at", "fetch_late_looks", ["due_at"], if_not_exists=True)


def downgrade() -> None:
    """Drop the tables."""
    for name in ("fetch_late_looks", "fetch_promises", "fetch_unread"):
        op.drop_table(name, if_exists=True)
