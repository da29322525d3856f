"""Fixtures: the admin site on the test database, a client without a login, and an operator with a login."""

from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine

from tests.admin_pages import PASSWORD, VIEWER_PASSWORD, Clock, Operator
from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.settings import load


@pytest.fixture
def clock() -> Clock:
    """The clock of the access control."""
    return Clock()


@pytest.fixture
def site(engine: Engine, clock: Clock, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """The site, with the settings that it needs and without API keys."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}/out")
    return make_site(load(), AccessControl(PASSWORD, "127.0.0.1", clock, viewer_password=VIEWER_PASSWORD))


@pytest.fixture
def guest(site: Flask) -> FlaskClient:
    """A client without a login."""
    return site.test_client()


@pytest.fixture
def viewer(site: Flask) -> Operator:
    """A client with the login of a viewer."""
    return Operator(site.test_client(), VIEWER_PASSWORD)


@pytest.fixture
def operator(site: Flask) -> Operator:
    """A client with a login."""
    return Operator(site.test_client())
