"""Support for an app's own Alembic or Flask-Migrate on a database that it shares with fetch-worker."""

from collections.abc import Mapping

from worker.store.schema import VERSION_TABLE, metadata

OWN_TABLES = frozenset({VERSION_TABLE, *metadata.tables})


def include_name(name: str | None, kind: str, parent_names: Mapping[str, str | None]) -> bool:
    """Return False for our tables. Pass it to Alembic as `include_name`, so that autogenerate skips them."""
    return kind != "table" or name not in OWN_TABLES
