"""Migration operations that can run again after a migration was interrupted.

PostgreSQL and SQLite roll back an interrupted migration. MariaDB and MySQL commit each DDL statement at once, so a
second run finds the changes of the first. On these databases, an operation is skipped if its change is already there.
"""

from typing import Any

from alembic import op
from sqlalchemy import Column, inspect
from sqlalchemy.sql.schema import SchemaItem


def create_table(name: str, *items: SchemaItem, **options: Any) -> None:
    """Create a table, as `op.create_table` does."""
    if not _commits_each_statement() or not inspect(op.get_bind()).has_table(name):
        op.create_table(name, *items, **options)


def add_column(table: str, column: Column[Any]) -> None:
    """Add a column, as `op.add_column` does."""
    if not _commits_each_statement() or column.name not in {
        existing["name"] for existing in inspect(op.get_bind()).get_columns(table)
    }:
        op.add_column(table, column)


def create_index(name: str, table: str, columns: list[str], **options: Any) -> None:
    """Create an index, as `op.create_index` does."""
    if not _commits_each_statement() or not inspect(op.get_bind()).has_index(table, name):
        op.create_index(name, table, columns, **options)


def drop_index(name: str, table: str) -> None:
    """Drop an index, as `op.drop_index` does."""
    if not _commits_each_statement() or inspect(op.get_bind()).has_index(table, name):
        op.drop_index(name, table_name=table)


def drop_column(table: str, name: str) -> None:
    """Drop a column, as `op.drop_column` does."""
    if not _commits_each_statement() or name in {
        existing["name"] for existing in inspect(op.get_bind()).get_columns(table)
    }:
        op.drop_column(table, name)


def drop_table(name: str) -> None:
    """Drop a table, as `op.drop_table` does."""
    if not _commits_each_statement() or inspect(op.get_bind()).has_table(name):
        op.drop_table(name)


def _commits_each_statement() -> bool:
    context = op.get_context()
    return context.dialect.name in ("mysql", "mariadb") and not context.as_sql
