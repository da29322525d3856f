"""Autogenerate of an app's own Alembic, and of Flask-Migrate, on the database that the app shares with us."""

import os
import subprocess
import sys
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table

from worker.alembic import include_name

FLASK_APP = """
import os

from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

from worker.alembic import include_name

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["APP_DATABASE"]
db = SQLAlchemy(app)
Migrate(app, db, include_name=include_name)


class Order(db.Model):
    id = db.Column(db.Integer, primary_key=True)
"""


def test_autogenerate_of_an_app_ignores_our_tables(engine: Engine) -> None:
    app_metadata = MetaData()
    Table("orders", app_metadata, Column("id", Integer, primary_key=True))
    with engine.connect() as connection:
        changes = compare_metadata(
            MigrationContext.configure(connection, opts={"include_name": include_name}), app_metadata
        )

    assert [(change[0], change[1].name) for change in changes] == [("add_table", "orders")]


def _flask(folder: Path, engine: Engine, *arguments: str) -> None:
    environment = os.environ | {
        "APP_DATABASE": engine.url.render_as_string(hide_password=False),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr


def test_autogenerate_of_flask_migrate_ignores_our_tables(engine: Engine, tmp_path: Path) -> None:
    """The first migration makes the app's table only, and the second one nothing."""
    (tmp_path / "app.py").write_text(FLASK_APP)
    _flask(tmp_path, engine, "db", "init")
    try:
        _flask(tmp_path, engine, "db", "migrate", "--rev-id", "one", "-m", "first")
        _flask(tmp_path, engine, "db", "upgrade")
        _flask(tmp_path, engine, "db", "migrate", "--rev-id", "two", "-m", "second")
    finally:
        with engine.begin() as connection:
            for table in ('"order"' if engine.dialect.name != "mariadb" else "`order`", "alembic_version"):
                connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")

    (only,) = (tmp_path / "migrations/versions").glob("*.py")  # Flask-Migrate writes no file without a change
    assert "create_table('order'" in only.read_text()
    assert "fetch_" not in only.read_text()
