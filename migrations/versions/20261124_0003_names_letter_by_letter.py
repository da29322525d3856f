"""On MariaDB and MySQL names are compared letter by letter, as everywhere else: `Shop` and `shop` are two accounts.

Their default collation takes upper and lower case for the same, so two accounts or two remote ids could meet in one.

Imports nothing of ours. Every constraint has a name.

Revision 0003, after 0002, 2026-11-24.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = ("fetch_jobs", "fetch_outputs", "fetch_output_bodies", "fetch_gates")


def upgrade() -> None:
    """Exact comparison."""
    _convert("utf8mb4_bin")


def downgrade() -> None:
    """Back to what such a server does by itself."""
    _convert("utf8mb4_general_ci")


def _convert(collation: str) -> None:
    if op.get_bind().dialect.name in ("mysql", "mariadb"):
        for table in TABLES:
            op.execute(f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {collation}")
