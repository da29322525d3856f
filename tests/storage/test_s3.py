"""S3 storage on a real server: objects are complete and never overwritten."""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from botocore.awsrequest import AWSResponse
from botocore.loaders import JSONFileLoader

from tests.s3_servers import S3Server, give_second_name
from worker.core.media.signatures import Media
from worker.errors import OutputMissing, SettingsError, StorageTrouble
from worker.settings import load
from worker.storage import s3 as module
from worker.storage.base import Storage
from worker.storage.partial_files import PartialFiles, Source
from worker.storage.s3 import S3Storage
from worker.storage.select import storage_for

PNG = Media("image/png", "png")
BODY = b"picture " * 1_000
SHA = hashlib.sha256(BODY).hexdigest()
LARGE = os.urandom(1 << 20) * 12


class Bucket:
    """A bucket that the tests read and write with their own client."""

    def __init__(self, server: S3Server) -> None:
        self.name = server.bucket()
        self.client = server.client

    def empty(self) -> None:
        for key in self.keys():
            self.client.delete_object(Bucket=self.name, Key=key)
        assert self.uploads() == 0

    def keys(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def put(self, key: str, body: bytes, **more: Any) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=body, **more)

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def head(self, key: str) -> dict[str, Any]:
        return dict(self.client.head_object(Bucket=self.name, Key=key))

    def uploads(self) -> int:
        return len(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", []))


@pytest.fixture(scope="module", autouse=True)
def _cached_models() -> Iterator[None]:
    """Cache the files that describe S3's calls. This halves the time of these tests."""
    with pytest.MonkeyPatch.context() as patched:
        read = cache(JSONFileLoader().load_file)
        patched.setattr(JSONFileLoader, "load_file", lambda _, path: read(path))
        yield


@pytest.fixture(scope="module")
def shared_bucket(s3_server: S3Server) -> Bucket:
    """One bucket for all these tests, because the first write to a new bucket is slow."""
    return Bucket(s3_server)


@pytest.fixture
def bucket(s3: S3Server, shared_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return an empty bucket, and set the environment variables for it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    shared_bucket.empty()
    return shared_bucket


@pytest.fixture
def storage(bucket: Bucket, tmp_path: Path) -> S3Storage:
    """Return a storage on an empty bucket."""
    return S3Storage(bucket.name, "out/puts", PartialFiles(tmp_path / "partial"))


def _keep(storage: Storage, body: bytes = BODY, *, position: int = 2, then: Callable[[Path], Any] = str) -> str:
    """Receive and store an output; call `then` with the partial file in between."""
    with storage.partials.receive(7 + position, "t") as incoming:
        for start in range(0, len(body), 999_999):
            incoming.write(body[start : start + 999_999])
        then(incoming.path)
        return storage.keep(incoming, job_id=12_345, position=position, media=PNG)


def _record_calls(storage: S3Storage, calls: list[str]) -> None:
    """Record every call to the store."""
    storage.client.boto3_client().meta.events.register(
        "before-send.s3", lambda event_name, **_: calls.append(event_name)
    )


def _replace_answers(
    storage: S3Storage, operation: str, answer: Callable[[Any], tuple[int, bytes] | None], headers: Any = ()
) -> None:
    """Replace the store's answers to some calls by (status, text)."""

    def stand_in(request: Any, **_: Any) -> AWSResponse | None:
        response = answer(request)
        if response is None:
            return None
        return AWSResponse(request.url, response[0], dict(headers), _Raw(response[1]))

    storage.client.boto3_client().meta.events.register(f"before-send.s3.{operation}", stand_in)


class _Raw:
    def __init__(self, text: bytes) -> None:
        self._text = text

    def stream(self) -> Iterator[bytes]:
        yield self._text


def test_a_stored_output_has_its_bytes_its_type_and_a_generated_name(storage: S3Storage, bucket: Bucket) -> None:
    """The name has job, position and hash below the prefix. The metadata has the type."""
    assert _keep(storage) == f"s3://{bucket.name}/out/puts/12/12345/2-{SHA[:16]}.png"
    key = f"out/puts/12/12345/2-{SHA[:16]}.png"
    assert bucket.keys() == [key]
    assert bucket.get(key) == BODY
    head = bucket.head(key)
    assert (head["ContentType"], head["Metadata"]) == ("image/png", {"sha256": SHA})
    assert list(storage.partials.folder.iterdir()) == []


def test_the_partial_file_is_deleted_after_an_output_is_stored(storage: S3Storage) -> None:
    """After a failure it is kept."""
    with storage.partials.receive(7, "t") as incoming:
        incoming.begin(Source("link", "etag", len(BODY)))
        incoming.write(BODY)
        incoming.hold = True
        refused = S3Storage("no-such-bucket", "", storage.partials)
        with pytest.raises(StorageTrouble):
            refused.keep(incoming, job_id=12_345, position=2, media=PNG)
        assert incoming.hold
        storage.keep(incoming, job_id=12_345, position=2, media=PNG)
    assert list(storage.partials.folder.iterdir()) == []


def test_an_empty_output_is_stored_too(storage: S3Storage) -> None:
    with storage.open(_keep(storage, b"")) as file:
        assert file.read() == b""


def test_an_output_that_is_stored_twice_is_uploaded_once(storage: S3Storage) -> None:
    """The second time, only its metadata is read."""
    location, calls = _keep(storage), list[str]()
    _record_calls(storage, calls)
    assert _keep(storage) == location
    assert calls == ["before-send.s3.HeadObject"]


def test_of_concurrent_threads_one_uploads_and_all_return_the_same_location(storage: S3Storage, bucket: Bucket) -> None:
    """The other threads find the object. All threads share one client."""
    with ThreadPoolExecutor(4) as threads:
        locations = list(threads.map(lambda _: _keep_in_thread(storage), range(8)))
    assert len(set(locations)) == 1
    assert bucket.keys() == [locations[0].partition(f"{bucket.name}/")[2]]


def _keep_in_thread(storage: S3Storage) -> str:
    with storage.partials.receive(7, f"{threading.get_ident()}") as incoming:
        incoming.write(BODY)
        return storage.keep(incoming, job_id=12_345, position=2, media=PNG)


def test_another_content_under_the_same_name_is_never_overwritten(storage: S3Storage, bucket: Bucket) -> None:
    """For another size, and for the same size with or without a hash. The next name contains the complete hash."""
    key, longer = f"out/puts/12/12345/2-{SHA[:16]}.png", f"out/puts/12/12345/2-{SHA}.png"
    for content, arguments in (
        (b"other", {}),
        (BODY[::-1], {}),
        (BODY[::-1], {"Metadata": {"sha256": "ab" * 32}}),
    ):
        bucket.put(key, content, **arguments)
        assert _keep(storage) == f"s3://{bucket.name}/{longer}"
        assert (bucket.get(key), bucket.get(longer)) == (content, BODY)
    bucket.put(longer, b"another")
    with pytest.raises(StorageTrouble, match=f"content of s3://{bucket.name}/{longer} does not match its name"):
        _keep(storage)
    assert (bucket.get(key), bucket.get(longer)) == (BODY[::-1], b"another")


def test_the_same_content_from_another_tool_is_recognized(storage: S3Storage, bucket: Bucket) -> None:
    """A copy by another tool has no hash, so its bytes are compared."""
    bucket.put(f"out/puts/12/12345/2-{SHA[:16]}.png", BODY)
    assert _keep(storage) == f"s3://{bucket.name}/out/puts/12/12345/2-{SHA[:16]}.png"


def test_a_name_that_is_taken_between_check_and_upload_is_not_overwritten(storage: S3Storage, bucket: Bucket) -> None:
    """The store refuses the upload, and the object there is compared."""
    key = f"out/puts/12/12345/2-{SHA[:16]}.png"
    events = storage.client.boto3_client().meta.events
    events.register_first("before-call.s3.PutObject", lambda **_: bucket.put(key, b"other"), unique_id="once")
    location = _keep(storage)
    assert location.endswith(f"2-{SHA}.png")
    assert bucket.get(key) == b"other"


def test_a_large_output_is_uploaded_with_one_call(storage: S3Storage, bucket: Bucket) -> None:
    """The second time it is not uploaded."""
    calls: list[str] = []
    location = _keep(storage, LARGE)
    key = location.partition(f"{bucket.name}/")[2]
    head = bucket.head(key)
    assert (head["ContentType"], head["Metadata"]) == ("image/png", {"sha256": hashlib.sha256(LARGE).hexdigest()})
    assert bucket.get(key) == LARGE
    assert bucket.uploads() == 0
    _record_calls(storage, calls)
    assert _keep(storage, LARGE) == location
    assert calls == ["before-send.s3.HeadObject"]


def test_bytes_that_changed_before_the_upload_are_refused_by_the_store(storage: S3Storage, bucket: Bucket) -> None:
    """The store gets the checksum."""
    with pytest.raises(StorageTrouble, match="BadDigest"):
        _keep(storage, then=lambda path: path.write_bytes(BODY[::-1]))
    with pytest.raises(StorageTrouble, match="changed on the disk"):
        _keep(storage, then=lambda path: path.write_bytes(BODY[:-1]))
    assert bucket.keys() == []


def test_an_object_in_a_store_without_checksums_is_read_back(storage: S3Storage, bucket: Bucket) -> None:
    """An object with other bytes is deleted, and the upload is tried again later."""

    def remove_checksum(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("x-amz-checksum-sha256", None)

    storage.client.boto3_client().meta.events.register("before-call.s3.PutObject", remove_checksum)
    calls: list[str] = []
    _record_calls(storage, calls)
    location = _keep(storage)
    assert calls[-1] == "before-send.s3.GetObject"
    assert bucket.get(location.partition(f"{bucket.name}/")[2]) == BODY
    bucket.client.delete_object(Bucket=bucket.name, Key=location.partition(f"{bucket.name}/")[2])
    with pytest.raises(StorageTrouble, match="the stored bytes differ"):
        _keep(storage, then=lambda path: path.write_bytes(BODY[::-1]))
    assert bucket.keys() == []


def test_an_error_of_the_store_raises_storage_trouble(storage: S3Storage) -> None:
    """The message has the error code, but not the text of the response."""
    _replace_answers(
        storage, "PutObject", lambda _: (400, b"<Error><Code>QuotaExceeded</Code><Message>x</Message></Error>")
    )
    with pytest.raises(StorageTrouble) as refused:
        _keep(storage)
    assert str(refused.value).endswith(f"2-{SHA[:16]}.png: QuotaExceeded")


def test_a_stored_output_can_be_opened_and_read_in_chunks(storage: S3Storage, bucket: Bucket) -> None:
    """As a file. Closing it early ends the transfer and releases the connection."""
    location, bodies = _keep(storage), list[Any]()
    storage.client.boto3_client().meta.events.register(
        "after-call.s3.GetObject", lambda parsed, **_: bodies.append(parsed.get("Body"))
    )
    with storage.open(location) as file:
        assert file.read(8) == b"picture "
        assert file.read() == BODY[8:]
    storage.open(location).close()
    storage.examine(location, size=1, sha256=SHA)
    assert [body._raw_stream.closed for body in bodies] == [True] * 3
    with pytest.raises(OutputMissing, match="is missing"):
        storage.open(f"{location}x")
    with pytest.raises(StorageTrouble, match="not in S3"):
        storage.open("file:///srv/key")


def test_a_signed_url_returns_the_output(storage: S3Storage, s3: S3Server, bucket: Bucket) -> None:
    """With its type and for a limited time. Without the signature, access is refused."""
    location = _keep(storage)
    url = storage.url(location, 60)
    answer = requests.get(url, timeout=5)
    assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, BODY, "image/png")
    assert requests.get(url.partition("?")[0], timeout=5).status_code == 403
    assert s3.secret not in url
    assert "X-Amz-Expires=1&" in storage.url(location, -5)
    assert "X-Amz-Expires=604800&" in storage.url(location, 1e9)
    other_url = storage.url("s3://other.bucket/a%20b", 60)
    assert other_url.startswith(f"{s3.endpoint}/other.bucket/a%2520b?")


def test_the_bucket_is_part_of_the_path_if_an_endpoint_is_set(
    storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an endpoint with a host name, or one for S3 only. Amazon's host name has bucket and region."""
    location = f"s3://{bucket.name}/key"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example:9000")
    assert _new_storage(storage).url(location, 60).startswith(f"http://store.example:9000/{bucket.name}/key?")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert (
        _new_storage(storage).url(location, 60).startswith(f"https://{bucket.name}.s3.eu-central-1.amazonaws.com/key?")
    )


def _new_storage(storage: S3Storage) -> S3Storage:
    """Return the same storage as another process would create it."""
    return S3Storage(storage._bucket, storage._prefix, storage.partials)


def test_examine_returns_whole_missing_or_damaged(storage: S3Storage, bucket: Bucket) -> None:
    """By the bytes. An object of another size is not read."""
    location = _keep(storage)
    key = location.partition(f"{bucket.name}/")[2]
    assert storage.examine(location, size=len(BODY), sha256=SHA) == "whole"
    assert storage.examine(f"{location}x", size=len(BODY), sha256=SHA) == "missing"
    assert storage.examine(location, size=len(BODY) + 1, sha256=SHA) == "damaged"
    bucket.put(key, BODY[::-1], Metadata={"sha256": SHA})
    assert storage.examine(location, size=len(BODY), sha256=SHA) == "damaged"


def test_a_quarantined_object_is_renamed_and_not_lost(storage: S3Storage, bucket: Bucket) -> None:
    """Several times for the same name. A missing object is ignored."""
    key = f"out/puts/12/12345/2-{SHA[:16]}.png"
    for number in range(3):
        bucket.put(key, f"damage {number}".encode())
        storage.quarantine(f"s3://{bucket.name}/{key}")
    storage.quarantine(f"s3://{bucket.name}/{key}")
    assert bucket.keys() == [f"{key}.1.damaged", f"{key}.2.damaged", f"{key}.damaged"]
    assert bucket.get(f"{key}.damaged") == b"damage 0"
    assert _keep(storage) == f"s3://{bucket.name}/{key}"


def test_hundreds_of_objects_are_removed_with_one_call(
    storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing object is not an error. An object that the store refuses to delete is returned with the reason."""
    monkeypatch.setattr(module, "PAGE", 2)
    locations = [_keep(storage, position=position) for position in range(3)]
    bucket.put("elsewhere", b"")
    calls: list[str] = []
    _record_calls(storage, calls)
    assert storage.remove([*locations, f"{locations[0]}x"]) == {}
    assert (len(calls), bucket.keys()) == (2, ["elsewhere"])

    answer = "<DeleteResult><Error><Key>a b/1</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    _replace_answers(storage, "DeleteObjects", lambda _: (200, answer.encode()))
    location = f"s3://{bucket.name}/a b/1"
    assert storage.remove([location]) == {location: f"can't remove {location}: AccessDenied"}
    with pytest.raises(StorageTrouble, match="not in S3"):
        storage.remove(["file:///etc/passwd"])


def test_all_locations_are_listed_page_by_page(
    storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those below the prefix, and no folders."""
    monkeypatch.setattr(module, "PAGE", 2)
    assert list(storage.locations()) == []
    locations = sorted(_keep(storage, position=position) for position in range(5))
    for key in ("elsewhere", "out/puts-not", "out/puts/folder/"):
        bucket.put(key, b"")
    calls: list[str] = []
    _record_calls(storage, calls)
    assert sorted(storage.locations()) == locations
    assert len(calls) >= 3


@pytest.mark.parametrize("prefix", ["", "/", "my 100% Bilder ü#?+&", "/a//b/"])
def test_any_prefix_works(prefix: str, storage: S3Storage, bucket: Bucket) -> None:
    """No prefix, blanks, percent signs, non-ASCII letters: stored outputs are found again."""
    storage = S3Storage(bucket.name, prefix, storage.partials)
    location = _keep(storage)
    below = "".join(f"{part}/" for part in prefix.split("/") if part)
    assert location == f"s3://{bucket.name}/{below}12/12345/2-{SHA[:16]}.png"
    assert list(storage.locations()) == [location]
    assert storage.examine(location, size=len(BODY), sha256=SHA) == "whole"
    assert requests.get(storage.url(location, 60), timeout=5).content == BODY
    storage.quarantine(location)
    assert list(storage.locations()) == [f"{location}.damaged"]


def test_two_names_of_one_object_are_recognised(storage: S3Storage, bucket: Bucket, s3: S3Server) -> None:
    """A copy in another bucket is another object. The bucket is not changed."""
    location = _keep(storage)
    key = location.removeprefix(f"s3://{bucket.name}/")
    other = s3.bucket()
    s3.client.copy_object(Bucket=other, Key=key, CopySource={"Bucket": bucket.name, "Key": key})
    give_second_name(storage.client.boto3_client(), bucket.name, "second-name")

    assert storage.is_same_file(f"s3://second-name/{key}", location)
    assert storage.is_same_file(location, location)
    assert not storage.is_same_file(f"s3://{other}/{key}", location)
    assert not storage.is_same_file(f"s3://second-name/{key}x", location)
    assert not storage.is_same_file("file:///a", location)
    assert bucket.keys() == [key]


def test_a_usable_bucket_is_not_changed_at_the_start(storage: S3Storage, bucket: Bucket) -> None:
    """Nothing is created in it."""
    storage.prepare()
    assert bucket.keys() == []


def test_a_missing_bucket_is_reported_at_the_start_and_not_created(storage: S3Storage) -> None:
    """Its outputs do not count as missing."""
    storage = S3Storage("no-such-bucket", "", storage.partials)
    with pytest.raises(StorageTrouble, match="bucket no-such-bucket is missing: create it"):
        storage.prepare()
    for call in (
        lambda: _keep(storage),
        lambda: list(storage.locations()),
        lambda: storage.open("s3://no-such-bucket/key"),
        lambda: storage.examine("s3://no-such-bucket/key", size=1, sha256=SHA),
        lambda: storage.quarantine("s3://no-such-bucket/key"),
        lambda: storage.remove(["s3://no-such-bucket/key"]),
    ):
        with pytest.raises(StorageTrouble, match="NoSuchBucket"):
            call()
    with pytest.raises(StorageTrouble, match="is missing"):
        storage.prepare()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_and_not_shown(
    name: str, storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every operation."""
    location = _keep(storage)
    monkeypatch.setenv(name, "wrong-credential")
    storage = _new_storage(storage)
    for call in (
        storage.prepare,
        lambda: _keep(storage, position=4),
        lambda: storage.open(location),
        lambda: storage.examine(location, size=len(BODY), sha256=SHA),
        lambda: storage.quarantine(location),
        lambda: storage.remove([location]),
        lambda: list(storage.locations()),
    ):
        with pytest.raises(StorageTrouble, match=r"refused|403|InvalidAccessKeyId|SignatureDoesNotMatch") as refused:
            call()
        assert not any(part in str(refused.value) for part in ("wrong-credential", "X-Amz", "?", "Signature="))


def test_the_message_about_missing_credentials_names_the_settings(
    storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageTrouble, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.prepare()


def test_a_malformed_endpoint_is_a_wrong_setting(
    storage: S3Storage, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt would not help."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "store:9000")
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL"):
        storage.prepare()


def test_without_the_optional_dependency_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package works without it."""
    monkeypatch.setenv("STORAGE_URL", "s3://never-used")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SettingsError, match=r"pip install 'fetch-worker\[s3\]'"):
        storage_for(load())


def test_an_outage_raises_storage_trouble_soon_and_the_storage_recovers(storage: S3Storage, s3: S3Server) -> None:
    """For a client with open connections. A running transfer ends too."""
    location = _keep(storage)
    large = _keep(storage, LARGE, position=9)
    with storage.open(large) as under_way:
        under_way.read(1)
        s3.stop()
        started = time.monotonic()
        with pytest.raises(StorageTrouble, match="can't read"):
            under_way.read()
    with pytest.raises(StorageTrouble, match="the store can't be reached, see AWS_ENDPOINT_URL"):
        storage.prepare()
    for call in (
        lambda: _keep(storage, position=3),
        lambda: storage.open(location),
        lambda: storage.examine(location, size=len(BODY), sha256=SHA),
        lambda: storage.quarantine(location),
        lambda: storage.remove([location]),
        lambda: list(storage.locations()),
    ):
        with pytest.raises(StorageTrouble, match="can't be reached"):
            call()
    assert time.monotonic() - started < 40
    storage.url(location, 60)
    s3.start()
    assert storage.examine(location, size=len(BODY), sha256=SHA) == "whole"
    _keep(storage, position=3)


def test_a_child_process_has_connections_of_its_own(storage: S3Storage, bucket: Bucket) -> None:
    """The connections of its parent are not shared."""
    storage.prepare()
    parent_client = storage.client.boto3_client()
    assert storage.client.boto3_client() is parent_client
    child = os.fork()
    if child == 0:
        os._exit(0 if storage.client.boto3_client() is not parent_client else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
