"""${message}.

Works with the code before it and the code after it: expand first, contract in a later release.
Imports nothing from the project. Every constraint has a name. Can run again after a crash on MariaDB, which commits each
DDL statement at once: `if_not_exists=True`, `if_exists=True` (not for columns on SQLite).

Revision ${up_revision}, after ${down_revision | comma,n}, ${create_date}.
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    """Apply the migration."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Revert the migration."""
    ${downgrades if downgrades else "pass"}
