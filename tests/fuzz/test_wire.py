"""Random bytes on a real connection: every call ends in time, and no connection is reused after invalid bytes."""
# ruff: noqa: E501  # rows of pieces

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.fuzz.answers import KEY
from tests.fuzz.effort import EFFORTS, with_effort
from worker.core.reply import ApiDown, Processing, Ready, Reply, Unread
from worker.polling.api_client import ApiClient
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address

SECONDS = 5.0
ROOM = 1.5  # for the watchdog and a busy machine
ODD_ID, GOOD_ID = "1", "2"
READY = b'{"status": "success", "output": ["https://h.example/a.png"]}'
GOOD_BODY = b'{"status": "processing", "eta": 7}'
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD_BODY), GOOD_BODY)


@dataclass
class Line:
    """A server with persistent connections. It answers one id with the given bytes, and all others correctly."""

    port: int = 0
    parts: tuple[bytes, ...] = ()
    then: str = "close"
    requests: list[tuple[int, str]] = field(default_factory=list)  # connection number, id
    connections: int = 0

    @property
    def allowed(self) -> AllowedApi:
        """Return the API at this server."""
        return AllowedApi(f"http://127.0.0.1:{self.port}/api/v3", frozenset({f"127.0.0.1:{self.port}"}))

    def serve(self, client: socket.socket, number: int) -> None:
        """Serve one connection until it ends."""
        with client, suppress(OSError), client.makefile("rb") as file:
            client.settimeout(30)
            while first := file.readline():
                length = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                file.read(length)
                remote_id = first.split()[1].rpartition(b"/")[2].decode()
                self.requests.append((number, remote_id))
                if remote_id != ODD_ID:
                    client.sendall(GOOD)
                    continue
                for part in self.parts:
                    client.sendall(part)
                until = time.monotonic() + 2 * ROOM
                while self.then == "drip" and time.monotonic() < until:
                    time.sleep(0.02)
                    client.sendall(b" ")
                match self.then:
                    case "close":
                        return
                    case "reset":
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01" + bytes(7))
                        return


