"""The interface of a storage for outputs, and the names of outputs in every storage."""

import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal, Protocol

from worker.core.media.signatures import Media
from worker.storage.partial_files import Incoming, PartialFiles

JOBS_PER_FOLDER = 1_000
HASH_DIGITS = (16, 64)  # in names; the longer form is used if another file has the shorter name
READ_BYTES = 1 << 20

_NAME = re.compile(r"(?:^|/)[0-9]+/(?P<job>[0-9]+)/(?P<position>[0-9]+)-[0-9a-f]{16,64}\.[^/]+")

Condition = Literal["whole", "missing", "damaged"]


class Storage(Protocol):
    """A storage for outputs. Failures raise StorageTrouble; nothing is lost, and the caller tries again later."""

    partials: PartialFiles
    root: str  # the beginning of the locations of its outputs; their relative names follow

    def prepare(self) -> None:
        """Create the directory of the storage, once per process. If it disappears later, it is not created again."""
        ...

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Store a received file under its final name, and return its location. Never overwrites another file."""
        ...

    def is_same_file(self, location: str, other: str) -> bool:
        """Return whether two locations are names of one file. Raises StorageTrouble."""
        ...

    def open(self, location: str) -> BinaryIO:
        """Open the file at a location. Raises OutputMissing."""
        ...

    def url(self, location: str, seconds: float) -> str:
        """Return a URL of a location that a web page can use for this number of seconds."""
        ...

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Check whether the file at a location is there and unchanged."""
        ...

    def quarantine(self, location: str) -> None:
        """Rename a damaged file: its new name ends in `.damaged`."""
        ...

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Delete files. Return the locations that could not be deleted or reached, with the reasons.

        Raises StorageTrouble if the result is unknown.
        """
        ...

    def locations(self) -> Iterator[str]:
        """Return all locations, in no particular order."""
        ...


def name_of(*, job_id: int, position: int, sha256: str, extension: str) -> str:
    """Return the relative name of an output: a folder for a thousand jobs, the job, then position and hash.

    >>> name_of(job_id=12345, position=0, sha256="ab" * 8, extension="png")
    '12/12345/0-abababababababab.png'
    """
    return f"{job_id // JOBS_PER_FOLDER}/{job_id}/{position}-{sha256}.{extension}"


def root_of(location: str) -> str:
    """Return the location of the folder or bucket of an output: its location without its name.

    >>> root_of("s3://bucket/out/12/12345/0-abababababababab.png")
    's3://bucket/out/'
    """
    match = _NAME.search(location)
    return location if match is None else location[: match.start() + 1]


def job_id_of(location: str) -> int | None:
    """Return the job id in an output's location, or None if `name_of` can't have made the name.

    >>> job_id_of("s3://bucket/12/12345/0-abababababababab.png"), job_id_of("file:///etc/passwd")
    (12345, None)
    """
    match = _NAME.search(location)
    return None if match is None or match.end() < len(location) else int(match["job"])
