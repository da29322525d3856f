"""Decode compressed bodies that were sent without being requested, chunk by chunk and with a size limit."""

import io
from collections.abc import Iterator
from typing import Any

from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

CHUNK_BYTES = 256 * 1024
_SIGNATURES = ((b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))


class TooLarge(Exception):
    """The decoded body is larger than the limit."""


def detect_coding(head: bytes) -> str | None:
    """Return the compression of a body by its signature, or None.

    >>> detect_coding(b"\\x1f\\x8b\\x08\\0"), detect_coding(b"GIF89a")
    ('gzip', None)
    """
    return next((coding for signature, coding in _SIGNATURES if head.startswith(signature)), None)


def unpack(chunks: Iterator[bytes], coding: str, *, limit: int) -> Iterator[bytes]:
    """Decode a content coding: gzip, deflate, and br and zstd if their libraries are installed.

    Raises ValueError if the bytes don't have this coding, and TooLarge for more than `limit` bytes.
    """
    source = io.BufferedReader(_Chunks(chunks))
    response = HTTPResponse(source, headers={"content-encoding": coding}, preload_content=False)
    size = 0
    try:
        while chunk := response.read(CHUNK_BYTES, decode_content=True):
            size += len(chunk)
            if size > limit:
                raise TooLarge
            yield chunk
    except HTTPError:
        raise ValueError(f"the body is not {coding[:20]}") from None


class _Chunks(io.RawIOBase):
    """An iterator of chunks as a binary file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        chunk, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)
