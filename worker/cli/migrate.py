"""The command `migrate`."""

import click
from sqlalchemy import Engine

from worker.settings import load
from worker.store.engine import (
    SCHEMA_VERSION,
    encoding_message,
    make_engine,
    missing_tables,
    schema_version,
    shown_url,
    translate_errors,
    unsupported_encoding,
)
from worker.store.migrate import migrate as run_migrations
from worker.system.terminal import echo


@click.command()
def migrate() -> None:
    """Create the tables, or migrate them to this version."""
    engine = make_engine(load().database, any_encoding=True)
    try:
        missing = _missing(engine)
        before, after = run_migrations(engine)
        encoding = unsupported_encoding(engine)
    finally:
        engine.dispose()
    url = shown_url(engine.url)
    if encoding is not None:
        echo(f"fetch-worker: no process can start: {encoding_message(encoding)}", err=True)
    echo(f"{url} is at {after}" + (" already" if before == after else f", was {before or 'empty'}"))
    if missing:
        echo(f"made again, empty: {', '.join(missing)}", err=True)


def _missing(engine: Engine) -> list[str]:
    """Return the tables that were dropped from a database of the current version."""
    with translate_errors(engine.url), engine.connect() as connection:
        return missing_tables(connection) if schema_version(connection) == SCHEMA_VERSION else []
