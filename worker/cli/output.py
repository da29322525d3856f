"""Output of the commands: one JSON document, or a table for people."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from worker.core.display import display_json
from worker.core.humanize import iso_time
from worker.system.terminal import cell, echo, make_console

if TYPE_CHECKING:
    from rich.text import Text
    from sqlalchemy import Row

JOB_COLUMNS = (
    *("id", "account", "remote_id", "kind", "status", "reference", "polls", "eta", "priority", "submitted_at"),
    *("ready_at", "completed_at", "deadline_at", "error_code", "error_message"),
)
EVENT_COLUMNS = (
    *("event_id", "type", "url", "status", "attempts", "created_at", "due_at", "ended_at"),
    *("http_status", "error_message"),
)
COLOURS = {
    "completed": "green",
    "stored": "green",
    "failed": "red",
    "expired": "red",
    "cancelled": "yellow",
    "downloading": "cyan",
    "ordered": "cyan",
    "uncertain": "red",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")


def plain(row: "Row[Any]", columns: Sequence[str]) -> dict[str, Any]:
    """Return columns of a row as JSON values. Times are ISO 8601 with Z. A remote id that is not known is null."""
    values = {name: moment(value) if isinstance(value := row._mapping[name], datetime) else value for name in columns}
    return values | {"remote_id": values["remote_id"] or None} if "remote_id" in values else values


def moment(value: datetime | None) -> str | None:
    """Return a time in ISO 8601, UTC, with Z."""
    return None if value is None else iso_time(value)


def print_json(document: object) -> None:
    """Print a JSON document. It may contain times."""
    click.echo(display_json(json.dumps(document, ensure_ascii=False, indent=2, default=moment)))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print a table, or the line `empty` if there are no rows."""
    from rich.table import Table  # only here: documents and messages need no rich

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    make_console().print(table) if table.row_count else echo(empty)


def print_records(columns: Sequence[str], records: Iterable[Mapping[str, object]], *, empty: str) -> None:
    """Print these columns of records as a table, or the line `empty` if there are no records."""
    print_table(columns, [[record[name] for name in columns] for record in records], empty=empty)


def print_fields(values: Mapping[str, object]) -> None:
    """Print names and values, one per line. Names without a value are left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value is not None:
            table.add_row(name, _cell(value))
    make_console().print(table)


def _cell(value: object) -> "Text":
    if value is None:
        return cell("")
    text = f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else str(value)
    return cell(text, COLOURS.get(text, ""))
