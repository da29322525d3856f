"""Look for another Alembic history in the same database: its autogenerate would drop our tables without our filter."""

import ast
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, inspect

from worker.operations.liveness import Check
from worker.store.schema import VERSION_TABLE

MODULE, KEYWORD = "worker.alembic", "include_name"  # what the app's code imports, and how it passes the filter
FILES_MOST = 2_000
FILE_BYTES_MOST = 200_000
DEPTH_MOST = 5
SKIPPED = frozenset({"site-packages", "node_modules", "__pycache__", "venv"})
LINE = "pass include_name=worker.alembic.include_name to context.configure in its env.py, or to Flask-Migrate"


def check_app_migrations(connection: Connection, folder: Path) -> Check:
    """Check that an app's Alembic history beside ours uses the filter, as far as the code in `folder` shows it."""
    histories = other_histories(connection)
    if not histories:
        return Check("migrations", True, "no other Alembic history is in the database")
    history = f"the Alembic history {', '.join(histories)} is in the same database"
    sources = list(islice(_sources(folder), FILES_MOST))
    passing = next((path for path, text in sources if _passes_a_filter(text)), None)
    if passing is not None and any(MODULE in text for _, text in sources):
        return Check("migrations", True, f"{history}, and {passing} passes the filter that leaves our tables alone")
    environments = [path for path, text in sources if path.name == "env.py" and "alembic" in text]
    if environments:
        message = f"{history}, and {environments[0]} does not leave our tables alone: {LINE}"
        return Check("migrations", False, message)
    return Check("migrations", True, f"{history}; its code is not here. Make sure of one thing: {LINE}")


def other_histories(connection: Connection) -> list[str]:
    """Return the version tables of other Alembic histories, by their name and their one column."""
    inspector = inspect(connection)
    names = [name for name in inspector.get_table_names() if "version" in name.lower() and name != VERSION_TABLE]
    return [name for name in names if [column["name"] for column in inspector.get_columns(name)] == ["version_num"]]


def _sources(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the Python files of an app, with their text."""
    for place, folders, files in os.walk(folder):
        path = Path(place)
        deep = len(path.relative_to(folder).parts) >= DEPTH_MOST
        folders[:] = [] if deep else sorted(name for name in folders if name not in SKIPPED and name[0] != ".")
        for name in sorted(files):
            if name.endswith(".py"):
                text = _text(path / name)
                if text:
                    yield path / name, text


def _passes_a_filter(text: str) -> bool:
    """Return whether code passes the keyword to a call, or has it as a key of a dictionary. Comments do not count."""
    if KEYWORD not in text:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError):
        return False
    keywords = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    keys = {
        key.value for node in nodes if isinstance(node, ast.Dict) for key in node.keys if isinstance(key, ast.Constant)
    }
    return KEYWORD in keywords | keys


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= FILE_BYTES_MOST else ""
    except OSError:
        return ""
