"""Run the migrations on DATABASE_URL. Other tables in that database are ignored."""

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.sql.schema import SchemaItem

from worker.settings import load
from worker.store.engine import UNLIMITED, limit_statements, make_engine
from worker.store.schema import MYSQL_ONLY, VERSION_TABLE, metadata


def ours(item: SchemaItem, name: str | None, kind: str, reflected: bool, compare_to: SchemaItem | None) -> bool:
    """Return whether Alembic compares an item: not an app's own tables, nor items that only MariaDB and MySQL have."""
    return name in metadata.tables if kind == "table" else name not in MYSQL_ONLY


def run(connection: Connection) -> None:
    """Run the migrations on an open connection."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_object=ours,
        render_as_batch=connection.dialect.name == "sqlite",
        transaction_per_migration=True,
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    context.configure(
        url=load().database,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        literal_binds=True,
        include_object=ours,
    )
    with context.begin_transaction():
        context.run_migrations()
elif (connection := context.config.attributes.get("connection")) is not None:
    run(connection)
else:
    engine = make_engine(load().database)
    with engine.execution_options(**{UNLIMITED: True}).connect() as opened:
        limit_statements(opened, 0)
        run(opened)
        opened.commit()
    engine.dispose()
