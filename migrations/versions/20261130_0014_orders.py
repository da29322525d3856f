"""Orders: jobs that the worker itself posts to the API, and how many of them an account may have waiting there.

Revision 0014, after 0013, 2026-11-30.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0014"
down_revision = "0013"
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
CHECK = "ck_fetch_jobs_known_status"
OLD_STATES = "status IN ('pending', 'downloading', 'completed', 'failed', 'expired', 'cancelled')"
STATES = OLD_STATES.replace("(", "('ordered', 'uncertain', ")


def upgrade() -> None:
    """Allow the states of orders, and add the tables."""
    _allow_states(OLD_STATES, STATES)
    op.create_table(
        "fetch_orders",
        sa.Column("job_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("order_key", sa.String(64), nullable=False),
        sa.Column("queue", sa.String(64), nullable=True),
        sa.Column("takes_slot", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("order_rank", sa.SmallInteger(), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("endpoint", sa.String(500), nullable=False),
        sa.Column("payload", LONG_TEXT, nullable=False),
        sa.Column("payload_sha256", sa.String(64), nullable=False),
        sa.Column("ordered_at", MOMENT, nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("slot_until", MOMENT, nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempted_at", MOMENT, nullable=True),
        sa.Column("attempt_token", sa.String(32), nullable=True),
        sa.Column("claim_token", sa.String(32), nullable=True),
        sa.Column("claim_holder", sa.String(32), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "claim_token IS NULL OR (claim_holder IS NOT NULL AND due_at IS NOT NULL)",
            name=op.f("ck_fetch_orders_claim_is_leased"),
        ),
        sa.CheckConstraint("queue IS NOT NULL OR due_at IS NULL", name=op.f("ck_fetch_orders_due_is_queued")),
        sa.ForeignKeyConstraint(["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_orders_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_fetch_orders")),
        sa.UniqueConstraint("order_key", name="uq_fetch_orders_order_key"),
        comment="what apps ordered: the payload of each order, and whether it was sent",
        **OPTIONS,
        if_not_exists=True,
    )
    op.create_index(
        "ix_fetch_orders_queue", "fetch_orders", ["queue", "takes_slot", "order_rank", "job_id"], if_not_exists=True
    )
    is_claimed = sa.text("claim_holder IS NOT NULL")
    op.create_index(
        "ix_fetch_orders_holder",
        "fetch_orders",
        ["claim_holder"],
        postgresql_where=is_claimed,
        sqlite_where=is_claimed,
        if_not_exists=True,
    )
    op.create_table(
        "fetch_candidates",
        sa.Column("job_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("remote_id", sa.String(128), nullable=False),
        sa.Column("named_at", MOMENT, nullable=False),
        sa.Column("due_at", MOMENT, nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["fetch_jobs.id"], name=op.f("fk_fetch_candidates_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "remote_id", name=op.f("pk_fetch_candidates")),
        comment="remote ids that calls of the API named for orders whose answer is not known",
        **OPTIONS,
        if_not_exists=True,
    )
    is_due = sa.text("due_at IS NOT NULL")
    op.create_index(
        "ix_fetch_candidates_due_at",
        "fetch_candidates",
        ["due_at"],
        postgresql_where=is_due,
        sqlite_where=is_due,
        if_not_exists=True,
    )
    op.create_table(
        "fetch_slots",
        sa.Column("account", sa.String(64), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=True),
        sa.Column("refused_at", MOMENT, nullable=True),
        sa.Column("raised_at", MOMENT, nullable=True),
        sa.Column("paused_until", MOMENT, nullable=True),
        sa.Column("paused_at_taken", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_fetch_slots")),
        comment="how many orders of each account may wait at the API, as its refusals showed",
        **OPTIONS,
        if_not_exists=True,
    )


def downgrade() -> None:
    """Cancel the orders that the older version does not know, and drop the tables."""
    op.execute(
        "UPDATE fetch_jobs SET status = 'cancelled', completed_at = tracked_at WHERE status IN ('ordered', 'uncertain')"
    )
    for name in ("fetch_slots", "fetch_candidates", "fetch_orders"):
        op.drop_table(name, if_exists=True)
    _allow_states(STATES, OLD_STATES)


def _allow_states(before: str, after: str) -> None:
    """Replace the CHECK on the states of jobs. No row is rewritten, however many there are."""
    connection = op.get_bind()
    match connection.dialect.name:
        case "sqlite":
            # SQLite can't alter a CHECK. Its documentation of ALTER TABLE (section 7) says to edit the stored schema
            # if the content of the table stays valid. A new table would need foreign keys to be off, and a copy.
            version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
            connection.exec_driver_sql("PRAGMA writable_schema = ON")
            connection.execute(
                sa.text("UPDATE sqlite_master SET sql = replace(sql, :before, :after) WHERE name = 'fetch_jobs'"),
                {"before": before, "after": after},
            )
            connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
            connection.exec_driver_sql("PRAGMA writable_schema = OFF")
        case "postgresql":
            op.execute(f"ALTER TABLE fetch_jobs DROP CONSTRAINT IF EXISTS {CHECK}")
            op.execute(f"ALTER TABLE fetch_jobs ADD CONSTRAINT {CHECK} CHECK ({after}) NOT VALID")
            op.execute(f"ALTER TABLE fetch_jobs VALIDATE CONSTRAINT {CHECK}")
        case _:
            op.execute("SET check_constraint_checks = OFF")  # all rows are valid: they need not be checked
            op.execute(
                f"ALTER TABLE fetch_jobs DROP CONSTRAINT IF EXISTS {CHECK}, ADD CONSTRAINT {CHECK} CHECK ({after})"
            )
            op.execute("SET check_constraint_checks = ON")
