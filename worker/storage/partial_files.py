"""Partial files: downloads in progress, hashed while they are received, and resumed after an interruption.

A partial file has a sidecar file with the hash of its link and the validator for a range request. The process that
writes to it holds a lock on it, which the system releases if the process dies. On a file system without locks, each
claim has its own file, which is not resumed. Bytes that were written before the host's last start are not trusted,
because a crash of the host may have left holes in them.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from worker.core.media.signatures import HEAD_BYTES, TAIL_BYTES
from worker.core.media.text import PROMISES, Promise
from worker.errors import StorageTrouble
from worker.system.process_identity import host_name

READ_BYTES = 1 << 20
TRIES = 3
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Source:
    """The source of the bytes: the hash of the link, the validator of its version, and the complete length."""

    link: str
    validator: str = ""  # an entity tag or a date for If-Range; empty if the server sends none
    length: int | None = None
    coding: str = ""  # the content codings that the server declares
    text: Promise = ""  # the kind of text that the URL or the declared type promises


class Incoming:
    """A file that is being received, under a temporary name. It has `size` bytes so far."""

    def __init__(self, path: Path, handle: int, *, lasting: bool) -> None:
        self.path = path
        self.hold = False  # whether the file is kept for the next attempt
        self.source: Source | None = None
        self._handle = handle
        self._lasting = lasting
        self._empty()
        if lasting:
            self._resume()

    def _empty(self) -> None:
        self.size = 0
        self.head = b""
        self.tail = b""
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of the bytes so far, as 64 hex digits."""
        return self._digest.hexdigest()

    @property
    def complete(self) -> bool:
        """Whether the file has the length that its source declared."""
        return self.source is not None and self.source.length is not None and self.size == self.source.length

    @property
    def resumable(self) -> bool:
        """Whether the rest of the file can be requested."""
        return self.source is not None and bool(self.source.validator)

    def write(self, chunk: bytes) -> None:
        """Append bytes. Raises StorageTrouble if they can't be written."""
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._handle, view) :]
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None
        self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)
        if len(self.head) < HEAD_BYTES:
            self.head += chunk[: HEAD_BYTES - len(self.head)]
        self.tail = (self.tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]

    def begin(self, source: Source) -> None:
        """Truncate the file and start again with this source. Raises StorageTrouble."""
        try:
            if self.size:
                os.ftruncate(self._handle, 0)
                os.lseek(self._handle, 0, os.SEEK_SET)
                self._empty()
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None
        self._note(source)

    def finish(self) -> None:
        """Record that the file is complete. Raises StorageTrouble."""
        if self.source is not None and self.source.length is None:
            self._note(replace(self.source, length=self.size))

    def forget_length(self) -> None:
        """Record that the declared length is wrong. Raises StorageTrouble."""
        if self.source is not None:
            self._note(replace(self.source, validator="", length=None))

    def _note(self, source: Source) -> None:
        self.source = source
        if not self._lasting:
            return
        note = self._sidecar.with_suffix(".new")
        try:
            note.write_text(json.dumps(asdict(source) | {"host": host_name()}))
            note.replace(self._sidecar)
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None

    def replace(self, content: Iterator[bytes]) -> None:
        """Replace the content. The file can't be resumed afterwards. Raises StorageTrouble.

        If `content` raises an error, the file is not changed.
        """
        other = self.path.with_suffix(".other")
        old_handle, old_state = self._handle, (self.size, self.head, self.tail, self._digest)
        try:
            handle = os.open(other, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None
        try:
            _lock(handle)
            self._handle = handle
            self._empty()
            for chunk in content:
                self.write(chunk)
            self._sidecar.unlink(missing_ok=True)  # first: it describes the old bytes, and the process may crash here
            other.replace(self.path)
        except BaseException as error:
            self._handle = old_handle
            self.size, self.head, self.tail, self._digest = old_state
            os.close(handle)
            other.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageTrouble(f"can't write: {error.strerror}") from None
            raise
        os.close(old_handle)
        if self.source is not None:
            self._note(replace(self.source, validator="", length=self.size, coding=""))

    def chunks(self) -> Iterator[bytes]:
        """Return the content in chunks, from the start."""
        with self.path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk

    def sync(self) -> None:
        """Sync the file to the disk. Raises StorageTrouble."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None

    def rename(self, final: Path) -> None:
        """Rename the file to its final name. Raises OSError, and StorageTrouble if the temporary file was removed."""
        if not _is_same_file(self._handle, self.path):
            raise StorageTrouble(f"can't write: {self.path} was removed")
        self.path.replace(final)

    def close(self) -> None:
        """Close the file. Delete it if it still has its temporary name, unless it is kept for the next attempt."""
        with suppress(OSError):
            if not (self.hold and self._lasting and self.size and (self.resumable or self.complete)):
                if _is_same_file(self._handle, self.path):  # after a rename, the next claim may use this name already
                    self.path.unlink()
                if not self.path.exists():
                    self._sidecar.unlink()
        os.close(self._handle)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    def _resume(self) -> None:
        """Read the file of a previous attempt if it can be resumed. Otherwise empty it."""
        try:
            note = json.loads(self._sidecar.read_text())
            source = Source(note["link"], note["validator"], note["length"], text=note.get("text", ""))
            same_host = bool(note["host"]) and note["host"] == host_name()
            size = os.fstat(self._handle).st_size
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return self._drop()
        if not _is_valid(source):
            return self._drop()
        resumable = source.validator and (source.length is None or size <= source.length)
        if not same_host or not (resumable or size == source.length):
            return self._drop()
        self.source = source
        while chunk := os.read(self._handle, READ_BYTES):
            self._count(chunk)
        return None

    def _drop(self) -> None:
        os.ftruncate(self._handle, 0)
        with suppress(OSError):
            self._sidecar.unlink()


class PartialFiles:
    """The folder of the partial files: `<output id>.part`, each with its sidecar `<output id>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def receive(self, output_id: int, token: str) -> Iterator[Incoming]:
        """Open the partial file of an output, with the bytes of previous attempts. Raises StorageTrouble.

        It is deleted afterwards, unless it was renamed or is kept for the next attempt. If another process still writes
        to it, or the file system has no locks, a separate file for this claim is used, which is always deleted.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            incoming = self._open(output_id, token)
        except OSError as error:
            raise StorageTrouble(f"can't write to {self.folder}: {error.strerror}") from None
        try:
            yield incoming
        finally:
            incoming.close()

    def _open(self, output_id: int, token: str) -> Incoming:
        path = self.folder / f"{output_id}.part"
        for _ in range(TRIES):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with _closed_on_error(handle):
                locked = _lock(handle)
                if locked and _is_same_file(handle, path):
                    os.utime(handle)
                    return Incoming(path, handle, lasting=True)
                if locked is None and not os.fstat(handle).st_size:
                    path.unlink(missing_ok=True)
            os.close(handle)
            if not locked:
                break
            # The file was renamed or deleted before it was locked, and the name may belong to another file.
        separate = self.folder / f"{output_id}-{token}.part"
        handle = os.open(separate, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with _closed_on_error(handle):
            _lock(handle)
            return Incoming(separate, handle, lasting=False)

    def discard(self, output_id: int) -> None:
        """Delete the partial file of an output, unless a process is writing to it."""
        _remove_unlocked(self.folder / f"{output_id}.part")

    def remove_stale(self, *, older_than: float) -> int:
        """Delete partial files that were not changed for `older_than` seconds; return how many."""
        oldest = time.time() - older_than
        removed = 0
        with suppress(OSError):
            for path in self.folder.glob("*.part"):
                with suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        removed += _remove_unlocked(path)
            for path in self.folder.iterdir():  # sidecars without a partial file, left by a crash
                with suppress(OSError):
                    if not path.with_suffix(".part").exists() and path.stat().st_mtime < oldest:
                        path.unlink()
        return removed


def link_hash(url: str) -> str:
    """Return the hash of a link for a sidecar. A link may contain a signature, which must not be written to a file."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _is_valid(source: Source) -> bool:
    """Return whether the values of a sidecar are valid."""
    texts = isinstance(source.link, str) and isinstance(source.validator, str)
    return (
        texts
        and source.text in PROMISES
        and source.validator.isascii()
        and source.validator.isprintable()
        and (source.length is None or type(source.length) is int)
    )


def _lock(handle: int) -> bool | None:
    """Lock a file. Return False if it is locked already, None if the file system has no locks. Raises OSError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


@contextmanager
def _closed_on_error(handle: int) -> Iterator[None]:
    """Close the handle on an error. Otherwise it would keep its lock until the process ends."""
    try:
        yield
    except BaseException:
        os.close(handle)
        raise


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(handle), status)


def _remove_unlocked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if _lock(handle) is False or not _is_same_file(handle, path):
            return False
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