@contextmanager
def serving() -> Iterator[Line]:
    """Run a server on a free port of this machine."""
    line = Line()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                line.connections += 1
                threading.Thread(target=line.serve, args=(client, line.connections), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        line.port = listener.getsockname()[1]
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield line
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture
def line() -> Iterator[Line]:
    """Run the server of the API."""
    with serving() as server:
        yield server


@dataclass
class Caller:
    """The API client of one process. All examples share it, so that one example can affect the next."""

    line: Line
    api: ApiClient
    seconds: float

    def ask(self, remote_id: str) -> Reply:
        """Make one call. It must end within its deadline. A busy machine may delay one call, so that is repeated."""
        reply, seconds = self._timed(remote_id)
        if seconds >= self.seconds + ROOM:
            reply, seconds = self._timed(remote_id)
        assert seconds < self.seconds + ROOM
        return reply

    def _timed(self, remote_id: str) -> tuple[Reply, float]:
        started = time.monotonic()
        reply = self.api.ask(fetch_address(None, remote_id, self.line.allowed), remote_id, SecretStr(KEY)).reply
        return reply, time.monotonic() - started

    def check_lines(self, reply: Reply) -> None:
        """Check the next call: it gets its own answer, and after a failed call it uses another connection."""
        broken = isinstance(reply, ApiDown) and reply.message.startswith("no answer")
        used = {number for number, remote_id in self.line.requests if remote_id == ODD_ID}
        assert self.ask(GOOD_ID) == Processing(7.0)
        assert self.line.requests[-1][1] == GOOD_ID
        if broken:
            assert self.line.requests[-1][0] not in used
        self.line.requests.clear()


@contextmanager
def calling(line: Line, seconds: float = SECONDS) -> Iterator[Caller]:
    """Open a caller, and close its connections afterwards."""
    api = ApiClient(line.allowed, Scrubber([KEY]), timeout=seconds, connections=4)
    yield Caller(line, api, seconds)
    api.session.close()


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_LINES = st.one_of(
    st.sampled_from(
        [b"HTTP/1.1 200 OK\r\n"] * 8
        + [
            b"", b"\r\n", b"\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200\r\n", b"HTTP/1.1  200 OK\r\n", b"HTTP/2 200\r\n",
            b"HTTP/0.9 200 OK\r\n", b"HTTP/1.1 2000 OK\r\n", b"HTTP/1.1 -200 OK\r\n", b"HTTP/1.1 099 x\r\n", b"200 OK\r\n",
            b"HTTP/1.1 \xb2\xb0\xb0 OK\r\n", b"HTTP/1.1 2_0 OK\r\n", b"ICY 200 OK\r\n", b"HTTP/1.1 204 No\r\n",
            b"HTTP/1.1 304 No\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n", b"HTTP/1.1 503 x\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", b"HTTP/1.1 200 OK",
            b"HTTP/1.1 100 a\r\n\r\n" * 300, b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n", b"\x16\x03\x01\x02\x00\x01",
        ]
    ),
    st.binary(max_size=20),
)  # fmt: skip
HEADER_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"Content-Type: application/json\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n",
                b"Content-Length: 0\r\n", b"Content-Length: -1\r\n", b"Content-Length: +60\r\n", b"Content-Length:\r\n",
                b"Content-Length: 60\r\n", b"Content-Length: 60, 60\r\n", b"Content-Length: 60\r\nContent-Length: 7\r\n",
                b"Content-Length: 99999999999999999999\r\n", b"Content-Length: 6_0\r\n", b"Content-Length: \xb2\r\n",
                b"Content-Length: 9999999999999999\r\n", b"Content-Length: 0x3c\r\n", b"Transfer-Encoding: identity\r\n",
                b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
                b"Transfer-Encoding: chunked\r\nContent-Length: 60\r\n", b"Transfer-Encoding: xchunked\r\n",
                b"Content-Encoding: gzip\r\n", b"Content-Encoding: deflate\r\n", b"Content-Encoding: br\r\n",
                b"Content-Encoding: gzip, gzip, gzip\r\n", b"Content-Encoding: zstd\r\n", b"Content-Encoding: \xff\r\n",
                b" folded: yes\r\n", b"no colon\r\n", b":\r\n", b"\xff\xfe: \x00\r\n", b"A: b\n", b"A: b\r", b"X: y\r\n" * 99,
                b"X: y\r\n" * 200, b"X: " + b"y" * 70_000 + b"\r\n", b"Retry-After: 30\r\n", b"\r\n", b"Upgrade: h2c\r\n",
                b"Connection: upgrade, close\r\n", b"Set-Cookie: a=b\r\n", b"Keep-Alive: timeout=0\r\n",
            ]
        ),
        st.binary(max_size=12).map(lambda name: name + b"\r\n"),
    ),
    max_size=4,
).map(b"".join)  # fmt: skip


def _chunks(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


BODIES = st.one_of(
    st.sampled_from(
        [
            READY, GOOD_BODY, b"", READY + GOOD, GOOD + GOOD, _chunks(READY, 7), _chunks(READY, 100), gzip.compress(READY),
            _chunks(gzip.compress(READY), 9), b"-1\r\n" + READY, b"ffffffffffffffffff\r\n" + READY, b"3c;x=y\r\n" + READY,
            b"3c\r\n" + READY + b"\r\n0\r\nTrailer: x\r\n\r\n", b"0\r\n\r\n" + GOOD, b"3c\n" + READY + b"\n0\n\n", b"0x3c\r\n",
            b"+3c\r\n" + READY, b"\r\n\r\n", b"3 c\r\n", b"3c" + b";x" * 40_000 + b"\r\n", b"0\r\n" + b"T: x\r\n" * 300,
            gzip.compress(b" " * 100_000)[:-4], b"<html>", b"\x00" * 100, READY[:-1],
        ]
    ),
    st.binary(max_size=80),
)  # fmt: skip
ENDS = st.sampled_from(["close", "close", "close", "reset"])


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """Draw a status line, headers and a body that need not match, truncated anywhere."""
    whole = (
        draw(STATUS_LINES) + draw(HEADER_LINES) + draw(st.sampled_from([b"\r\n", b"\r\n", b"\n", b""])) + draw(BODIES)
    )
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 3)) == 0 else whole


