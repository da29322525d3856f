"""Which claims of a process led to a request, in a small file that outlives the process.

A claim counts its request when it is made (`polls`), so that a crash hides none. Of the claims that a killed process
leaves behind, some were never sent. The process that releases them reads here which ones, and takes them off the
count.

One file per process, named after it. A record is the job's id and the claim's token, written right before the request
is sent; the file is a ring, so the oldest records are overwritten. Nothing is synced to the disk: the kernel keeps what
a killed process wrote, and after a crash of the host every claim counts. The file is written as memory: a system call
would let go of the interpreter lock, for which all threads that send compete.
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
RECORDS = 16_384  # more than a process can have in flight or unrecorded
TOKEN_BYTES = 8


class SentRequests:
    """Notes what this process sends, for others on the same host. Does nothing where the file can't be written."""

    def __init__(self, folder: Path, holder: str) -> None:
        self._records: mmap.mmap | None = None
        self._next = itertools.count()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(folder / holder, flags, 0o600), "r+b") as file:
                file.write(bytes(RECORDS * RECORD.size))  # on a full disk it fails here, and not as memory
                file.flush()
                self._records = mmap.mmap(file.fileno(), RECORDS * RECORD.size)
        except OSError:  # a file that nothing is noted in would say that nothing was sent
            remove_files(folder, [holder])

    def note(self, row_id: int, token: str) -> None:
        """Note that a request is about to be sent. May be called from any thread."""
        if self._records is not None:
            RECORD.pack_into(self._records, next(self._next) % RECORDS * RECORD.size, row_id, bytes.fromhex(token))


def sent_by(folder: Path, holders: Iterable[str]) -> dict[str, frozenset[tuple[int, str]]]:
    """Return the claims (row id, token) that each of these processes sent a request for.

    Processes that have no file here are left out.
    """
    found = {}
    for holder in holders:
        with suppress(OSError):
            content = (folder / holder).read_bytes()
            if len(content) == RECORDS * RECORD.size:
                found[holder] = frozenset((row_id, token.hex()) for row_id, token in RECORD.iter_unpack(content))
    return found


def remove_files(folder: Path, holders: Collection[str]) -> None:
    """Remove the files of these processes."""
    for holder in holders:
        with suppress(OSError):
            (folder / holder).unlink()


def old_files(folder: Path, *, seconds: float) -> set[str]:
    """Return the names of the processes that wrote nothing here for so long: they may be of a host that is no more."""
    oldest, found = time.time() - seconds, set()
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    found.add(path.name)
    return found


def processes_with_files(folder: Path) -> list[str]:
    """Return the names of the processes that have a file here, alive or not."""
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []
