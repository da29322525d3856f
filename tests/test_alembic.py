"""Autogenerate of an app's own Alembic on the database that it shares with us."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from worker.alembic import include_name


def test_autogenerate_of_an_app_ignores_our_tables(engine: Engine) -> None:
    app_metadata = MetaData()
    Table("orders", app_metadata, Column("id", Integer, primary_key=True))
    with engine.connect() as connection:
        changes = compare_metadata(
            MigrationContext.configure(connection, opts={"include_name": include_name}), app_metadata
        )

    assert [(change[0], change[1].name) for change in changes] == [("add_table", "orders")]
