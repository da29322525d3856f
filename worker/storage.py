"""Where outputs are stored: whole, and under names made by us that never stand before their bytes do."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from worker.core.media import HEAD_BYTES, TAIL_BYTES
from worker.errors import StorageTrouble

PARTIAL = ".partial"
JOBS_PER_FOLDER = 1_000


class Incoming:
    """A file being received under a temporary name: counted and hashed as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.head = b""
        self.tail = b""
        self._digest = hashlib.sha256()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    @property
    def sha256(self) -> str:
        """The hash of what came so far, as 64 hex digits."""
        return self._digest.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Appends bytes. Raises StorageTrouble where the disk refuses."""
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None
        self._digest.update(chunk)
        self.size += len(chunk)
        if len(self.head) < HEAD_BYTES:
            self.head += chunk[: HEAD_BYTES - len(self.head)]
        self.tail = (self.tail + chunk)[-TAIL_BYTES:] if len(chunk) < TAIL_BYTES else chunk[-TAIL_BYTES:]

    def sync(self) -> None:
        """Makes sure that the bytes are on the disk."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise StorageTrouble(f"can't write: {error.strerror}") from None

    def close(self) -> None:
        """Closes the file and removes the temporary name, where it still stands."""
        os.close(self._file)
        with suppress(FileNotFoundError):
            self.path.unlink()


class FileStorage:
    """Outputs as files below one directory: `<job / 1000>/<job>/<position>-<first 16 of the SHA-256>.<extension>`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def receive(self, output_id: int, token: str) -> Iterator[Incoming]:
        """A temporary file to write to; it is gone afterwards unless it was kept. Raises StorageTrouble."""
        folder = self._root / PARTIAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            incoming = Incoming(folder / f"{output_id}-{token}.part")
        except OSError as error:
            raise StorageTrouble(f"can't write to {folder}: {error.strerror}") from None
        try:
            yield incoming
        finally:
            incoming.close()

    def keep(self, incoming: Incoming, *, job_id: int, position: int, extension: str) -> str:
        """Gives a received file its final name; its location as a file: URL. Raises StorageTrouble."""
        folder = self._root / str(job_id // JOBS_PER_FOLDER) / str(job_id)
        final = folder / f"{position}-{incoming.sha256[:16]}.{extension}"
        incoming.sync()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            incoming.path.replace(final)  # the name carries the hash: what may be there already is the same
            _sync_folder(folder)
        except OSError as error:
            raise StorageTrouble(f"can't write to {folder}: {error.strerror}") from None
        return f"file://{quote(str(final))}"

    def remove_stale(self, *, older_than: float) -> int:
        """Removes temporary files that nobody has written to for so many seconds; how many."""
        removed = 0
        oldest = time.time() - older_than
        with suppress(OSError):
            for path in (self._root / PARTIAL).iterdir():
                with suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()
                        removed += 1
        return removed


def path_of(location: str) -> Path:
    """The path that a `file:` location names."""
    return Path(unquote(location.removeprefix("file://")))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
