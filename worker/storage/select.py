"""Which storage there is, by the settings and by what a location says."""

import os
from pathlib import Path

from worker.errors import SettingsError, StorageTrouble
from worker.settings import DEFAULT_STORAGE, Settings
from worker.storage.local import FileStorage, Storage
from worker.storage.partial_files import PartialFiles
from worker.system.locked_cache import locked_cache

S3_LARGEST = 5 << 30  # bytes that S3 takes by one call; no picture or film of the API is near it


def storage_for(settings: Settings) -> Storage:
    """Where outputs are stored from now on.

    Raises SettingsError where a library for it is missing, or OUTPUT_MAX_BYTES is more than S3 takes.
    """
    if settings.storage_path is not None:
        return FileStorage(settings.storage_path, address=settings.storage_address or None)
    if settings.output_max_bytes > S3_LARGEST:
        raise SettingsError(f"OUTPUT_MAX_BYTES is {settings.output_max_bytes}: in S3 it is at most {S3_LARGEST}")
    bucket, prefix = settings.bucket or ("", "")
    return _s3(bucket, prefix, settings.partial_path, os.getpid())


def storage_of(location: str, settings: Settings) -> Storage:
    """What can read a location, whatever the settings say of new ones. Raises SettingsError, StorageTrouble."""
    if location.startswith("s3:"):
        bucket, prefix = settings.bucket or (location.removeprefix("s3://").partition("/")[0], "")
        return _s3(bucket, prefix, settings.partial_path, os.getpid())
    if location.startswith("file:"):
        return FileStorage(settings.storage_path or DEFAULT_STORAGE, address=settings.storage_address or None)
    raise StorageTrouble(f"nothing can read {location[:200]}")


@locked_cache
def _s3(bucket: str, prefix: str, partials: Path, pid: int) -> Storage:
    """One per process: each has a client of its own, which takes long to make, and connections to keep."""
    from worker.storage.s3 import S3Storage  # an extra: whoever stores files needs none of it

    return S3Storage(bucket, prefix, PartialFiles(partials))
