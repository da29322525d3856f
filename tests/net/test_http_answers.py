"""Responses from bytes on a connection: the fast reader reads the same as the general one."""

import socket
import threading
from collections.abc import Callable
from http.client import HTTPException

import pytest

from worker.net import http_answers
from worker.net.http_answers import WholeAnswer

pytestmark = pytest.mark.every_python

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\nx-a: 2\r\n\r\n{}"
RAW_ANSWERS = {
    "the usual one": OK,
    "an error": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\ndown",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}",
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no headers": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "no content": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "HTTP/1.0": OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/2": OK.replace(b"HTTP/1.1", b"HTTP/2"),
    "a status that is none": OK.replace(b"200", b"2x0"),
    "two spaces": OK.replace(b" 200 ", b"  200 "),
    "bare line feeds": OK.replace(b"\r\n", b"\n"),
    "a bare line feed in a header": OK.replace(b"X-A: 1", b"X-A: 1\nX-B: 2"),
    "a bare carriage return": OK.replace(b"X-A: 1", b"X-A: \r1\r"),
    "a folded header": OK.replace(b"X-A: 1", b"X-A: 1\r\n 2"),
    "a header without a colon": OK.replace(b"X-A: 1", b"X-A"),
    "a blank before the colon": OK.replace(b"Content-Length:", b"Content-Length :"),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: x\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "not quite chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": OK.replace(b"X-A: 1", b"Content-Length: 3"),
    "one length twice": OK.replace(b"X-A: 1", b"Content-Length: 2"),
    "a length that is none": OK.replace(b": 2", b": -2"),
    "cut off in the headers": OK[:30],
    "cut off in the body": OK[:-1],
    "cut off at once": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "larger than the limit": b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000,
    "a hundred headers": OK.replace(b"X-A: 1", b"\r\n".join(b"X-%d: 1" % number for number in range(97))),
    "more headers than that": OK.replace(b"X-A: 1", b"\r\n".join(b"X-%d: 1" % number for number in range(99))),
    "something packed": OK.replace(b"X-A: 1", b"Content-Encoding: gzip"),
}


def read_by(read: Callable[[socket.socket], WholeAnswer], raw: bytes, first: int) -> object:
    """Read an answer whose first bytes arrive separately. Return the answer, or the type of the error."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        theirs.sendall(raw[:first])

        def send_rest() -> None:
            theirs.sendall(raw[first:])
            theirs.shutdown(socket.SHUT_WR)

        timer = threading.Timer(0.02 if first else 0.0, send_rest)
        timer.start()
        try:
            answer = read(ours)
        except (OSError, HTTPException, ValueError) as error:
            return type(error)
        finally:
            timer.join()
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return answer.status, answer.reason, headers, answer.body, answer.encoded


@pytest.mark.parametrize("first", [0, 20, 60])
@pytest.mark.parametrize("raw", RAW_ANSWERS.values(), ids=RAW_ANSWERS.keys())
def test_the_fast_reader_reads_the_same_as_the_general_reader(raw: bytes, first: int) -> None:
    short = read_by(lambda sock: http_answers.read_whole(sock, 1_000), raw, first)
    long = read_by(lambda sock: http_answers._read_any(b"", sock, 1_000), raw, first)

    assert short == long


def test_a_usual_answer_is_read_by_the_fast_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_answers, "_read_any", None)

    assert read_by(lambda sock: http_answers.read_whole(sock, 1_000), OK, 0) == (
        200,
        "OK",
        {"content-length": "2", "x-a": "1, 2"},
        b"{}",
        False,
    )


@pytest.mark.parametrize(
    ("raw", "reusable"), [(OK, True), (OK + b"more", False), (OK.replace(b"X-A: 1", b"Connection: close"), False)]
)
def test_given_extra_bytes_after_an_answer_then_its_connection_is_not_reused(raw: bytes, reusable: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(raw)

        assert http_answers.read_whole(ours, 1_000).reusable is reusable
