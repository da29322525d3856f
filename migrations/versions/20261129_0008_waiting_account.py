"""MariaDB and MySQL find the jobs with a due time without reading the jobs at rest.

They have no partial indexes. A generated column holds the account of each job that has a due time and is NULL for all
others, and the index on it takes the part that the partial index `ix_fetch_jobs_best` has on other databases. It holds
the deadline, too, so that jobs past it are found without reading every job that waits.

Revision 0008, after 0007, 2026-11-29.
"""

import sqlalchemy as sa
from alembic import op

from worker.store.schema_steps import add_column, create_index

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
    add_column("fetch_jobs", sa.Column("waiting_account", NAME, waiting, nullable=True))
    columns = ["waiting_account", "priority", "fetch_host", "due_at", "deadline_at"]
    create_index("ix_fetch_jobs_waiting", "fetch_jobs", columns)


def downgrade() -> None:
    """Forget them."""
    if op.get_bind().dialect.name not in MYSQL_FAMILY:
        return
    op.drop_index("ix_fetch_jobs_waiting", table_name="fetch_jobs")
    op.drop_column("fetch_jobs", "waiting_account")
