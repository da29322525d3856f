"""The file store: a final name never stands before its bytes, and nothing half is left behind."""

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


def test_a_kept_file_has_its_bytes_and_a_name_made_by_us(tmp_path: Path) -> None:
    """Job, position and hash; folders of a thousand jobs each."""
    location = _keep(FileStorage(tmp_path / "out"))
    final = tmp_path / "out" / "12" / "12345" / f"2-{SHA[:16]}.png"
    assert location == f"file://{final}"
    assert final.read_bytes() == BODY
    assert _files(tmp_path) == [final]


def test_the_location_is_percent_encoded_and_leads_back(tmp_path: Path) -> None:
    """Blanks, percent signs, letters of any language."""
    root = tmp_path / "my 100% Bilder ü#?"
    location = _keep(FileStorage(root))
    assert location.startswith("file:///")
    assert not set(location) & set(" #?ü")
    assert path_of(location).read_bytes() == BODY


def test_while_it_comes_a_file_has_a_temporary_name_only(tmp_path: Path) -> None:
    """Whoever looks into the folders sees whole files."""
    storage = FileStorage(tmp_path)
    with storage.partials.receive(7, "t") as incoming:
        incoming.write(BODY)
        assert [path.parent.name for path in _files(tmp_path)] == [PARTIAL]
        assert (incoming.size, incoming.sha256) == (len(BODY), SHA)
        assert (incoming.head, incoming.tail) == (BODY[:HEAD_BYTES], BODY[-TAIL_BYTES:])
    assert _files(tmp_path) == []


def test_head_and_tail_are_those_of_the_whole_file_however_it_comes(tmp_path: Path) -> None:
    """In blocks larger and smaller than they are."""
    body = os.urandom(400_000)
    for block in (1, 511, 70_000, 400_000):
        with FileStorage(tmp_path).partials.receive(7, "t") as incoming:
            for start in range(0, 1_500 if block == 1 else len(body), block):
                incoming.write(body[start : start + block])
            seen = body[: incoming.size]
            assert (incoming.head, incoming.tail) == (seen[:HEAD_BYTES], seen[-TAIL_BYTES:])
            assert incoming.sha256 == hashlib.sha256(seen).hexdigest()


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Whatever was raised in between."""
    with pytest.raises(TypeError), FileStorage(tmp_path).partials.receive(7, "t") as incoming:
        incoming.write("no bytes")  # type: ignore[arg-type]  # any error will do
    assert _files(tmp_path) == []


def test_the_same_file_kept_twice_is_there_once(tmp_path: Path) -> None:
    """Its name carries its hash: replacing it changes nothing."""
    storage = FileStorage(tmp_path)
    assert _keep(storage, token="a") == _keep(storage, token="b")
    assert len(_files(tmp_path)) == 1


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    """Nobody gets us to write elsewhere."""
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "7.part").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageTrouble), FileStorage(tmp_path).partials.receive(7, "t"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_place_that_cant_be_written_to_is_storage_trouble(tmp_path: Path) -> None:
    """A file where the folder should be, also only for this job's; the temporary file is gone all the same."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageTrouble, match="can't write"), FileStorage(tmp_path / "file").partials.receive(7, "t"):
        pass
    (tmp_path / "12").write_text("in the way")
    with pytest.raises(StorageTrouble, match="can't write"):
        _keep(FileStorage(tmp_path))
    assert {path.name for path in _files(tmp_path)} == {"file", "12"}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_storage_trouble_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While writing, and when the bytes are to be put on the disk for good."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(StorageTrouble, match="No space left"):
            _keep(FileStorage(tmp_path))
    assert _files(tmp_path) == []


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_can_not_sync_folders_is_no_trouble(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network file systems: the file itself is synced all the same."""
    real = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        real(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    assert path_of(_keep(FileStorage(tmp_path))).read_bytes() == BODY


def test_a_disk_that_takes_a_little_at_a_time_gets_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write is no error."""
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda handle, block: real(handle, bytes(block[:100])))
        location = _keep(FileStorage(tmp_path))
    assert path_of(location).read_bytes() == BODY


def test_what_a_crash_left_is_removed_by_age(tmp_path: Path) -> None:
    """Old temporary files go; those being written to, and finished ones, stay."""
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
