"""Records which claims of a process led to a request, in a small file that outlives the process.

A claim counts its request when it is made (`polls`), so that a crash hides none. A killed process leaves claims behind,
and some of their requests were never sent. The process that releases the claims reads this file, and subtracts those
requests from the count.

There is one file per process, named after it. A record is the job's id and the claim's token, written right before the
request is sent. The file is a ring: the oldest records are overwritten. Nothing is synced to disk. The kernel keeps
what a killed process wrote, and after a crash of the host every claim counts. The file is memory-mapped, since a system
call would release the interpreter lock, for which all sending threads compete.
"""

import itertools
import mmap
import os
import struct
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

RECORD = struct.Struct("<Q8s")
RECORDS = 16_384  # more than a process can have in flight or unwritten
TOKEN_BYTES = 8


class SentRequests:
    """Records the requests of this process, for others on the same host. Does nothing if the file can't be written."""

    def __init__(self, folder: Path, holder: str) -> None:
        self._records: mmap.mmap | None = None
        self._next = itertools.count()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(folder / holder, flags, 0o600), "r+b") as file:
                file.write(bytes(RECORDS * RECORD.size))  # a full disk fails here, and not later in the mapped memory
                file.flush()
                self._records = mmap.mmap(file.fileno(), RECORDS * RECORD.size)
        except OSError:  # an empty file would claim that nothing was sent
            remove_files(folder, [holder])

    def note(self, row_id: int, token: str) -> None:
        """Record that a request is about to be sent. May be called from any thread."""
        if self._records is not None:
            RECORD.pack_into(self._records, next(self._next) % RECORDS * RECORD.size, row_id, bytes.fromhex(token))


def sent_by(folder: Path, holders: Iterable[str]) -> dict[str, frozenset[tuple[int, str]]]:
    """Return the claims (row id, token) for which each of these processes sent a request.

    Processes without a file are left out.
    """
    claims_by_holder = {}
    for holder in holders:
        with suppress(OSError):
            content = (folder / holder).read_bytes()
            if len(content) == RECORDS * RECORD.size:
                claims_by_holder[holder] = frozenset(
                    (row_id, token.hex()) for row_id, token in RECORD.iter_unpack(content)
                )
    return claims_by_holder


def remove_files(folder: Path, holders: Collection[str]) -> None:
    """Remove the files of these processes."""
    for holder in holders:
        with suppress(OSError):
            (folder / holder).unlink()


def old_files(folder: Path, *, seconds: float) -> set[str]:
    """Return the names of processes that wrote nothing here for `seconds`: their host may no longer exist."""
    oldest, names = time.time() - seconds, set()
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    names.add(path.name)
    return names


def processes_with_files(folder: Path) -> list[str]:
    """Return the names of the processes that have a file here, running or not."""
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []
