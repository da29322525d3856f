"""Storage in local files. A file gets its final name only when it is complete."""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

from worker.core.media.signatures import Media
from worker.errors import OutputMissing, StorageTrouble
from worker.storage.base import HASH_DIGITS, READ_BYTES, Condition, name_of
from worker.storage.partial_files import Incoming, PartialFiles

PARTIAL = ".partial"
NO_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})  # on file systems that can't sync a folder


class FileStorage:
    """Stores outputs as files below one directory. Partial files are in its folder `.partial`."""

    def __init__(self, root: Path, *, address: str | None = None) -> None:
        self._root = root
        self.root = f"file://{quote(str(root)).rstrip('/')}/"
        self._address = address
        self.partials = PartialFiles(root / PARTIAL)

    def prepare(self) -> None:
        """Create the directory. Raises StorageTrouble."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageTrouble(f"can't create {self._root}: {error.strerror}") from None

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Rename a received file to its final name, and return its location as a file: URL. Raises StorageTrouble."""
        incoming.sync()
        for digits in HASH_DIGITS:
            name = name_of(job_id=job_id, position=position, sha256=incoming.sha256[:digits], extension=media.extension)
            final = self._root / name
            try:
                if not self._root.is_dir():
                    raise StorageTrouble(f"{self._root} is missing: mount it, or make it")
                final.parent.mkdir(parents=True, exist_ok=True)
                if not final.exists():
                    incoming.rename(final)
                elif _hash(final) != incoming.sha256:
                    continue  # another file has this name: try a longer one
                _sync_folder(final.parent)
            except OSError as error:
                raise StorageTrouble(f"can't write to {final.parent}: {error.strerror}") from None
            return self.root + name
        raise StorageTrouble(f"the content of {final} does not match its name: move it away")

    def is_same_file(self, location: str, other: str) -> bool:
        """Return whether both are the same file, for example because of a symbolic link or a bind mount."""
        if not location.startswith("file:"):
            return False
        with suppress(OSError):  # one of them is missing
            return path_of(location).samefile(path_of(other))
        return False

    def open(self, location: str) -> BinaryIO:
        """Open a file. Raises OutputMissing, StorageTrouble."""
        path = path_of(location)
        try:
            return path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise OutputMissing(f"{path} is missing: `fetch-worker verify` downloads it again") from None
        except OSError as error:
            raise StorageTrouble(f"can't read {path}: {error.strerror}") from None

    def url(self, location: str, seconds: float) -> str:
        """Return a URL below STORAGE_ADDRESS, if it is set, or else the file: URL, which works only on this host."""
        if self._address is None:
            return location
        try:
            name = path_of(location).relative_to(self._root)
        except ValueError:
            return location  # stored in another directory, before the setting was changed
        return f"{self._address.rstrip('/')}/{quote(str(name))}"

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Read and hash the file, and compare it. Raises StorageTrouble if it can't be read."""
        path = path_of(location)
        if path.is_relative_to(self._root) and not self._root.is_dir():
            raise StorageTrouble(f"{self._root} is missing: mount it, or make it")
        try:
            same = path.stat().st_size == size and _hash(path) == sha256
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        except OSError as error:
            raise StorageTrouble(f"can't read {path}: {error.strerror}") from None
        return "whole" if same else "damaged"

    def quarantine(self, location: str) -> None:
        """Rename the file to a free name. Raises StorageTrouble."""
        path = path_of(location)
        try:
            path.rename(_free_name(path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageTrouble(f"can't rename {path}: {error.strerror}") from None

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Delete files and their empty folders. Return the locations that could not be deleted, with the reasons.

        An empty root directory is treated as an unmounted disk: its files count as not reachable.
        """
        refused: dict[str, str] = {}
        folders: set[Path] = set()
        for location in locations:
            path = path_of(location)
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                reason = _why_unreachable(path.parents[2])
                if reason is not None:
                    refused[location] = reason
                    continue
            except OSError as error:
                refused[location] = f"can't remove {path}: {error.strerror}"
                continue
            folders.add(path.parent)
        for folder in {_remove_empty(folder) for folder in folders}:
            _sync_removal(folder)
        return refused

    def locations(self) -> Iterator[str]:
        """Return the locations of all files below the directory except partial files. Raises StorageTrouble."""
        if not self._root.is_dir():
            raise StorageTrouble(f"{self._root} is missing: mount it, or make it")
        for folder, folders, names in os.walk(self._root):
            if PARTIAL in folders:
                folders.remove(PARTIAL)
            for name in names:
                yield f"file://{quote(str(Path(folder) / name))}"


def path_of(location: str) -> Path:
    """Return the path of a `file:` location."""
    return Path(unquote(location.removeprefix("file://")))


def canonical_location(location: str) -> str:
    """Return a key that is equal for two locations of the same file, also if they differ by symbolic links."""
    return os.path.realpath(path_of(location)) if location.startswith("file:") else location


def _why_unreachable(root: Path) -> str | None:
    """Return the reason why a root directory seems to be unmounted, or None.

    A mounted root is never empty, because it contains the folder of partial files.
    """
    try:
        with os.scandir(root) as entries:
            return None if next(entries, None) else f"{root} is empty: mount it, or keep the files"
    except OSError as error:
        return f"can't read {root} ({error.strerror}): mount it, or keep the files"


def _remove_empty(folder: Path) -> Path:
    """Delete a job's folder and its parent if they are empty. Return the folder that remains."""
    remaining = folder
    with suppress(OSError):  # it is not empty, or it is missing
        for _ in range(2):
            remaining.rmdir()
            remaining = remaining.parent
    return remaining


def _sync_removal(folder: Path) -> None:
    """Sync a folder, so that deleted files don't reappear after a crash. Raises StorageTrouble."""
    try:
        _sync_folder(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageTrouble(f"can't write to {folder}: {error.strerror}") from None


def _free_name(path: Path) -> Path:
    number, candidate = 0, path.with_name(f"{path.name}.damaged")
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}.damaged")
    return candidate


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)
