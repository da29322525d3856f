"""Partial files of several processes: they never mix, and none is lost or deleted while it is in use."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from worker.core.media.signatures import Media
from worker.errors import StorageTrouble
from worker.storage.local import FileStorage, path_of
from worker.storage.partial_files import PartialFiles, Source, link_hash

TAG = '"v1"'


def test_two_downloads_of_the_same_output_do_not_mix(tmp_path: Path) -> None:
    """The second one, with the newer claim, has its own file. The file of the first one can be resumed."""
    partials = PartialFiles(tmp_path / "p")
    source = Source(link_hash("x"), TAG, 30)
    with partials.receive(7, "a") as first:
        first.begin(source)
        first.write(b"a" * 10)
        with partials.receive(7, "b") as second:
            second.begin(source)
            second.write(b"b" * 20)
            second.hold = True
            assert (first.size, second.size, first.path.read_bytes()) == (10, 20, b"a" * 10)
        first.hold = True
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"7.part", "7.json"}
    with partials.receive(7, "c") as third:
        assert (third.size, third.source) == (10, source)


def test_a_file_that_was_renamed_before_it_was_locked_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the file may have got its final name."""
    partials = PartialFiles(tmp_path / "p")
    partials.folder.mkdir()
    (partials.folder / "7.part").write_bytes(b"whole")
    real = os.open

    def open_and_rename(path: Any, *arguments: Any, **options: Any) -> int:
        handle = real(path, *arguments, **options)
        final_path = tmp_path / "kept.png"
        if str(path).endswith("7.part") and not final_path.exists():
            Path(path).rename(final_path)
        return handle

    monkeypatch.setattr(os, "open", open_and_rename)
    with partials.receive(7, "t") as incoming:
        incoming.write(b"other")
    assert (tmp_path / "kept.png").read_bytes() == b"whole"


def test_after_a_rename_the_next_file_with_the_old_name_is_not_deleted(tmp_path: Path) -> None:
    """Otherwise a third download could use the name, and the second would give its partial file a final name."""
    storage, media = FileStorage(tmp_path / "out"), Media("image/png", "png")
    storage.prepare()
    source = Source(link_hash("x"), TAG, 100)
    with storage.partials.receive(7, "a") as first:
        first.begin(source)
        first.write(b"a" * 100)
        storage.keep(first, job_id=1, position=0, media=media)
        later = storage.partials.receive(7, "b")
        second = later.__enter__()
        second.begin(source)
        second.write(b"b" * 100)
    with storage.partials.receive(7, "c") as third:
        third.begin(source)
        third.write(b"c" * 40)
        assert path_of(storage.keep(second, job_id=1, position=0, media=media)).read_bytes() == b"b" * 100
        later.__exit__(None, None, None)
        assert third.path.read_bytes() == b"c" * 40


def test_a_file_whose_temporary_name_was_removed_is_not_renamed(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "out")
    storage.prepare()
    with storage.partials.receive(7, "a") as incoming:
        incoming.write(b"a" * 100)
        incoming.path.unlink()
        incoming.path.write_bytes(b"other")
        with pytest.raises(StorageTrouble, match="removed"):
            storage.keep(incoming, job_id=1, position=0, media=Media("image/png", "png"))
    assert incoming.path.read_bytes() == b"other"


def test_an_error_while_a_file_is_resumed_leaves_no_handle_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open handle would keep its lock until the process ends."""

    def refuses(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    partials = PartialFiles(tmp_path / "p")
    for call in ("utime", "ftruncate"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuses)
            with pytest.raises(StorageTrouble), partials.receive(7, "a"):
                pass
        with partials.receive(7, "b") as incoming:
            assert incoming.path.name == "7.part"


def test_old_partial_files_are_removed_but_not_those_in_use(tmp_path: Path) -> None:
    """With their sidecars, and sidecars without a file."""
    partials = PartialFiles(tmp_path)
    past = time.time() - 1_000
    for name in ("1.part", "1.json", "2.json", "3.other"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (past, past))
    with partials.receive(9, "t") as busy:
        busy.begin(Source(link_hash("x"), TAG))
        os.utime(busy.path, (past, past))
        os.utime(busy.path.with_suffix(".json"), (past, past))
        partials.remove_stale(older_than=500)
        assert {path.name for path in tmp_path.iterdir()} == {"9.part", "9.json"}
