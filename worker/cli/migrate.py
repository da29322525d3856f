"""The command `migrate`."""

import click

from worker.settings import load
from worker.store.engine import encoding_message, make_engine, shown_url, unsupported_encoding
from worker.store.migrate import migrate as run_migrations
from worker.system.terminal import echo


@click.command()
def migrate() -> None:
    """Create the tables, or migrate them to this version."""
    engine = make_engine(load().database, any_encoding=True)
    try:
        before, after = run_migrations(engine)
        encoding = unsupported_encoding(engine)
    finally:
        engine.dispose()
    url = shown_url(engine.url)
    if encoding is not None:
        echo(f"fetch-worker: no process can start: {encoding_message(encoding)}", err=True)
    echo(f"{url} is at {after}" + (" already" if before == after else f", was {before or 'empty'}"))
