"""An app's own autogenerate on the database that it shares with us."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from worker.alembic import include_name


def test_an_app_s_autogenerate_leaves_our_tables_alone(engine: Engine) -> None:
    app = MetaData()
    Table("orders", app, Column("id", Integer, primary_key=True))
    with engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts={"include_name": include_name}), app)

    assert [(change[0], change[1].name) for change in found] == [("add_table", "orders")]
