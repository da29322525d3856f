"""The state directory: the configured one, or a temporary directory of this user with one line that says so."""

import os
import stat
from pathlib import Path

import pytest

from worker.configuration import state_directory
from worker.errors import SettingsError
from worker.settings import load
from worker.store.engine import make_engine


def test_the_first_of_several_directories_is_used_and_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/one:{tmp_path}/two")

    assert load().state == tmp_path / "one"
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o700


def test_by_default_state_goes_to_var_and_an_sqlite_file_is_private(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        engine = make_engine(load().database)
        engine.connect().close()
        engine.dispose()
    finally:
        os.umask(previous)

    assert stat.S_IMODE((tmp_path / "var").stat().st_mode) == 0o700
    assert not stat.S_IMODE((tmp_path / "var" / "worker.db").stat().st_mode) & 0o007


def test_if_it_is_not_writable_a_temporary_directory_is_used_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/file/below")

    folders = {load().state for _ in range(2)}

    (folder,) = folders
    assert folder.parent == tmp_path / "temporary"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert "STATE_DIRECTORY" in lines[0]


def test_a_directory_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "file" / "below"
    state_directory.fallback(folder).mkdir(mode=0o777)
    state_directory.fallback(folder).chmod(0o777)

    with pytest.raises(SettingsError, match=r"^STATE_DIRECTORY"):
        state_directory.writable(folder)


def test_a_typing_error_in_an_sqlite_path_creates_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "sqlite:///dta/worker.db")

    with pytest.raises(SettingsError, match=r"^DATABASE_URL .* is not a directory"):
        _ = load().database
    assert list(tmp_path.iterdir()) == []
