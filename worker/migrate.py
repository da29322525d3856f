"""Brings the tables up to this version, in a checkout as well as from an installed wheel."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from worker.database import connected, schema_version

_HERE = Path(__file__).parent


def scripts() -> Path:
    """The folder of the migration scripts: inside the package where it was installed, beside it in a checkout."""
    inside = _HERE / "migrations"
    return inside if inside.is_dir() else _HERE.parent / "migrations"


def migrate(engine: Engine) -> tuple[str | None, str | None]:
    """Runs what is missing; the version before and after. Raises Unavailable where the database does not answer."""
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    with connected(engine.url), engine.connect() as connection:
        before = schema_version(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
        return before, schema_version(connection)
