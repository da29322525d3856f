"""A POST that must not be sent twice: whether a request reached the server whole decides what the caller may do."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import requests

from worker.net.deadlines import TimeLimit
from worker.net.pooled_adapter import NothingSent, PooledAdapter

LARGE = b"x" * 8_000_000
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


def read_whole(connection: socket.socket) -> None:
    """Read a request to its end."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)


def close_at_once(connection: socket.socket) -> None:
    """Close without reading. Unread bytes make the system reset the connection."""


def close_in_the_middle(connection: socket.socket) -> None:
    """Read a part of the request, then close."""
    connection.recv(65_536)


def close_after_reading(connection: socket.socket) -> None:
    """Read the request, and close without an answer."""
    read_whole(connection)


def never_answer(connection: socket.socket) -> None:
    """Read the request, and wait."""
    read_whole(connection)
    threading.Event().wait(5)


def never_read(connection: socket.socket) -> None:
    """Wait."""
    threading.Event().wait(5)


def answer_partly(connection: socket.socket) -> None:
    """Read the request, and answer only the beginning."""
    read_whole(connection)
    connection.sendall(ANSWER[:-1])


def answer_whole(connection: socket.socket) -> None:
    """Read the request, and answer it."""
    read_whole(connection)
    connection.sendall(ANSWER)


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serve one connection, and yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    behave(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api/v6/images/text2img"


def post(url: str, body: bytes, seconds: float = 3.0) -> int:
    """Send one request, and return the status of its answer."""
    adapter = PooledAdapter(connections=1, limit=1_000)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    with TimeLimit(seconds):
        return adapter.post_once(url, headers, body, (seconds, seconds)).status


@pytest.mark.parametrize("behave", [close_at_once, close_in_the_middle])
def test_given_a_connection_that_ends_before_the_request_is_sent_whole_then_nothing_counts_as_sent(
    behave: Callable[[socket.socket], None],
) -> None:
    with server(behave) as url, pytest.raises(NothingSent):
        post(url, LARGE)


@pytest.mark.parametrize("behave", [close_after_reading, answer_partly])
def test_given_a_request_that_was_sent_whole_when_no_whole_answer_comes_then_it_counts_as_sent(
    behave: Callable[[socket.socket], None],
) -> None:
    with server(behave) as url, pytest.raises(requests.RequestException):
        post(url, LARGE)


def test_given_a_server_that_never_answers_then_the_request_counts_as_sent() -> None:
    with server(never_answer) as url, pytest.raises(requests.RequestException):
        post(url, b"{}", seconds=0.5)


def test_given_a_server_that_does_not_read_when_the_time_is_over_then_nothing_counts_as_sent() -> None:
    with server(never_read) as url, pytest.raises(NothingSent):
        post(url, LARGE, seconds=0.5)


def test_given_no_server_then_nothing_is_sent() -> None:
    with socket.socket() as reserved:  # bound but not listening
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(NothingSent, match="refused"):
            post(f"http://127.0.0.1:{reserved.getsockname()[1]}/api/v6/images/text2img", b"{}")


def test_given_a_server_without_tls_then_nothing_is_sent() -> None:
    with server(close_in_the_middle) as url, pytest.raises(NothingSent):
        post(url.replace("http:", "https:"), b"{}")


def test_given_an_early_answer_when_the_server_does_not_read_the_rest_then_the_answer_is_returned() -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(TOO_LARGE)
        connection.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while connection.recv(1_000_000):
                pass

    with server(refuse) as url:
        assert post(url, LARGE) == 413


def test_given_a_permit_that_is_refused_then_no_byte_is_sent() -> None:
    received: list[bytes] = []

    def refuse() -> None:
        raise PermissionError("the claim is lost")

    with server(lambda connection: received.append(connection.recv(10))) as url:
        adapter = PooledAdapter(connections=1, limit=1_000)
        with TimeLimit(3.0, refuse), pytest.raises(NothingSent):
            adapter.post_once(url, {"Content-Length": "2"}, b"{}", (3.0, 3.0))
    assert received in ([], [b""])
