"""Where outputs are stored: whole, and under names made by us that never stand before their bytes do."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal, Protocol
from urllib.parse import quote, unquote

from worker.core.media.signatures import Media
from worker.errors import OutputMissing, StorageTrouble
from worker.storage.partial_files import Incoming, PartialFiles

PARTIAL = ".partial"
JOBS_PER_FOLDER = 1_000
READ_BYTES = 1 << 20
NO_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})  # of folders, as some file systems answer

_NAME = re.compile(r"(?:^|/)[0-9]+/(?P<job>[0-9]+)/(?P<position>[0-9]+)-[0-9a-f]{16,64}\.[^/]+")

Condition = Literal["whole", "missing", "damaged"]


class Storage(Protocol):
    """A place for outputs. Whatever the place refuses is a StorageTrouble: nothing is lost, and it is tried again."""

    partials: PartialFiles

    def prepare(self) -> None:
        """Makes the place itself, as a process starts. What is missing later is missed, not made anew."""
        ...

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Gives a received file its final name; its location. Never overwrites anything of another content."""
        ...

    def open(self, location: str) -> BinaryIO:
        """The bytes at a location. Raises OutputMissing."""
        ...

    def url(self, location: str, seconds: float) -> str:
        """An address of a location that a page can show for so many seconds."""
        ...

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Whether what is at a location is what was stored there."""
        ...

    def quarantine(self, location: str) -> None:
        """Moves what is at a location out of the way: its name then ends in `.damaged`."""
        ...

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Removes what is there, for good. Those that are surely there still, or out of reach, and why.

        Raises StorageTrouble where it can't be told what was removed.
        """
        ...

    def locations(self) -> Iterator[str]:
        """All locations there are, in no order."""
        ...


def name_of(*, job_id: int, position: int, sha256: str, extension: str) -> str:
    """The name of an output below the place: folders of a thousand jobs, the job, then position and hash.

    >>> name_of(job_id=12345, position=0, sha256="ab" * 8, extension="png")
    '12/12345/0-abababababababab.png'
    """
    return f"{job_id // JOBS_PER_FOLDER}/{job_id}/{position}-{sha256}.{extension}"


def job_id_of(location: str) -> int | None:
    """The job that an output's name tells, or None where it is no name of ours.

    >>> job_of("s3://bucket/12/12345/0-abababababababab.png"), job_of("file:///etc/passwd")
    (12345, None)
    """
    found = _NAME.search(location)
    return None if found is None or found.end() < len(location) else int(found["job"])


class FileStorage:
    """Outputs as files below one directory. What is still on its way is in a folder `.partial` beside them."""

    def __init__(self, root: Path, *, address: str | None = None) -> None:
        self._root = root
        self._address = address
        self.partials = PartialFiles(root / PARTIAL)

    def prepare(self) -> None:
        """Makes the directory. Raises StorageTrouble."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageTrouble(f"can't make {self._root}: {error.strerror}") from None

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Gives a received file its final name; its location as a file: URL. Raises StorageTrouble."""
        incoming.sync()
        for digits in (16, 64):
            name = name_of(job_id=job_id, position=position, sha256=incoming.sha256[:digits], extension=media.extension)
            final = self._root / name
            try:
                if not self._root.is_dir():
                    raise StorageTrouble(f"{self._root} is missing: mount it, or make it")
                final.parent.mkdir(parents=True, exist_ok=True)
                if not final.exists():
                    incoming.rename(final)
                elif _hash(final) != incoming.sha256:
                    continue  # something else has our name: it stays
                _sync_folder(final.parent)
            except OSError as error:
                raise StorageTrouble(f"can't write to {final.parent}: {error.strerror}") from None
            return f"file://{quote(str(final))}"
        raise StorageTrouble(f"{final} has another content than its name says: move it away")

    def open(self, location: str) -> BinaryIO:
        """The file. Raises OutputMissing, StorageTrouble."""
        path = path_of(location)
        try:
            return path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise OutputMissing(f"{path} is gone: `fetch-worker verify` gets it again") from None
        except OSError as error:
            raise StorageTrouble(f"can't read {path}: {error.strerror}") from None

    def url(self, location: str, seconds: float) -> str:
        """Below STORAGE_ADDRESS where a web server shows the directory; else the file: URL itself, for this host."""
        if self._address is None:
            return location
        try:
            name = path_of(location).relative_to(self._root)
        except ValueError:
            return location  # stored elsewhere, before the setting was changed
        return f"{self._address.rstrip('/')}/{quote(str(name))}"

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Reads the file and hashes it. Raises StorageTrouble where it can't be told."""
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
        """Renames the file. Raises StorageTrouble."""
        path = path_of(location)
        try:
            path.rename(_free(path))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageTrouble(f"can't rename {path}: {error.strerror}") from None

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Removes files, and the folders that are empty then. Those that could not be removed, and why.

        Where nothing at all is in their directory they are out of reach: rather is a disk not mounted then.
        """
        refused: dict[str, str] = {}
        folders: set[Path] = set()
        for location in locations:
            path = path_of(location)
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                why = _bare(path.parents[2])
                if why is not None:
                    refused[location] = why
                    continue
            except OSError as error:
                refused[location] = f"can't remove {path}: {error.strerror}"
                continue
            folders.add(path.parent)
        for folder in {_remove_empty(folder) for folder in folders}:
            _sync_removal(folder)
        return refused

    def locations(self) -> Iterator[str]:
        """All files below the directory but those on their way. Raises StorageTrouble."""
        if not self._root.is_dir():
            raise StorageTrouble(f"{self._root} is missing: mount it, or make it")
        for folder, folders, names in os.walk(self._root):
            if PARTIAL in folders:
                folders.remove(PARTIAL)
            for name in names:
                yield f"file://{quote(str(Path(folder) / name))}"


def path_of(location: str) -> Path:
    """The path that a `file:` location names."""
    return Path(unquote(location.removeprefix("file://")))


def canonical_location(location: str) -> str:
    """What tells one location from another: a file is the same one by whatever links its directory is reached."""
    return os.path.realpath(path_of(location)) if location.startswith("file:") else location


def _bare(root: Path) -> str | None:
    """Why nothing can be told of files below a directory: it has not even the folder of partial files, as all have."""
    try:
        with os.scandir(root) as found:
            return None if next(found, None) else f"{root} is empty: mount it, or keep the files"
    except OSError as error:
        return f"can't read {root} ({error.strerror}): mount it, or keep the files"


def _remove_empty(folder: Path) -> Path:
    """Removes a job's folder, and the one around it, where they are empty; the folder that is left."""
    left = folder
    with suppress(OSError):  # something else is in it, or it is gone
        for _ in range(2):
            left.rmdir()
            left = left.parent
    return left


def _sync_removal(folder: Path) -> None:
    """What is gone, a crash does not bring back. Raises StorageTrouble."""
    try:
        _sync_folder(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageTrouble(f"can't write to {folder}: {error.strerror}") from None


def _free(path: Path) -> Path:
    number, free = 0, path.with_name(f"{path.name}.damaged")
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}.damaged")
    return free


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
