"""Client of Amazon S3 or of a compatible store, with its errors, and without the features that the store lacks.

The endpoint and the credentials come from the usual AWS_* variables or files. Many stores lack some features of Amazon
S3, and refuse them in different ways. A refused feature is not used again.
"""

import base64
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from itertools import combinations
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from worker.errors import SettingsError, StorageTrouble
from worker.net.network_errors import describe

log = logging.getLogger(__name__)

CLIENT_ERRORS: tuple[type[Exception], ...] = (BotoCoreError, ClientError, HTTPError, OSError)
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
CHECKSUM_MODE = "x-amz-checksum-mode"
BATCH_DELETE = "DeleteObjects"
AMAZON = re.compile(r"^https://[a-z0-9.-]+\.amazonaws\.com(\.cn)?$")


class S3Client:
    """The client of a process. It is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process_client: tuple[int, Any] | None = None  # process id and client: a forked child needs a new one
        self._missing: set[str] = set()  # features that the store does not have

    @contextmanager
    def session(self, purpose: str) -> Iterator[Any]:
        """Yield boto3's client, and translate errors of the client and the network into StorageTrouble."""
        client = self.boto3_client()
        try:
            yield client
        except CLIENT_ERRORS as error:
            raise StorageTrouble(f"can't {purpose}: {reason_of(error)}") from None

    def boto3_client(self) -> Any:
        """Return this process's client. Creating one is slow and not thread-safe, using it is fast and thread-safe."""
        process_client = self._process_client
        if process_client is None or process_client[0] != os.getpid():
            with self._lock:
                process_client = self._process_client
                if process_client is None or process_client[0] != os.getpid():
                    process_client = self._process_client = (os.getpid(), _new_client())
        return process_client[1]

    def head(self, bucket: str, key: str) -> dict[str, Any] | None:
        """Return the metadata of an object, or None if there is no object. Raises the client's errors."""
        return unless_missing(
            lambda: self.with_features(
                {CHECKSUM_MODE: {"ChecksumMode": "ENABLED"}},
                lambda **features: self.boto3_client().head_object(Bucket=bucket, Key=key, **features),
            )
        )

    def delete(self, bucket: str, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects of a bucket. Return the reasons for those that remain, by key. Raises the client's errors."""
        refused, remaining = dict[str, str](), list(keys)
        if BATCH_DELETE not in self._missing:
            try:
                answer = self.boto3_client().delete_objects(
                    Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]}
                )
            except ClientError as error:
                if not _may_be_unknown(error):
                    raise
                self._delete_one(bucket, remaining.pop(0))  # raises if deleting is not allowed at all
                self._do_without({BATCH_DELETE})
            else:
                refused = {error["Key"]: error.get("Code", "refused")[:80] for error in answer.get("Errors", ())}
                removed = {entry["Key"] for entry in answer.get("Deleted", ())}
                remaining = [key for key in keys if key not in removed and key not in refused]  # not in the answer
        for key in remaining:
            try:
                self._delete_one(bucket, key)
            except ClientError as error:
                if status_of(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
                refused[key] = reason_of(error)
        return refused

    def _delete_one(self, bucket: str, key: str) -> None:
        unless_missing(lambda: self.boto3_client().delete_object(Bucket=bucket, Key=key))

    def with_features(
        self, features: Mapping[str, Mapping[str, Any]], call: Callable[..., dict[str, Any]]
    ) -> dict[str, Any]:
        """Make a call with optional features. If the store refuses, try again without some or all of them.

        Features that had to be left out are not used again. Raises the last error if no combination works, because then
        the refusal has another reason.
        """
        available = [name for name in features if name not in self._missing]
        attempts = [set(left_out) for count in range(len(available) + 1) for left_out in combinations(available, count)]
        refusal: Exception | None = None
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
                    if status_of(error) in ANSWERS:
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


def _new_client() -> Any:
    import boto3  # slow to import
    from botocore.config import Config

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
    except CLIENT_ERRORS as error:
        raise StorageTrouble(f"can't use the S3 store: {reason_of(error)}") from None


def _use_content_md5(request: Any, **_: Any) -> None:
    """Replace the checksum headers of a batch delete by Content-MD5, which every store supports."""
    for name in [
        name for name in request.headers if name.lower().startswith(("x-amz-checksum-", "x-amz-sdk-checksum"))
    ]:
        del request.headers[name]
    digest = hashlib.md5(request.body or b"", usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def unless_missing(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return the result of a call, or None if the object is missing. A missing bucket is an error."""
    try:
        return call()
    except ClientError as error:
        if status_of(error) == HTTPStatus.NOT_FOUND and code_of(error) != "NoSuchBucket":
            return None
        raise


def _may_be_unknown(error: Any) -> bool:
    """Return whether an error may mean that the store does not support a feature."""
    return status_of(error) in REFUSALS and code_of(error) not in NOT_ABOUT_FEATURES


def code_of(error: Any) -> str:
    """Return the error code in the store's answer, or an empty text."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    """Return the HTTP status of the store's answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def reason_of(error: Exception) -> str:
    """Return a short reason for an error. The error's own text is not used, because it may contain a URL."""
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"the store can't be reached, see AWS_ENDPOINT_URL ({describe(error)})"
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = code_of(error)
        if code.isdecimal() or not code:  # the response to a HEAD request has no text
            status = status_of(error)
            return f"{status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else f"status {status}"
        return code[:80]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return describe(error)
