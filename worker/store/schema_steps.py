"""Steps of a migration that can be taken again.

PostgreSQL and SQLite undo what a killed migration had begun. MariaDB and MySQL keep each statement once it is executed:
run again, a migration meets its own first half there, so a step that was taken is left out.
"""

from typing import Any

from alembic import op
from sqlalchemy import Column, inspect
from sqlalchemy.sql.schema import SchemaItem


def create_table(name: str, *items: SchemaItem, **options: Any) -> None:
    """`op.create_table`."""
    if not _keeps_halves() or not inspect(op.get_bind()).has_table(name):
        op.create_table(name, *items, **options)


def add_column(table: str, column: Column[Any]) -> None:
    """`op.add_column`."""
    if not _keeps_halves() or column.name not in {one["name"] for one in inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, column)


def create_index(name: str, table: str, columns: list[str], **options: Any) -> None:
    """`op.create_index`."""
    if not _keeps_halves() or not inspect(op.get_bind()).has_index(table, name):
        op.create_index(name, table, columns, **options)


def drop_index(name: str, table: str) -> None:
    """`op.drop_index`."""
    if not _keeps_halves() or inspect(op.get_bind()).has_index(table, name):
        op.drop_index(name, table_name=table)


def drop_column(table: str, name: str) -> None:
    """`op.drop_column`."""
    if not _keeps_halves() or name in {one["name"] for one in inspect(op.get_bind()).get_columns(table)}:
        op.drop_column(table, name)


def drop_table(name: str) -> None:
    """`op.drop_table`."""
    if not _keeps_halves() or inspect(op.get_bind()).has_table(name):
        op.drop_table(name)


def _keeps_halves() -> bool:
    context = op.get_context()
    return context.dialect.name in ("mysql", "mariadb") and not context.as_sql
