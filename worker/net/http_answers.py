"""Responses of HTTP/1: read whole and fast for polling, or in pieces for downloads and webhooks."""

import io
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http import client
from http.client import HTTPException, IncompleteRead, LineTooLong, UnknownProtocol
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from requests.structures import CaseInsensitiveDict
from urllib3.response import HTTPResponse

MAX_INTERIM_RESPONSES = 32
MAX_HEADER_LINE = 65_536
MAX_HEADERS = 100
MAX_LENGTH_DIGITS = 19
RECEIVE_BYTES = 16_384  # more than a usual response has
MAX_RECEIVE_BYTES = 262_144
HEX_DIGITS = b"0123456789abcdefABCDEF"
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-9]\d\d)(|[ \t][^\r\n]*)(?=\r\n|\Z)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")

T = TypeVar("T", bound="HttpAnswer")


class FinalResponse(client.HTTPResponse):
    """A response that skips the interim responses (1xx) before it.

    `http.client` skips "100 Continue" only, and takes "102 Processing" or "103 Early Hints" for the response. "101
    Switching Protocols" is a final response: what follows is not HTTP.
    """

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INTERIM_RESPONSES):
            status_line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]  # not in the stubs
            if not 100 <= status_line[1] < 200 or status_line[1] == 101:
                return status_line
            self._skip_headers()
        raise HTTPException(f"more than {MAX_INTERIM_RESPONSES} interim responses")

    def _skip_headers(self) -> None:
        for _ in range(MAX_HEADERS + 1):
            line = self.fp.readline(MAX_HEADER_LINE + 1)
            if line in (b"\r\n", b"\n", b""):
                return
            if len(line) > MAX_HEADER_LINE:
                break
        raise HTTPException("an interim response with too many or too long headers")


class WholeAnswer(NamedTuple):
    """A response that was read completely, or up to one byte over the limit.

    `reusable` tells whether the connection can take another request.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    reusable: bool

    @property
    def encoded(self) -> bool:
        """Whether the body is compressed, although that was not requested."""
        return self.headers.get("content-encoding", "").lower() not in ("", "identity")

    def decompressed(self, size: int) -> Iterator[bytes]:
        """Return the body, decompressed, in chunks of `size` bytes. Raises HTTPError of urllib3."""
        response = HTTPResponse(
            io.BytesIO(self.body), headers=dict(self.headers), status=self.status, preload_content=False
        )
        return response.stream(size, decode_content=True)


def read_whole(sock: socket.socket, limit: int) -> WholeAnswer:
    """Read one response, up to one byte over the limit. Raises OSError, HTTPException, ValueError."""
    start = sock.recv(RECEIVE_BYTES)
    return _read_usual(start, sock, limit) or _read_any(start, sock, limit)


def _read_usual(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer | None:
    """Read a usual HTTP/1.1 response: headers in one piece, with a declared length. Return None for any other.

    Other responses are left to `HttpAnswer`. It could read these, too, but takes five times as long.
    """
    head, end, body = start.partition(b"\r\n\r\n")
    first = STATUS_LINE.match(head)
    if not end or first is None or first[1] in (b"204", b"304"):
        return None
    lines = head[first.end() :].decode("latin-1").split("\r\n")[1:]
    if head.count(b"\n") != len(lines) or len(lines) > MAX_HEADERS:
        return None
    headers = dict[str, str]()
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            return None
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "transfer-encoding" in headers:
        return None
    length = _length(headers.get("content-length"))
    if length is None or length > limit:
        return None
    if len(body) < length:
        body = _read_on(body, sock, length)
    reusable = len(body) == length and "close" not in headers.get("connection", "").lower()
    return WholeAnswer(int(first[1]), first[2].strip().decode("latin-1"), headers, body[:length], reusable)


def _read_on(start: bytes, sock: socket.socket, length: int) -> bytes:
    pieces, size = [start], len(start)
    while size < length:
        piece = sock.recv(min(length - size, MAX_RECEIVE_BYTES))
        if not piece:
            raise IncompleteRead(b"".join(pieces), length - size)
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _read_any(start: bytes, sock: socket.socket, limit: int) -> WholeAnswer:
    raw = begun(HttpAnswer(cast("socket.socket", _PartlyReadSocket(start, sock)), method="POST"))
    try:
        body = raw.read(limit + 1)
    except BaseException:
        raw.close()
        raise
    if raw.length and len(body) <= limit:
        raise IncompleteRead(body, raw.length)
    return WholeAnswer(raw.status, raw.reason, raw.headers, body, raw.isclosed() and not raw.will_close)


class _PartlyReadSocket(io.RawIOBase):
    """A connection whose first bytes were read already: they are returned first."""

    def __init__(self, start: bytes, sock: socket.socket) -> None:
        self._start = start
        self._sock = sock

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the available bytes."""
        if not self._start:
            return self._sock.recv_into(buffer)
        size = min(len(self._start), len(buffer))
        buffer[:size], self._start = self._start[:size], self._start[size:]
        return size

    def settimeout(self, seconds: float) -> None:
        """Set the time-out of the connection."""
        self._sock.settimeout(seconds)

    def makefile(self, _: str) -> io.BufferedReader:
        """Return a buffered reader, as `HTTPResponse` expects."""
        return io.BufferedReader(self)


