"""Use a case-sensitive collation on MariaDB and MySQL, as on the other databases: `Shop` and `shop` are two accounts.

Their default collation ignores case, so two accounts or two remote ids could be treated as one.

Imports nothing from the project. Every constraint has a name.

Revision 0003, after 0002, 2026-11-24.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("fetch_jobs", "fetch_outputs", "fetch_output_bodies", "fetch_gates")


def upgrade() -> None:
    """Convert the tables to a case-sensitive collation."""
    _convert("utf8mb4_bin")


def downgrade() -> None:
    """Restore the server's default collation."""
    _convert("utf8mb4_general_ci")


def _convert(collation: str) -> None:
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        for table in TABLES:
            op.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
