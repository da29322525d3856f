"""Local storage: a final name only for a complete file, and no leftovers of failed downloads."""

import errno
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from worker.core.media.signatures import HEAD_BYTES, TAIL_BYTES, Media
from worker.errors import StorageTrouble
from worker.storage.local import PARTIAL, FileStorage, path_of

BODY = b"picture " * 1_000
SHA = hashlib.sha256(BODY).hexdigest()


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


PNG = Media("image/png", "png")


def _keep(storage: FileStorage, *, job_id: int = 12_345, token: str = "t") -> str:  # noqa: S107  # a claim's, no password
    storage.prepare()
    with storage.partials.receive(7, token) as incoming:
        for start in range(0, len(BODY), 999):
            incoming.write(BODY[start : start + 999])
        return storage.keep(incoming, job_id=job_id, position=2, media=PNG)


def test_a_stored_file_has_its_bytes_and_a_generated_name(tmp_path: Path) -> None:
    """The name has job, position and hash, in folders of a thousand jobs."""
    location = _keep(FileStorage(tmp_path / "out"))
    final = tmp_path / "out" / "12" / "12345" / f"2-{SHA[:16]}.png"
    assert location == f"file://{final}"
    assert final.read_bytes() == BODY
    assert _files(tmp_path) == [final]


def test_the_location_is_percent_encoded_and_can_be_decoded(tmp_path: Path) -> None:
    """Blanks, percent signs, non-ASCII letters."""
    root = tmp_path / "my 100% Bilder ü#?"
    location = _keep(FileStorage(root))
    assert location.startswith("file:///")
    assert not set(location) & set(" #?ü")
    assert path_of(location).read_bytes() == BODY


def test_a_file_that_is_being_received_has_only_a_temporary_name(tmp_path: Path) -> None:
    """Readers of the folders see only complete files."""
    storage = FileStorage(tmp_path)
    with storage.partials.receive(7, "t") as incoming:
        incoming.write(BODY)
        assert [path.parent.name for path in _files(tmp_path)] == [PARTIAL]
        assert (incoming.size, incoming.sha256) == (len(BODY), SHA)
        assert (incoming.head, incoming.tail) == (BODY[:HEAD_BYTES], BODY[-TAIL_BYTES:])
    assert _files(tmp_path) == []


def test_head_and_tail_are_those_of_the_whole_file(tmp_path: Path) -> None:
    """For chunks that are larger and smaller than they are."""
    body = os.urandom(400_000)
    for block in (1, 511, 70_000, 400_000):
        with FileStorage(tmp_path).partials.receive(7, "t") as incoming:
            for start in range(0, 1_500 if block == 1 else len(body), block):
                incoming.write(body[start : start + block])
            received = body[: incoming.size]
            assert (incoming.head, incoming.tail) == (received[:HEAD_BYTES], received[-TAIL_BYTES:])
            assert incoming.sha256 == hashlib.sha256(received).hexdigest()


def test_a_failed_download_leaves_no_file(tmp_path: Path) -> None:
    """For any error."""
    with pytest.raises(TypeError), FileStorage(tmp_path).partials.receive(7, "t") as incoming:
        incoming.write("no bytes")  # type: ignore[arg-type]  # any error will do
    assert _files(tmp_path) == []


def test_the_same_file_stored_twice_exists_once(tmp_path: Path) -> None:
    """Its name contains its hash, so replacing it changes nothing."""
    storage = FileStorage(tmp_path)
    assert _keep(storage, token="a") == _keep(storage, token="b")
    assert len(_files(tmp_path)) == 1


def test_a_symbolic_link_in_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    """So no file outside the folder is written."""
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "7.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageTrouble), FileStorage(tmp_path).partials.receive(7, "t"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_can_not_be_written_to_raises_storage_trouble(tmp_path: Path) -> None:
    """A file has the name of the folder, or of this job's folder. The temporary file is deleted too."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageTrouble, match="can't write"), FileStorage(tmp_path / "file").partials.receive(7, "t"):
        pass
    (tmp_path / "12").write_text("in the way")
    with pytest.raises(StorageTrouble, match="can't write"):
        _keep(FileStorage(tmp_path))
    assert {path.name for path in _files(tmp_path)} == {"file", "12"}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_raises_storage_trouble_and_leaves_no_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While writing, and while syncing."""

    def fail_with_full_disk(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail_with_full_disk)
        with pytest.raises(StorageTrouble, match="No space left"):
            _keep(FileStorage(tmp_path))
    assert _files(tmp_path) == []


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_can_not_sync_folders_is_accepted(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems. The file itself is synced."""
    real = os.fsync

    def sync_only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        real(handle)

    monkeypatch.setattr(os, "fsync", sync_only_files)
    assert path_of(_keep(FileStorage(tmp_path))).read_bytes() == BODY


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write is not an error."""
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, block: real(handle, bytes(block[:100])))
        location = _keep(FileStorage(tmp_path))
    assert path_of(location).read_bytes() == BODY


def test_old_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    """Files that are being written, and finished files, are not removed."""
    storage = FileStorage(tmp_path)
    assert storage.partials.remove_stale(older_than=10) == 0
    location = _keep(storage)
    old, young = tmp_path / PARTIAL / "1-a.part", tmp_path / PARTIAL / "2-b.part"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    past = time.time() - 1_000
    os.utime(old, (past, past))
    os.utime(path_of(location), (past, past))
    assert storage.partials.remove_stale(older_than=500) == 1
    assert _files(tmp_path) == sorted([young, path_of(location)])
