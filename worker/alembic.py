"""For an app's own Alembic or Flask-Migrate on the database that it shares with fetch-worker."""

from collections.abc import Mapping

from worker.store.schema import VERSION_TABLE, metadata

OURS = frozenset({VERSION_TABLE, *metadata.tables})


def include_name(name: str | None, kind: str, parent_names: Mapping[str, str | None]) -> bool:
    """Return False for our tables: hand it to Alembic as `include_name`, so that autogenerate leaves them alone."""
    return kind != "table" or name not in OURS
