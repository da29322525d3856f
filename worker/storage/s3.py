"""Storage in a bucket of Amazon S3 or of a compatible store. The store checks uploads with a checksum.

The endpoint and the credentials come from the usual AWS_* variables or files. Many stores lack some features of Amazon
S3, and refuse them in different ways. A refused feature is not used again: uploads are then read back and compared, and
objects are deleted one by one.
"""

import base64
import errno
import hashlib
import io
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from http import HTTPStatus
from itertools import combinations
from typing import Any, BinaryIO

from urllib3.exceptions import HTTPError

from worker.core.media.signatures import Media
from worker.errors import OutputMissing, SettingsError, StorageTrouble
from worker.net.network_errors import describe
from worker.storage.base import READ_BYTES, Condition, name_of
from worker.storage.partial_files import Incoming, PartialFiles

log = logging.getLogger(__name__)

SCHEME = "s3://"
PAGE = 1_000  # names per listing call, the limit of S3
LONGEST_URL = 604_800  # seconds: signatures are valid for at most a week
DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 30.0
ATTEMPTS = 2
CONNECTIONS = 64
WRONG_SUM = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "InvalidPart"})
REFUSALS = frozenset({400, 403, 405, 501})  # statuses for unknown features
ANSWERS = frozenset({404, 409, 412})  # statuses of calls that were understood
NOT_ABOUT_FEATURES = WRONG_SUM | {
    "EntityTooLarge",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoSuchBucket",
    "RequestTimeTooSkewed",
    "TokenRefreshRequired",
}
CONDITION = "If-None-Match"
CHECKSUM = "x-amz-checksum-sha256"
CHECKSUM_MODE = "x-amz-checksum-mode"
BATCH_DELETE = "DeleteObjects"
AMAZON = re.compile(r"^https://[a-z0-9.-]+\.amazonaws\.com(\.cn)?$")


