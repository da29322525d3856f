"""Outputs in an S3 bucket, of Amazon's or of any store that speaks its language: checked by the store as they arrive.

Where the store is and who we are is said by the usual AWS_* variables (or files) of every S3 client. Many stores lack
some of what Amazon's has, and refuse it in different ways. What a store refuses is left out from then on: files are
then read back and compared, and objects removed one by one.
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
from worker.storage.local import READ_BYTES, Condition, name_of
from worker.storage.partial_files import Incoming, PartialFiles

log = logging.getLogger(__name__)

SCHEME = "s3://"
PAGE = 1_000  # names per call of a listing, the most that S3 gives
LONGEST_URL = 604_800  # seconds: no store signs for more than a week
DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 30.0
ATTEMPTS = 2
CONNECTIONS = 64
WRONG_SUM = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "InvalidPart"})
REFUSALS = frozenset({400, 403, 405, 501})  # how stores answer to what they do not know
ANSWERS = frozenset({404, 409, 412})  # to a call that was understood
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
    """Outputs as objects below `prefix` of a bucket, which must exist. What is still on its way is in local files."""

    def __init__(self, bucket: str, prefix: str, partials: PartialFiles) -> None:
        self.partials = partials
        self._bucket = bucket
        self._prefix = "".join(f"{part}/" for part in prefix.split("/") if part)
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None  # a process and its client: connections don't survive a fork
        self._missing: set[str] = set()  # what the store turned out not to know

    def prepare(self) -> None:
        """Makes the folder of partial files, and looks whether the bucket can be used.

        Raises SettingsError, StorageTrouble.
        """
        try:
            self.partials.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageTrouble(f"can't make {self.partials.folder}: {error.strerror}") from None
        with self._talking(f"use the bucket {self._bucket}") as client:
            status = _status_of(lambda: client.head_bucket(Bucket=self._bucket))
        if status == HTTPStatus.NOT_FOUND:
            raise StorageTrouble(f"the bucket {self._bucket} is missing: make it, or correct STORAGE_URL")
        if status == HTTPStatus.FORBIDDEN:
            raise StorageTrouble(
                f"access to the bucket {self._bucket} is refused: check the AWS_* credentials, and that they may "
                "list it (s3:ListBucket) and read, write and delete in it"
            )

    def keep(self, incoming: Incoming, *, job_id: int, position: int, media: Media) -> str:
        """Uploads a received file under its final name; its s3: location. Raises StorageTrouble."""
        incoming.sync()
        for digits in (16, 64):
            key = self._prefix + name_of(
                job_id=job_id, position=position, sha256=incoming.sha256[:digits], extension=media.extension
            )
            if self._stored(key, incoming, media):
                incoming.hold = False  # its bytes are safe elsewhere
                return self._location(key)
        raise StorageTrouble(f"{self._location(key)} has another content than its name says: move it away")

    def open(self, location: str) -> BinaryIO:
        """The object, to be read from its start on; closing it ends the transfer. Raises OutputMissing, StorageTrouble.

        Reading may raise StorageTrouble as well.
        """
        bucket, key = _parsed(location)
        with self._talking(f"read {location}") as client:
            answer = _unless_missing(lambda: client.get_object(Bucket=bucket, Key=key))
        if answer is None:
            raise OutputMissing(f"{location} is gone: `fetch-worker verify` gets it again")
        return io.BufferedReader(_Download(answer["Body"], location), READ_BYTES)

    def url(self, location: str, seconds: float) -> str:
        """A signed URL: whoever has it can read the object, for at most a week. Raises StorageTrouble."""
        bucket, key = _parsed(location)
        with self._talking(f"sign a URL of {location}") as client:
            url: str = client.generate_presigned_url(
                "get_object",
                Params={"Bucket": bucket, "Key": key},
                ExpiresIn=int(min(max(seconds, 1), LONGEST_URL)),
            )
        return url

    def examine(self, location: str, *, size: int, sha256: str) -> Condition:
        """Reads the object and hashes it. Raises StorageTrouble where it can't be told."""
        bucket, key = _parsed(location)
        with self._talking(f"read {location}") as client:
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
        """Copies the object to a free name, then removes it. Raises StorageTrouble."""
        bucket, key = _parsed(location)
        with self._talking(f"rename {location}") as client:
            number, free = 0, f"{key}.damaged"
            while self._head(client, bucket, free) is not None:
                number += 1
                free = f"{key}.{number}.damaged"
            source = {"Bucket": bucket, "Key": key}
            if _unless_missing(lambda: client.copy_object(Bucket=bucket, Key=free, CopySource=source)) is not None:
                client.delete_object(Bucket=bucket, Key=key)

    def remove(self, locations: Sequence[str]) -> dict[str, str]:
        """Removes objects, hundreds by one call. Those that the store keeps, and why. Raises StorageTrouble."""
        refused: dict[str, str] = {}
        by_bucket: defaultdict[str, list[str]] = defaultdict(list)
        for location in locations:
            bucket, key = _parsed(location)
            by_bucket[bucket].append(key)
        for bucket, keys in by_bucket.items():
            for start in range(0, len(keys), PAGE):
                with self._talking(f"remove from the bucket {bucket}") as client:
                    errors = self._delete(client, bucket, keys[start : start + PAGE])
                for key, reason in errors.items():
                    location = f"{SCHEME}{bucket}/{key}"
                    refused[location] = f"can't remove {location}: {reason}"
        return refused

    def _delete(self, client: Any, bucket: str, keys: Sequence[str]) -> dict[str, str]:
        """Remove objects of a bucket; why some are still there, by key. Raises the errors of the client."""
        from botocore.exceptions import ClientError

        refused, rest = dict[str, str](), list(keys)
        if BATCH_DELETE not in self._missing:
            try:
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
            except ClientError as error:
                if not _may_be_unknown(error):
                    raise
                self._delete_one(client, bucket, rest.pop(0))  # raises, where nothing may be removed at all
                self._do_without({BATCH_DELETE})
            else:
                refused = {error["Key"]: error.get("Code", "refused")[:80] for error in answer.get("Errors", ())}
                removed = {entry["Key"] for entry in answer.get("Deleted", ())}
                rest = [key for key in keys if key not in removed and key not in refused]  # it says nothing of these
        for key in rest:
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
        """All objects below the prefix. Raises StorageTrouble."""
        doing = f"list {self._location(self._prefix)}"
        with self._talking(doing) as client:
            pages = iter(
                client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket, Prefix=self._prefix, PaginationConfig={"PageSize": PAGE}
                )
            )
        while True:
            with self._talking(doing):
                page = next(pages, None)
            if page is None:
                return
            for found in page.get("Contents", ()):
                if not found["Key"].endswith("/"):  # a folder, as consoles make them
                    yield self._location(found["Key"])

    def _location(self, key: str) -> str:
        return f"{SCHEME}{self._bucket}/{key}"

    def _stored(self, key: str, incoming: Incoming, media: Media) -> bool:
        """Makes sure that a file is at a key; False where something else is."""
        there = self._compare(key, incoming)
        if there is None:
            checked = self._upload(key, incoming, media)
            if checked is not None:
                self._verify(key, incoming, checked=checked)
                return True
            there = self._compare(key, incoming)
        if there is None:
            raise StorageTrouble(f"can't write {self._location(key)}: another upload of it is under way")
        return there

    def _compare(self, key: str, incoming: Incoming) -> bool | None:
        """Whether what is at a key is this file; None where nothing is."""
        with self._talking(f"read {self._location(key)}") as client:
            head = self._head(client, self._bucket, key)
        if head is None:
            return None
        if head["ContentLength"] != incoming.size:
            return False
        known = {name.lower(): value for name, value in head.get("Metadata", {}).items()}.get("sha256")
        if known is not None:
            return bool(known == incoming.sha256)
        if head.get("ChecksumSHA256") == _base64(incoming.sha256):
            return True
        # nobody says what it is (a copy by another tool, say): its bytes do
        return self.examine(self._location(key), size=incoming.size, sha256=incoming.sha256) == "whole"

    def _verify(self, key: str, incoming: Incoming, *, checked: bool) -> None:
        """Looks at what was uploaded; its bytes are read back where the store doesn't say that it has checked them."""
        location = self._location(key)
        if checked:
            with self._talking(f"read {location}") as client:
                head = self._head(client, self._bucket, key)
            if head is None or head["ContentLength"] != incoming.size:
                raise StorageTrouble(f"{location} was taken by the store, but is not there as it was sent")
        elif self.examine(location, size=incoming.size, sha256=incoming.sha256) != "whole":
            with self._talking(f"remove {location}") as client:
                client.delete_object(Bucket=self._bucket, Key=key)
            raise StorageTrouble(f"can't write {location}: other bytes arrived than were received")

    def _upload(self, key: str, incoming: Incoming, media: Media) -> bool | None:
        """Sends a file; whether the store says that it checked the bytes. None where the name was taken meanwhile."""
        from botocore.exceptions import ClientError

        checksum = _base64(incoming.sha256)
        with self._talking(f"write {self._location(key)}") as client, incoming.path.open("rb") as file:
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
                    incoming.hold = False  # the file is not what was received any more
                raise
        return bool(answer.get("ChecksumSHA256") == checksum)

    def _with_features(
        self, features: Mapping[str, Mapping[str, Any]], call: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Make a call with what the store may not know; where it refuses, without one of these, or all of them.

        What a call succeeds without is left out from then on. Raises the last refusal where nothing helps: then it was
        meant.
        """
        from botocore.exceptions import ClientError

        known = [name for name in features if name not in self._missing]
        attempts = [set(left_out) for count in range(len(known) + 1) for left_out in combinations(known, count)]
        refusal: ClientError | None = None
        for left_out in attempts:
            arguments = {
                name: value for feature in known if feature not in left_out for name, value in features[feature].items()
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
                log.warning("the S3 store does not know %s: it is done without from now on", name)

    def _head(self, client: Any, bucket: str, key: str) -> dict[str, Any] | None:
        """What a store says about an object; None where there is none."""
        return _unless_missing(
            lambda: self._with_features(
                {CHECKSUM_MODE: {"ChecksumMode": "ENABLED"}},
                lambda **features: client.head_object(Bucket=bucket, Key=key, **features),
            )
        )

    @contextmanager
    def _talking(self, doing: str) -> Iterator[Any]:
        """The client, to do something with; whatever it or the network refuses is a StorageTrouble."""
        client = self._client()
        try:
            yield client
        except _refusals() as error:
            raise StorageTrouble(f"can't {doing}: {_reason(error)}") from None

    def _client(self) -> Any:
        """This process's client: making one is slow and not safe among threads, using it is both."""
        made = self._made
        if made is None or made[0] != os.getpid():
            with self._lock:
                made = self._made
                if made is None or made[0] != os.getpid():
                    made = self._made = (os.getpid(), self._new_client())
        return made[1]

    def _new_client(self) -> Any:
        try:
            import boto3  # an extra, and slow to import
            from botocore.config import Config
        except ImportError:
            raise SettingsError("STORAGE_URL names an S3 bucket: pip install 'fetch-worker[s3]'") from None
        config = Config(
            signature_version="s3v4",
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=CONNECTIONS,
            proxies={},  # none from the environment, as for everything else
            request_checksum_calculation="when_required",  # we name checksums ourselves, and check what we read
            response_checksum_validation="when_required",
        )
        try:
            session = boto3.session.Session()
            region = os.environ.get("AWS_REGION") or session.region_name or DEFAULT_REGION
            # with an endpoint of its own the bucket goes into the path, unless AWS_CONFIG_FILE says `virtual`
            client = session.client("s3", region_name=region, config=config)
            if AMAZON.search(client.meta.endpoint_url):  # else a signed URL would name no region, and be redirected
                client = session.client(
                    "s3", region_name=region, config=config.merge(Config(s3={"addressing_style": "virtual"}))
                )
            client.meta.events.register("before-sign.s3.DeleteObjects", _by_md5)
            return client
        except ValueError:
            raise SettingsError("AWS_ENDPOINT_URL or AWS_REGION is malformed, for example http://host:8333") from None
        except _refusals() as error:
            raise StorageTrouble(f"can't use the bucket {self._bucket}: {_reason(error)}") from None


class _Body(io.RawIOBase):
    """The first `size` bytes of an open file, read on their own. Raises OSError where there are fewer."""

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
    """The body of an answer as a file."""

    def __init__(self, body: Any, location: str) -> None:
        self._body = body
        self._location = location

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            chunk = self._body.read(len(buffer))
        except _refusals() as error:
            raise StorageTrouble(f"can't read {self._location}: {_reason(error)}") from None
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


def _parsed(location: str) -> tuple[str, str]:
    """The bucket and the key of a location.

    >>> _parsed("s3://bucket/12/12345/0-ab.png")
    ('bucket', '12/12345/0-ab.png')
    """
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    if not (location.startswith(SCHEME) and bucket and key):
        raise StorageTrouble(f"{location} is not in S3: it was stored under another STORAGE_URL")
    return bucket, key


def _by_md5(request: Any, **_: Any) -> None:
    """Have the list of a batch delete checked by Content-MD5, as every store knows it, in place of newer checksums."""
    for name in [
        name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))
    ]:
        del request.headers[name]
    digest = hashlib.md5(request.body or b"", usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _refusals() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, HTTPError, OSError


def _unless_missing(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What a call answers; None where it says that there is no such object. A missing bucket is no missing object."""
    from botocore.exceptions import ClientError

    try:
        return call()
    except ClientError as error:
        if _status(error) == HTTPStatus.NOT_FOUND and _code(error) != "NoSuchBucket":
            return None
        raise


def _status_of(call: Callable[[], Any]) -> int:
    """The status that a call is answered with, where it is one that says something about the bucket."""
    from botocore.exceptions import ClientError

    try:
        call()
    except ClientError as error:
        if _status(error) in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN):
            return _status(error)
        raise
    return HTTPStatus.OK


def _may_be_unknown(error: Any) -> bool:
    """Whether a refusal may only mean that the store does not know what it was asked for."""
    return _status(error) in REFUSALS and _code(error) not in NOT_ABOUT_FEATURES


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _reason(error: Exception) -> str:
    """Why something was refused, in a few words. The errors' own texts are not used: they hold URLs and more."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"the store can't be reached, see AWS_ENDPOINT_URL ({describe(error)})"
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        if code.isdecimal() or not code:  # a HEAD is answered without a text
            status = _status(error)
            return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else f"status {status}"
        return code[:80]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return describe(error)
