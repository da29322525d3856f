"""S3 stores that lack features and refuse them in different ways: outputs are stored, verified and pruned."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lesser_stores import FEATURES, LesserStore, lesser_store
from tests.s3_servers import S3Server
from tests.storage.test_s3 import BODY, SHA, Bucket, _keep
from worker.errors import SettingsError, StorageTrouble
from worker.settings import Settings
from worker.storage.base import Storage
from worker.storage.partial_files import PartialFiles
from worker.storage.s3 import S3Storage
from worker.storage.select import storage_for

REFUSALS: tuple[int | str, ...] = (400, 403, 405, 501, "ignore")
NAMED = {
    "If-None-Match": "If-None-Match",
    "checksum": "x-amz-checksum-sha256",
    "checksum mode": "x-amz-checksum-mode",
    "batch delete": "DeleteObjects",
}


@pytest.fixture(scope="module")
def shared_bucket(s3_server: S3Server) -> Bucket:
    """One bucket for all these tests."""
    return Bucket(s3_server)


@pytest.fixture
def bucket(s3: S3Server, shared_bucket: Bucket) -> Bucket:
    """An empty bucket."""
    shared_bucket.empty()
    return shared_bucket


@pytest.fixture
def front(s3: S3Server) -> Iterator[LesserStore]:
    """Run a store with all features, until a test removes some."""
    with ExitStack() as stack:
        yield stack.enter_context(lesser_store(s3, {}))


@pytest.fixture
def storage(front: LesserStore, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    """Return a storage on this store."""
    for name, value in front.environment.items():
        monkeypatch.setenv(name, value)
    return S3Storage(bucket.name, "out", PartialFiles(tmp_path / "partial"))


def _check_all(storage: S3Storage, bucket: Bucket) -> None:
    """Store, store again, verify and remove."""
    storage.prepare()
    locations = [_keep(storage, position=position) for position in range(3)]
    assert [_keep(storage, position=position) for position in range(3)] == locations
    assert all(bucket.get(location.partition(f"{bucket.name}/")[2]) == BODY for location in locations)
    assert storage.examine(locations[0], size=len(BODY), sha256=SHA) == "whole"
    bucket.put(f"out/12/12345/9-{SHA[:16]}.png", b"another")
    assert _keep(storage, position=9).endswith(f"9-{SHA}.png")
    assert bucket.get(f"out/12/12345/9-{SHA[:16]}.png") == b"another"
    assert storage.remove(list(storage.locations())) == {}
    assert bucket.keys() == []


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("feature", FEATURES)
def test_given_a_store_that_lacks_a_feature_then_it_is_not_used_and_logged_once(
    storage: S3Storage,
    bucket: Bucket,
    front: LesserStore,
    feature: str,
    refusal: int | str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether the store refuses the feature or ignores it."""
    front.lacks[feature] = refusal
    _check_all(storage, bucket)
    messages = [record.getMessage() for record in caplog.records if "does not support" in record.getMessage()]
    if refusal == "ignore" or feature == "batch delete without MD5":
        assert messages == []
    else:
        assert len(messages) == 1
        assert NAMED[feature] in messages[0]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_given_a_store_that_lacks_all_features_then_none_is_used(
    storage: S3Storage,
    bucket: Bucket,
    front: LesserStore,
    refusal: int | str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One log line for each, and no request is refused twice for the same feature."""
    front.lacks |= dict.fromkeys(FEATURES, refusal)
    _check_all(storage, bucket)
    messages = [record.getMessage() for record in caplog.records if "does not support" in record.getMessage()]
    assert len(messages) == (0 if refusal == "ignore" else len(NAMED))
    front.refused.clear()
    _keep(storage, position=4)
    assert not front.refused or refusal == "ignore"


def test_given_no_permissions_then_the_error_is_reported_and_no_feature_counts_as_missing(
    storage: S3Storage, bucket: Bucket, front: LesserStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A real 403."""
    location = _keep(storage)
    front.lacks["everything"] = 403
    with pytest.raises(StorageTrouble, match=r"403 Forbidden|AccessDenied"):
        _keep(storage, position=5)
    with pytest.raises(StorageTrouble, match="AccessDenied"):
        storage.remove([location, f"{location}x"])
    assert "does not support" not in caplog.text
    front.lacks.clear()
    assert storage.examine(location, size=len(BODY), sha256=SHA) == "whole"


def test_a_limit_larger_than_s3_allows_is_a_wrong_setting(tmp_path: Path) -> None:
    """Files are uploaded with one call."""
    with pytest.raises(SettingsError, match="OUTPUT_MAX_BYTES"):
        storage_for(Settings(storage_url="s3://bucket", output_max_bytes=6 << 30))
    storage: Storage = storage_for(Settings(storage_url=f"file:{tmp_path}", output_max_bytes=6 << 30))
    assert storage.partials.folder.is_relative_to(tmp_path)