class S3Storage:
    """Stores outputs as objects below `prefix` of an existing bucket. Partial files are local."""

    def __init__(self, bucket: str, prefix: str, partials: PartialFiles) -> None:
        self.partials = partials
        self._bucket = bucket
        self._prefix = "".join(f"{part}/" for part in prefix.split("/") if part)
        self._lock = threading.Lock()
        self._process_client: tuple[int, Any] | None = None  # process id and client: a forked child needs a new one
        self._missing: set[str] = set()  # features that the store does not have

    def prepare(self) -> None:
        """Create the folder of partial files, and check that the bucket can be used.

        Raises SettingsError, StorageTrouble.
        """
        try:
            self.partials.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageTrouble(f"can't create {self.partials.folder}: {error.strerror}") from None
        with self._client_for(f"use the bucket {self._bucket}") as client:
            status = _status_of(lambda: client.head_bucket(Bucket=self._bucket))
        if status == HTTPStatus.NOT_FOUND:
            raise StorageTrouble(f"the bucket {self._bucket} is missing: create it, or correct STORAGE_URL")
        if status == HTTPStatus.FORBIDDEN:
            raise StorageTrouble(
                f"access to the bucket {self._bucket} is refused: check the AWS_* credentials, and that they may "
                "list it (s3:ListBucket) and read, write and delete in it"
            )

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Upload a received file under its final name, and return its s3: location. Raises StorageTrouble."""
        incoming.sync()
        for digits in (16, 64):
            key = self._prefix + name_of(
                job_id=job_id, position=position, sha256=incoming.sha256[:digits], extension=media.extension
            )
            if self._stored(key, incoming, media):
                incoming.hold = False  # the object is stored, the local file is not needed
                return self._location(key)
        raise StorageTrouble(f"the content of {self._location(key)} does not match its name: move it away")

    def open(self, location: str) -> BinaryIO:
        """Open an object for reading. Closing it ends the transfer. Raises OutputMissing, StorageTrouble.

        Reading may raise StorageTrouble too.
        """
        bucket, key = _bucket_and_key(location)
        with self._client_for(f"read {location}") as client:
            answer = _unless_missing(lambda: client.get_object(Bucket=bucket, Key=key))
        if answer is None:
            raise OutputMissing(f"{location} is missing: `fetch-worker verify` downloads it again")
        return io.BufferedReader(_Download(answer["Body"], location), READ_BYTES)

    def url(self, location: str, seconds: float) -> str:
        """Return a signed URL with which anyone can read the object, for at most a week. Raises StorageTrouble."""
        bucket, key = _bucket_and_key(location)
        with self._client_for(f"sign a URL of {location}") as client:
            url: str = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": bucket, "Key": key},
                ExpiresIn=int(min(max(seconds, 1), LONGEST_URL)),
            )
        return url

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Read and hash the object, and compare it. Raises StorageTrouble if it can't be read."""
        bucket, key = _bucket_and_key(location)
        with self._client_for(f"read {location}") as client:
            answer = _unless_missing(lambda: client.get_object(Bucket=bucket, Key=key))
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
        with self._client_for(f"rename {location}") as client:
            number, free_key = 0, f"{key}.damaged"
            while self._head(client, bucket, free_key) is not None:
                number += 1
                free_key = f"{key}.{number}.damaged"
            source = {"Bucket": bucket, "Key": key}
            if _unless_missing(lambda: client.copy_object(Bucket=bucket, Key=free_key, CopySource=source)) is not None:
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
                with self._client_for(f"remove from the bucket {bucket}") as client:
                    errors = self._delete(client, bucket, keys[start : start + PAGE])
                for key, reason in errors.items():
                    location = f"{SCHEME}{bucket}/{key}"
                    refused[location] = f"can't remove {location}: {reason}"
        return refused

    def _delete(self, client: Any, bucket: str, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects of a bucket. Return the reasons for those that remain, by key. Raises the client's errors."""
        from botocore.exceptions import ClientError

        refused, remaining = dict[str, str](), list(keys)
        if BATCH_DELETE not in self._missing:
            try:
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
            except ClientError as error:
                if not _may_be_unknown(error):
                    raise
                self._delete_one(client, bucket, remaining.pop(0))  # raises if deleting is not allowed at all
                self._do_without({BATCH_DELETE})
            else:
                refused = {error["Key"]: error.get("Code", "refused")[:80] for error in answer.get("Errors", ())}
                removed = {entry["Key"] for entry in answer.get("Deleted", ())}
                remaining = [key for key in keys if key not in removed and key not in refused]  # not in the answer
        for key in remaining:
            try:
                self._delete_one(client, bucket, key)
            except ClientError as error:
                if _status(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
                refused[key] = _reason(error)
        return refused

    def _delete_one(self, client: Any, bucket: str, key: str) -> None:
        _unless_missing(lambda: client.delete_object(Bucket=bucket, Key=key))

    def locations(self) -> Iterator[str]:
        """Return the locations of all objects below the prefix. Raises StorageTrouble."""
        doing = f"list {self._location(self._prefix)}"
        with self._client_for(doing) as client:
            pages = iter(
                client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=self._prefix, PaginationConfig={"PageSize": PAGE}
                )
            )
        while True:
            with self._client_for(doing):
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
        with self._client_for(f"read {self._location(key)}") as client:
            head = self._head(client, self._bucket, key)
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
            with self._client_for(f"read {location}") as client:
                head = self._head(client, self._bucket, key)
            if head is None or head["ContentLength"] != incoming.size:
                raise StorageTrouble(f"the store accepted {location}, but the object is missing or has another size")
        elif self.examine(location, size=incoming.size, sha256=incoming.sha256) != "whole":
            with self._client_for(f"remove {location}") as client:
                client.delete_object(Bucket=self._bucket, Key=key)
            raise StorageTrouble(f"can't write {location}: the stored bytes differ from the received bytes")

    def _upload(self, key: str, incoming: Incoming, media: Media) -> bool | None:
        """Upload a file. Return whether the store confirmed the checksum, or None if the key was taken meanwhile."""
        from botocore.exceptions import ClientError

        checksum = _base64(incoming.sha256)
        with self._client_for(f"write {self._location(key)}") as client, incoming.path.open("rb") as file:
            try:
                answer = self._with_features(
                    {CONDITION: {"IfNoneMatch": "*"}, CHECKSUM: {"ChecksumSHA256": checksum}},
                    lambda **features: client.put_object(
                        Bucket=self._bucket,
                        Key=key,
                        Body=_Body(file.fileno(), incoming.size),
                        ContentLength=incoming.size,
                        ContentType=f"{media.type}; charset=utf-8" if media.type == "text/plain" else media.type,
                        Metadata={"sha256": incoming.sha256},
                        **features,
                    ),
                )
            except ClientError as error:
                if _status(error) in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT):
                    return None
                if _code(error) in WRONG_SUM:
                    incoming.hold = False  # the local file is damaged
                raise
        return bool(answer.get("ChecksumSHA256") == checksum)

    def _with_features(
        self, features: Mapping[str, Mapping[str, Any]], call: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Make a call with optional features. If the store refuses, try again without some or all of them.

        Features that had to be left out are not used again. Raises the last error if no combination works, because then
        the refusal has another reason.
        """
        from botocore.exceptions import ClientError

        available = [name for name in features if name not in self._missing]
        attempts = [set(left_out) for count in range(len(available) + 1) for left_out in combinations(available, count)]
        refusal: ClientError | None = None
        for left_out in attempts:
            arguments = {
                name: value
                for feature in available
                if feature not in left_out
                for name, value in features[feature].items()
            }
            try:
                answer = call(**arguments)
            except ClientError as error:
                if not _may_be_unknown(error):
                    if _status(error) in ANSWERS:
                        self._do_without(left_out)
                    raise
                refusal = error
            else:
                self._do_without(left_out)
                return answer
        raise refusal or AssertionError("no call was made")

    def _do_without(self, features: Collection[str]) -> None:
        for name in sorted(features):
            if name not in self._missing:
                self._missing.add(name)
                log.warning("the S3 store does not support %s: not used from now on", name)

    def _head(self, client: Any, bucket: str, key: str) -> dict[str, Any] | None:
        """Return the metadata of an object, or None if there is no object."""
        return _unless_missing(
            lambda: self._with_features(
                {CHECKSUM_MODE: {"ChecksumMode": "ENABLED"}},
                lambda **features: client.head_object(Bucket=bucket, Key=key, **features),
            )
        )

    @contextmanager
    def _client_for(self, doing: str) -> Iterator[Any]:
        """Yield the client, and translate errors of the client and the network into StorageTrouble."""
        client = self._client()
        try:
            yield client
        except _client_errors() as error:
            raise StorageTrouble(f"can't {doing}: {_reason(error)}") from None

    def _client(self) -> Any:
        """Return this process's client. Creating one is slow and not thread-safe, using it is fast and thread-safe."""
        process_client = self._process_client
        if process_client is None or process_client[0] != os.getpid():
            with self._lock:
                process_client = self._process_client
                if process_client is None or process_client[0] != os.getpid():
                    process_client = self._process_client = (os.getpid(), self._new_client())
        return process_client[1]

    def _new_client(self) -> Any:
        try:
            import boto3  # an optional dependency, and slow to import
            from botocore.config import Config
        except ImportError:
            raise SettingsError("STORAGE_URL names an S3 bucket: pip install 'fetch-worker[s3]'") from None
        config = Config(
            signature_version="s3v4",
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=CONNECTIONS,
            proxies={},  # no proxies from the environment, as in the rest of the project
            request_checksum_calculation="when_required",  # this module sends and checks the checksums itself
            response_checksum_validation="when_required",
        )
        try:
            session = boto3.session.Session()
            region = os.environ.get("AWS_REGION") or session.region_name or DEFAULT_REGION
            # With an AWS_ENDPOINT_URL, the bucket is part of the path, unless AWS_CONFIG_FILE says `virtual`.
            client = session.client("s3", region_name=region, config=config)
            if AMAZON.search(client.meta.endpoint_url):  # otherwise signed URLs have no region and are redirected
                client = session.client(
                    "s3", region_name=region, config=config.merge(Config(s3={"addressing_style": "virtual"}))
                )
            client.meta.events.register("before-sign.s3.DeleteObjects", _use_content_md5)
            return client
        except ValueError:
            raise SettingsError("AWS_ENDPOINT_URL or AWS_REGION is malformed, for example http://host:8333") from None
        except _client_errors() as error:
            raise StorageTrouble(f"can't use the bucket {self._bucket}: {_reason(error)}") from None


class _Body(io.RawIOBase):
    """The first `size` bytes of an open file, with its own read position. Raises OSError if there are fewer."""

    def __init__(self, handle: int, size: int) -> None:
        self._handle = handle
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        chunk = os.pread(self._handle, min(len(buffer), self._size - self._at), self._at)
        if not chunk and self._at < self._size and len(buffer):
            raise OSError(errno.EIO, "the partial file has changed on the disk")
        buffer[: len(chunk)] = chunk
        self._at += len(chunk)
        return len(chunk)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = min(max(origin + offset, 0), self._size)
        return self._at

    def tell(self) -> int:
        return self._at


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
        except _client_errors() as error:
            raise StorageTrouble(f"can't read {self._location}: {_reason(error)}") from None
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


def _use_content_md5(request: Any, **_: Any) -> None:
    """Replace the checksum headers of a batch delete by Content-MD5, which every store supports."""
    for name in [
        name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))
    ]:
        del request.headers[name]
    digest = hashlib.md5(request.body or b"", usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _client_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, HTTPError, OSError


def _unless_missing(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return the result of a call, or None if the object is missing. A missing bucket is an error."""
    from botocore.exceptions import ClientError

    try:
        return call()
    except ClientError as error:
        if _status(error) == HTTPStatus.NOT_FOUND and _code(error) != "NoSuchBucket":
            return None
        raise


def _status_of(call: Callable[[], Any]) -> int:
    """Return the status of a call: 200, 403 or 404. Raises the client's other errors."""
    from botocore.exceptions import ClientError

    try:
        call()
    except ClientError as error:
        if _status(error) in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
            return _status(error)
        raise
    return HTTPStatus.OK


def _may_be_unknown(error: Any) -> bool:
    """Return whether an error may mean that the store does not support a feature."""
    return _status(error) in REFUSALS and _code(error) not in NOT_ABOUT_FEATURES


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason(error: Exception) -> str:
    """Return a short reason for an error. The error's own text is not used, because it may contain a URL."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"the store can't be reached, see AWS_ENDPOINT_URL ({describe(error)})"
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        if code.isdecimal() or not code:  # the response to a HEAD request has no text
            status = _status(error)
            return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else f"status {status}"
        return code[:80]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return describe(error)