def well_formed(body: bytes, *, chunk: int, packed: bool) -> bytes:
    """Return an answer with its length, or in chunks if `chunk` is not 0."""
    sent = gzip.compress(body, mtime=0) if packed else body
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + (b"Content-Encoding: gzip\r\n" if packed else b"")
    if chunk:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(sent, chunk)
    return head + b"Content-Length: %d\r\n\r\n" % len(sent) + sent


# ── what is promised ──────────────────────────────────────────────────────────────────────────────────────────────────


@EFFORTS
def test_any_bytes_give_a_reply_and_do_not_affect_the_next_answer(line: Line, examples: int) -> None:
    @with_effort(examples)
    @given(answer=answers(), then=ENDS, keep_alive=st.booleans())
    def check(answer: bytes, then: str, keep_alive: bool) -> None:
        line.parts, line.then = (answer,), then
        if keep_alive:
            assert caller.ask(GOOD_ID) == Processing(7.0)
            line.requests.clear()

        reply = caller.ask(ODD_ID)

        assert 1 <= len(line.requests) <= 2
        if isinstance(reply, Ready):
            assert [link.url for link in reply.outputs] == ["https://h.example/a.png"]
        caller.check_lines(reply)

    with calling(line) as caller:
        check()


@EFFORTS
def test_a_truncated_answer_is_refused_and_a_complete_one_is_read(line: Line, examples: int) -> None:
    @with_effort(examples)
    @given(chunk=st.integers(0, 70), packed=st.booleans(), share=st.floats(0, 1), then=ENDS, split=st.integers(0, 200))
    def check(chunk: int, packed: bool, share: float, then: str, split: int) -> None:
        whole = well_formed(READY, chunk=chunk, packed=packed)
        at = round(share * len(whole))
        line.parts, line.then = (whole[:split][:at], whole[split:at]), "close" if at == len(whole) else then

        reply = caller.ask(ODD_ID)

        needed = len(whole) - (2 if chunk else 0)  # the blank line after the last chunk is not needed
        if at >= needed:
            assert isinstance(reply, Ready) or (at < len(whole) and isinstance(reply, ApiDown))
        else:
            assert isinstance(reply, ApiDown)
        caller.check_lines(reply)

    with calling(line) as caller:
        check()


@EFFORTS
def test_a_silent_or_slow_server_is_given_up_in_time(line: Line, examples: int) -> None:
    @with_effort(examples, of=50)
    @given(at=st.integers(0, 60), then=st.sampled_from(["wait", "drip"]))
    def check(at: int, then: str) -> None:
        whole = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 999999\r\n\r\n"
        line.parts, line.then = (whole[:at],), then

        reply = caller.ask(ODD_ID)

        assert isinstance(reply, ApiDown)
        caller.check_lines(reply)

    with calling(line, 0.25) as caller:
        check()


@EFFORTS
def test_bytes_after_an_answer_are_never_read_as_the_next_answer(line: Line, examples: int) -> None:
    @with_effort(examples, of=10)
    @given(chunk=st.integers(0, 70), more=st.one_of(BODIES, answers()), times=st.integers(1, 2_000))
    def check(chunk: int, more: bytes, times: int) -> None:
        whole = well_formed(READY, chunk=chunk, packed=False)
        line.parts, line.then = (whole + more * times,), "wait"

        reply = caller.ask(ODD_ID)

        assert isinstance(reply, (Ready, Unread))
        caller.check_lines(reply)

    with calling(line) as caller:
        check()
