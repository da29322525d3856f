"""Storage in a bucket of Amazon S3 or of a compatible store. The store checks uploads with a checksum.

If the store lacks checksums, uploads are read back and compared.
"""

import base64
import errno
import hashlib
import io
import os
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from http import HTTPStatus
from typing import Any, BinaryIO

from botocore.exceptions import ClientError

from worker.core.media.signatures import Media
from worker.errors import OutputMissing, StorageTrouble
from worker.storage.base import HASH_DIGITS, READ_BYTES, Condition, name_of
from worker.storage.partial_files import Incoming, PartialFiles
from worker.storage.s3_client import CLIENT_ERRORS, WRONG_SUM, S3Client, code_of, reason_of, status_of, unless_missing

SCHEME = "s3://"
PAGE = 1_000  # names per listing call, the limit of S3
LONGEST_URL = 604_800  # seconds: signatures are valid for at most a week
CONDITION = "If-None-Match"
CHECKSUM = "x-amz-checksum-sha256"


class S3Storage:
    """Stores outputs as objects below `prefix` of an existing bucket. Partial files are local."""

    def __init__(self, bucket: str, prefix: str, partials: PartialFiles) -> None:
        self.partials = partials
        self._bucket = bucket
        self._prefix = "".join(f"{part}/" for part in prefix.split("/") if part)
        self.root = self._location(self._prefix)
        self._aliases: dict[tuple[str, str], bool] = {}  # whether two names of buckets are one bucket
        self.client = S3Client()

    def prepare(self) -> None:
        """Create the folder of partial files, and check that the bucket can be used.

        Raises SettingsError, StorageTrouble.
        """
        try:
            self.partials.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageTrouble(f"can't create {self.partials.folder}: {error.strerror}") from None
        with self.client.session(f"use the bucket {self._bucket}") as client:
            try:
                client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                troubles: dict[int, str] = {
                    HTTPStatus.NOT_FOUND: f"the bucket {self._bucket} is missing: create it, or correct STORAGE_URL",
                    HTTPStatus.FORBIDDEN: f"access to the bucket {self._bucket} is refused: check the AWS_* "
                    "credentials, and that they may list it (s3:ListBucket) and read, write and delete in it",
                }
                if status_of(error) in troubles:
                    raise StorageTrouble(troubles[status_of(error)]) from None
                raise

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Upload a received file under its final name, and return its s3: location. Raises StorageTrouble."""
        incoming.sync()
        for digits in HASH_DIGITS:
            key = self._prefix + name_of(
                job_id=job_id, position=position, sha256=incoming.sha256[:digits], extension=media.extension
            )
            if self._stored(key, incoming, media):
                incoming.hold = False  # the object is stored, the local file is not needed
                return self._location(key)
        raise StorageTrouble(f"the content of {self._location(key)} does not match its name: move it away")

    def is_same_file(self, location: str, other: str) -> bool:
        """Return whether both are one object: the same key, in one bucket or in two names of it."""
        if not location.startswith(SCHEME):
            return False
        (bucket, key), (other_bucket, other_key) = _bucket_and_key(location), _bucket_and_key(other)
        if key != other_key:
            return False
        names = (bucket, other_bucket)
        if names not in self._aliases:
            self.root = self._location(self._prefix)
        self._aliases[names] = bucket == other_bucket or self._is_alias(bucket, other_bucket)
        return self._aliases[names]

    def _is_alias(self, bucket: str, other_bucket: str) -> bool:
        """Return whether two names are one bucket, as some stores allow. A new object has to be there under both."""
        key = f"{self._prefix}.fetch-worker-{secrets.token_hex(8)}"
        with self.client.session(f"compare the buckets {bucket} and {other_bucket}") as client:
            client.put_object(Bucket=other_bucket, Key=key, Body=b"")
            try:
                return self.client.head(bucket, key) is not None
            finally:
                client.delete_object(Bucket=other_bucket, Key=key)

    def open(self, location: str) -> BinaryIO:
        """Open an object for reading. Closing it ends the transfer. Raises OutputMissing, StorageTrouble.

        Reading may raise StorageTrouble too.
        """
        bucket, key = _bucket_and_key(location)
        with self.client.session(f"read {location}") as client:
            answer = unless_missing(lambda: client.get_object(Bucket=bucket, Key=key))
        if answer is None:
            raise OutputMissing(f"{location} is missing: `fetch-worker verify` downloads it again")
        return io.BufferedReader(_Download(answer["Body"], location), READ_BYTES)

    def url(self, location: str, seconds: float) -> str:
        """Return a signed URL with which anyone can read the object, for at most a week. Raises StorageTrouble."""
        bucket, key = _bucket_and_key(location)
        with self.client.session(f"sign a URL of {location}") as client:
            url: str = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": bucket, "Key": key},
                ExpiresIn=int(min(max(seconds, 1), LONGEST_URL)),
            )
        return url

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Read and hash the object, and compare it. Raises StorageTrouble if it can't be read."""
        bucket, key = _bucket_and_key(location)
        with self.client.session(f"read {location}") as client:
            answer = unless_missing(lambda: client.get_object(Bucket=bucket, Key=key))
            if answer is None:
                return "missing"
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] != size:
                    return "damaged"
                digest = hashlib.sha256()
                while chunk := body.read(READ_BYTES):
                    digest.update(chunk)
        return "whole" if digest.hexdigest() == sha256 else "damaged"

    def quarantine(self, location: str) -> None:
        """Copy the object to a free name, then delete it. Raises StorageTrouble."""
        bucket, key = _bucket_and_key(location)
        with self.client.session(f"rename {location}") as client:
            number, free_key = 0, f"{key}.damaged"
            while self.client.head(bucket, free_key) is not None:
                number += 1
                free_key = f"{key}.{number}.damaged"
            source = {"Bucket": bucket, "Key": key}
            if unless_missing(lambda: client.copy_object(Bucket=bucket, Key=free_key, CopySource=source)) is not None:
                client.delete_object(Bucket=bucket, Key=key)

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Delete objects, hundreds per call. Return the locations that could not be deleted, with the reasons.

        Raises StorageTrouble.
        """
        refused: dict[str, str] = {}
        by_bucket: defaultdict[str, list[str]] = defaultdict(list)
        for location in locations:
            bucket, key = _bucket_and_key(location)
            by_bucket[bucket].append(key)
        for bucket, keys in by_bucket.items():
            for start in range(0, len(keys), PAGE):
                with self.client.session(f"remove from the bucket {bucket}"):
                    errors = self.client.delete(bucket, keys[start : start + PAGE])
                for key, reason in errors.items():
                    location = f"{SCHEME}{bucket}/{key}"
                    refused[location] = f"can't remove {location}: {reason}"
        return refused

    def locations(self) -> Iterator[str]:
        """Return the locations of all objects below the prefix. Raises StorageTrouble."""
        doing = f"list {self._location(self._prefix)}"
        with self.client.session(doing) as client:
            pages = iter(
                client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=self._prefix, PaginationConfig={"PageSize": PAGE}
                )
            )
        while True:
            with self.client.session(doing):
                page = next(pages, None)
            if page is None:
                return
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a folder, as some consoles create
                    yield self._location(entry["Key"])

    def _location(self, key: str) -> str:
        return f"{SCHEME}{self._bucket}/{key}"

    def _stored(self, key: str, incoming: Incoming, media: Media) -> bool:
        """Store a file under a key unless it is there already. Return False if the key has another content."""
        same = self._compare(key, incoming)
        if same is None:
            checked = self._upload(key, incoming, media)
            if checked is not None:
                self._verify(key, incoming, checked=checked)
                return True
            same = self._compare(key, incoming)
        if same is None:
            raise StorageTrouble(f"can't write {self._location(key)}: another upload of it is in progress")
        return same

    def _compare(self, key: str, incoming: Incoming) -> bool | None:
        """Return whether the object at a key is this file. Return None if there is no object."""
        with self.client.session(f"read {self._location(key)}"):
            head = self.client.head(self._bucket, key)
        if head is None:
            return None
        if head["ContentLength"] != incoming.size:
            return False
        stored_hash = {name.lower(): value for name, value in head.get("Metadata", {}).items()}.get("sha256")
        if stored_hash is not None:
            return bool(stored_hash == incoming.sha256)
        if head.get("ChecksumSHA256") == _base64(incoming.sha256):
            return True
        # The object has no hash, for example because another tool copied it. Compare its bytes.
        return self.examine(self._location(key), size=incoming.size, sha256=incoming.sha256) == "whole"

    def _verify(self, key: str, incoming: Incoming, *, checked: bool) -> None:
        """Check an uploaded object. Read its bytes back if the store did not confirm a checksum.

        Raises StorageTrouble if the object is wrong.
        """
        location = self._location(key)
        if checked:
            with self.client.session(f"read {location}"):
                head = self.client.head(self._bucket, key)
            if head is None or head["ContentLength"] != incoming.size:
                raise StorageTrouble(f"the store accepted {location}, but the object is missing or has another size")
        elif self.examine(location, size=incoming.size, sha256=incoming.sha256) != "whole":
            with self.client.session(f"remove {location}") as client:
                client.delete_object(Bucket=self._bucket, Key=key)
            raise StorageTrouble(f"can't write {location}: the stored bytes differ from the received bytes")

    def _upload(self, key: str, incoming: Incoming, media: Media) -> bool | None:
        """Upload a file. Return whether the store confirmed the checksum, or None if the key was taken meanwhile."""
        checksum = _base64(incoming.sha256)
        with self.client.session(f"write {self._location(key)}") as client:

            def put(**features: Any) -> Any:
                with incoming.path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size != incoming.size:
                        raise OSError(errno.EIO, "the partial file has changed on the disk")
                    return client.put_object(
                        Bucket=self._bucket,
                        Key=key,
                        Body=file,
                        ContentLength=incoming.size,
                        ContentType=f"{media.type}; charset=utf-8" if media.type == "text/plain" else media.type,
                        Metadata={"sha256": incoming.sha256},
                        **features,
                    )

            features = {CONDITION: {"IfNoneMatch": "*"}, CHECKSUM: {"ChecksumSHA256": checksum}}
            try:
                answer = self.client.with_features(features, put)
            except ClientError as error:
                if status_of(error) in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
                    return None
                if code_of(error) in WRONG_SUM:
                    incoming.hold = False  # the local file is damaged
                raise
        return bool(answer.get("ChecksumSHA256") == checksum)


class _Download(io.RawIOBase):
    """The body of a response as a file."""

    def __init__(self, body: Any, location: str) -> None:
        self._body = body
        self._location = location

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            chunk = self._body.read(len(buffer))
        except CLIENT_ERRORS as error:
            raise StorageTrouble(f"can't read {self._location}: {reason_of(error)}") from None
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


def _bucket_and_key(location: str) -> tuple[str, str]:
    """Return the bucket and the key of a location. Raises StorageTrouble.

    >>> _bucket_and_key("s3://bucket/12/12345/0-ab.png")
    ('bucket', '12/12345/0-ab.png')
    """
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    if not (location.startswith(SCHEME) and bucket and key):
        raise StorageTrouble(f"{location} is not in S3: it was stored under another STORAGE_URL")
    return bucket, key


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