class HttpAnswer(FinalResponse):
    """A response whose headers are read line by line, without `http.client`'s e-mail parser."""

    headers: CaseInsensitiveDict[str]  # type: ignore[assignment]  # has the same read methods

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self._sock = sock

    def _close_conn(self) -> None:
        self.will_close = self.will_close or self._has_extra_bytes()
        super()._close_conn()  # type: ignore[misc]  # not in the stubs

    def _has_extra_bytes(self) -> bool:
        """Return whether bytes after this response have arrived. The buffer with them is lost with the response."""
        try:
            self._sock.settimeout(0)
            return bool(self.fp.peek(1))
        except (OSError, ValueError):
            return False

    def begin(self) -> None:
        """Read up to the body. Raises the exceptions of `http.client`."""
        version, status, reason = self._read_status()
        if not version.startswith("HTTP/1."):
            raise UnknownProtocol(version)
        self.version = 10 if version == "HTTP/1.0" else 11
        self.code = self.status = status
        self.reason = reason.strip()
        self.headers = _read_headers(self.fp)
        empty = status in (204, 304)
        self.chunked = not empty and self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = 0 if empty else None if self.chunked else self._declared_length()
        # Without a length, the end of the connection is the end of the response.
        self.will_close = self._check_close() or (not self.chunked and self.length is None)  # type: ignore[attr-defined]
        if "Transfer-Encoding" in self.headers and (not self.chunked or "Content-Length" in self.headers):
            self.will_close = True  # its end is ambiguous (RFC 9112, section 6.3)

    def _declared_length(self) -> int | None:
        return _length(self.headers.get("Content-Length"))

    def _read_next_chunk_size(self) -> int:
        """Read a chunk size more strictly than the parent: only hexadecimal digits, and the line must be complete.

        The size in a truncated line is unknown. `-1`, which Python accepts as a number, would be a chunk without an
        end.
        """
        line = self.fp.readline(MAX_HEADER_LINE + 1)
        size = CHUNK_SIZE.fullmatch(line) if len(line) <= MAX_HEADER_LINE else None
        if size is None:
            raise ValueError("a chunk without a size")
        return int(size[1], 16)


def begun(answer: T) -> T:
    """Read a response up to its body and return it. It is closed if that fails."""
    try:
        answer.begin()
    except BaseException:
        answer.close()
        raise
    return answer


class StreamedAnswer(HttpAnswer):
    """A response whose body is read in pieces, even if its headers describe the body wrongly.

    An invalid length, or several different ones, counts as no length. A body that does not begin like a chunk is not
    chunked, whatever the header says. Bytes after the declared end can be read, too.
    """

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__(sock, method=method)
        self.remaining: int | None = None  # bytes of the body still to be read, if its length was declared
        self._started = False
        self._read_beyond = False

    def begin(self) -> None:
        """Read up to the body. Raises the exceptions of `http.client`."""
        super().begin()
        self.remaining, self.length = self.length, None  # counted here: http.client would close the response at the end

    def _declared_length(self) -> int | None:
        with suppress(HTTPException):
            return super()._declared_length()
        return None

    @property
    def reusable(self) -> bool:
        """Whether the connection can take another request: exactly the whole response was read."""
        whole = self.remaining == 0 or (self.chunked and self.isclosed())
        return (
            whole
            and not self._read_beyond
            and not (self.fp is not None and self._has_extra_bytes())
            and not self.will_close
        )

    def read_piece(self, size: int) -> bytes:
        """Return up to `size` bytes of the body, as soon as any arrive, or no bytes at its end.

        Raises OSError, HTTPException.
        """
        if self.isclosed() or self.remaining == 0:
            return b""
        if not self._started and self.chunked and self.fp.peek(1)[:1].strip(HEX_DIGITS):
            self.chunked, self.will_close = False, True
        self._started = True
        piece = self.read1(size if self.remaining is None else min(size, self.remaining))
        if self.remaining is not None:
            self.remaining -= len(piece)
        return piece

    def read_start(self, size: int, seconds: float) -> bytes:
        """Return up to `size` bytes of the body that arrive within `seconds`. Raises nothing."""
        until, start = time.monotonic() + seconds, b""
        with suppress(OSError, HTTPException):
            self._sock.settimeout(seconds)
            while time.monotonic() < until and len(start) < size and (piece := self.read_piece(size - len(start))):
                start += piece
        return start

    def read_beyond_end(self, size: int, seconds: float) -> bytes:
        """Return up to `size` bytes after the declared end, if any arrive within `seconds`."""
        self._read_beyond = True
        if self.isclosed():
            return b""
        with suppress(OSError):
            self._sock.settimeout(seconds)
            return self.fp.read1(size)
        return b""


def _read_headers(file: BinaryIO) -> CaseInsensitiveDict[str]:
    headers = CaseInsensitiveDict[str]()
    for _ in range(MAX_HEADERS + 1):
        line = file.readline(MAX_HEADER_LINE + 1)
        if len(line) > MAX_HEADER_LINE:
            raise LineTooLong("header line")
        if line in (b"\r\n", b"\n"):
            return headers
        if not line:
            raise HTTPException("a response that ends within its headers")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    raise HTTPException(f"more than {MAX_HEADERS} headers")


def _length(value: str | None) -> int | None:
    if value is None:
        return None
    lengths = {length.strip() for length in value.split(",")}  # the same length twice is valid
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdecimal() and len(length) < MAX_LENGTH_DIGITS):
        raise HTTPException("an invalid length")
    return int(length)
