"""Files that are being received: counted and hashed as they come, and taken up again after whatever cut them short.

A partial file has a sidecar that says which link its bytes are from and what to ask that link for. Whoever writes to it
holds a lock on it, which a dead process lets go of by itself; where the file system knows no locks every claim has a
file of its own, and none lasts. Bytes that were written before the host last started are
not trusted: a crash of the host may have left holes in them.
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
    """Where bytes are from: the hash of the link, what tells one version from another, and the whole length."""

    link: str
    validator: str = ""  # an entity tag or a date, as If-Range takes it; empty where the server names none
    length: int | None = None
    coding: str = ""  # how the server says that it packed them
    text: Promise = ""  # what text its address or its type promises


class Incoming:
    """A file being received under a temporary name. `size` bytes are there, and what they are is known."""

    def __init__(self, path: Path, handle: int, *, lasting: bool) -> None:
        self.path = path
        self.hold = False  # whether what came is left for the next attempt
        self.source: Source | None = None
        self._handle = handle
        self._lasting = lasting
        self._empty()
        if lasting:
            self._take_up()

    def _empty(self) -> None:
        self.size = 0
        self.head = b""
        self.tail = b""
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of what came so far, as 64 hex digits."""
        return self._digest.hexdigest()

    @property
    def complete(self) -> bool:
        """Whether all of it is there, as far as its source said how long it is."""
        return self.source is not None and self.source.length is not None and self.size == self.source.length

    @property
    def resumable(self) -> bool:
        """Whether the rest of it can be asked for."""
        return self.source is not None and bool(self.source.validator)

    def write(self, chunk: bytes) -> None:
        """Appends bytes. Raises StorageTrouble where the disk refuses."""
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
        """Starts over with bytes of this source. Raises StorageTrouble."""
        try:
            if self.size:
                os.ftruncate(self._handle, 0)
                os.lseek(self._handle, 0, os.SEEK_SET)
                self._empty()
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None
        self._note(source)

    def finish(self) -> None:
        """What is there is all there is to come. Raises StorageTrouble."""
        if self.source is not None and self.source.length is None:
            self._note(replace(self.source, length=self.size))

    def forget_length(self) -> None:
        """Note that the length which the server declared is wrong. Raises StorageTrouble."""
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
        """Puts other bytes in the place of what came, which can't be gone on with then. Raises StorageTrouble.

        Whatever `content` raises leaves the file as it was.
        """
        other = self.path.with_suffix(".other")
        old, known = self._handle, (self.size, self.head, self.tail, self._digest)
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
            self._sidecar.unlink(missing_ok=True)  # it tells of the old bytes, and a crash may come in between
            other.replace(self.path)
        except BaseException as error:
            self._handle = old
            self.size, self.head, self.tail, self._digest = known
            os.close(handle)
            other.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StorageTrouble(f"can't write: {error.strerror}") from None
            raise
        os.close(old)
        if self.source is not None:
            self._note(replace(self.source, validator="", length=self.size, coding=""))

    def chunks(self) -> Iterator[bytes]:
        """What came, from its start."""
        with self.path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk

    def sync(self) -> None:
        """Makes sure that the bytes are on the disk."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None

    def rename(self, final: Path) -> None:
        """Gives the file its final name. Raises OSError, and StorageTrouble where its temporary one is another's."""
        if not _same(self._handle, self.path):
            raise StorageTrouble(f"can't write: somebody removed {self.path}")
        self.path.replace(final)

    def close(self) -> None:
        """Lets the file go; it is removed, where it still has its temporary name, unless it is to be held."""
        with suppress(OSError):
            if not (self.hold and self._lasting and self.size and (self.resumable or self.complete)):
                if _same(self._handle, self.path):  # once renamed, the name may be the next claim's already
                    self.path.unlink()
                if not self.path.exists():
                    self._sidecar.unlink()
        os.close(self._handle)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    def _take_up(self) -> None:
        """Counts what an attempt before left, if it can be gone on with."""
        try:
            said = json.loads(self._sidecar.read_text())
            source = Source(said["link"], said["validator"], said["length"], text=said.get("text", ""))
            here = bool(said["host"]) and said["host"] == host_name()
            there = os.fstat(self._handle).st_size
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return self._drop()
        if not _sound(source):
            return self._drop()
        usable = source.validator and (source.length is None or there <= source.length)
        if not here or not (usable or there == source.length):
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
    """The folder of the partial files: `<output>.part`, each with its sidecar `<output>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def receive(self, output_id: int, token: str) -> Iterator[Incoming]:
        """A file to write to, with what came of it before. Raises StorageTrouble.

        It is gone afterwards, unless it was kept under another name or is held for the next attempt. Where another
        process still writes to it, or nothing can be locked, the file is one of this claim alone, and does not last.
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
            with _closed_on_trouble(handle):
                locked = _lock(handle)
                if locked and _same(handle, path):
                    os.utime(handle)
                    return Incoming(path, handle, lasting=True)
                if locked is None and not os.fstat(handle).st_size:
                    path.unlink(missing_ok=True)
            os.close(handle)
            if not locked:
                break
            # it was kept or removed while we waited, and the name is another file's
        own = self.folder / f"{output_id}-{token}.part"
        handle = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with _closed_on_trouble(handle):
            _lock(handle)
            return Incoming(own, handle, lasting=False)

    def discard(self, output_id: int) -> None:
        """Removes what came of an output, unless somebody writes to it."""
        _remove(self.folder / f"{output_id}.part")

    def remove_stale(self, *, older_than: float) -> int:
        """Removes partial files that nobody has touched for so many seconds; how many."""
        oldest = time.time() - older_than
        removed = 0
        with suppress(OSError):
            for path in self.folder.glob("*.part"):
                with suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        removed += _remove(path)
            for path in self.folder.iterdir():  # what a crash left beside no file
                with suppress(OSError):
                    if not path.with_suffix(".part").exists() and path.stat().st_mtime < oldest:
                        path.unlink()
        return removed


def link_hash(url: str) -> str:
    """What a link is known by in a sidecar: links may carry signatures, which belong into no file."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _sound(source: Source) -> bool:
    """Whether a sidecar holds what we write into one."""
    texts = isinstance(source.link, str) and isinstance(source.validator, str)
    return (
        texts
        and source.text in PROMISES
        and source.validator.isascii()
        and source.validator.isprintable()
        and (source.length is None or type(source.length) is int)
    )


def _lock(handle: int) -> bool | None:
    """Locks a file: False where somebody else has it, None where the file system knows no locks. Raises OSError."""
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
def _closed_on_trouble(handle: int) -> Iterator[None]:
    """A handle that is left open would keep its lock as long as the process lives."""
    try:
        yield
    except BaseException:
        os.close(handle)
        raise


def _same(handle: int, path: Path) -> bool:
    try:
        there = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _remove(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if _lock(handle) is False or not _same(handle, path):
            return False
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
