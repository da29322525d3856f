"""Tables for the old files of moved outputs, and for the copy of a database.

Revision 0013, after 0012, 2026-11-30.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0013"
down_revision = "0012"
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
        "fetch_moved_files",
        sa.Column("id", ROW_ID, autoincrement=True, nullable=False),
        sa.Column("output_id", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fetch_moved_files")),
        comment="old files of outputs that `move-storage` has moved, until they are removed",
        sqlite_autoincrement=True,
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_table(
        "fetch_copies",
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("position", sa.Text(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("finished_at", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("source", name=op.f("pk_fetch_copies")),
        comment="the database whose rows `copy-database` has copied into this one",
        **OPTIONS,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Drop the tables."""
    for name in ("fetch_copies", "fetch_moved_files"):
        op.drop_table(name, if_exists=True)
