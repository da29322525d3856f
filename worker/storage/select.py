"""Select the storage for new outputs, by the settings, and for existing outputs, by their location."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from worker.configuration.output_settings import DEFAULT_STORAGE
from worker.errors import SettingsError, StorageTrouble
from worker.settings import Settings
from worker.storage.base import Storage
from worker.storage.local import FileStorage
from worker.storage.partial_files import PartialFiles
from worker.system.locked_cache import locked_cache

S3_LARGEST = 5 << 30  # the largest upload in bytes with one call of S3; the API's outputs are far smaller


def storage_for(settings: Settings) -> Storage:
    """Return the storage for new outputs.

    Raises SettingsError if a library is missing, or if OUTPUT_MAX_BYTES is larger than S3 allows.
    """
    if settings.storage_path is not None:
        return FileStorage(settings.storage_path, address=settings.storage_address or None)
    if settings.output_max_bytes > S3_LARGEST:
        raise SettingsError(f"OUTPUT_MAX_BYTES is {settings.output_max_bytes}: in S3 it is at most {S3_LARGEST}")
    bucket, prefix = settings.bucket or ("", "")
    return _s3(bucket, prefix, settings.partial_path, os.getpid())


def storage_of(location: str, settings: Settings) -> Storage:
    """Return the storage that can read a location, also if new outputs are stored elsewhere.

    Raises SettingsError, StorageTrouble.
    """
    if location.startswith("s3:"):
        bucket, prefix = settings.bucket or (location.removeprefix("s3://").partition("/")[0], "")
        return _s3(bucket, prefix, settings.partial_path, os.getpid())
    if location.startswith("file:"):
        return FileStorage(settings.storage_path or DEFAULT_STORAGE, address=settings.storage_address or None)
    raise StorageTrouble(f"nothing can read {location[:200]}")


def public_addresses(settings: Settings) -> Callable[[str], str | None] | None:
    """Return a function from the location of an output to its lasting public address, or None if none has one.

    That is the address of a file below STORAGE_ADDRESS. An object in S3 only has signed URLs, which expire.
    """
    if not settings.storage_address:
        return None

    def address_of(location: str) -> str | None:
        if not location.startswith("file:"):
            return None
        url = storage_of(location, settings).url(location, 0.0)
        return None if url == location else url

    return address_of


@locked_cache
def _s3(bucket: str, prefix: str, partials: Path, pid: int) -> Storage:
    """Return the S3 storage of this process. It is cached, because its client is slow to create and has connections."""
    if find_spec("boto3") is None:  # an optional dependency, slow to import
        raise SettingsError("STORAGE_URL names an S3 bucket: pip install 'fetch-worker[s3]'")
    from worker.storage.s3 import S3Storage

    return S3Storage(bucket, prefix, PartialFiles(partials))
