"""Let MariaDB and MySQL find the jobs with a due time without reading the other jobs.

They have no partial indexes. A generated column holds the account of each job that has a due time, and is NULL for all
other jobs. The index on it has the purpose of the partial index `ix_fetch_jobs_best` on other databases. It also
contains the deadline, so that jobs past their deadline are found without reading every waiting job.

Revision 0008, after 0007, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

MYSQL_FAMILY = ("mysql", "mariadb")
NAME = sa.String(64, collation="utf8mb4_bin")


def upgrade() -> None:
    """Add the column and its index."""
    if op.get_bind().dialect.name not in MYSQL_FAMILY:
        return
    waiting = sa.Computed("IF(due_at IS NULL, NULL, account)", persisted=False)
    op.add_column("fetch_jobs", sa.Column("waiting_account", NAME, waiting, nullable=True), if_not_exists=True)
    columns = ["waiting_account", "priority", "fetch_host", "due_at", "deadline_at"]
    op.create_index("ix_fetch_jobs_waiting", "fetch_jobs", columns, if_not_exists=True)


def downgrade() -> None:
    """Drop the column and its index."""
    if op.get_bind().dialect.name not in MYSQL_FAMILY:
        return
    op.drop_index("ix_fetch_jobs_waiting", table_name="fetch_jobs")
    op.drop_column("fetch_jobs", "waiting_account")
