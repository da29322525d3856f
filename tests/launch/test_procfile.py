"""Programs of a Procfile: their commands and their environment."""

import os
import sys
from pathlib import Path

import pytest

from worker.errors import SettingsError
from worker.launch.procfile import Line, merged_environment, own_procfile, program, read_procfile

pytestmark = pytest.mark.every_python


def test_a_procfile_is_read_line_by_line_without_blank_lines_and_comments(tmp_path: Path) -> None:
    procfile = tmp_path / "Procfile"
    procfile.write_text("# ours\nrelease: fetch-worker migrate\n\nweb-1:gunicorn 'a b' --port $PORT \n")

    assert read_procfile(procfile) == [
        Line("release", "fetch-worker migrate"),
        Line("web-1", "gunicorn 'a b' --port $PORT"),
    ]


@pytest.mark.parametrize("text", ["worker celery", "worker:", ": celery", "a: true\na: true"])
def test_an_invalid_line_is_refused_with_its_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "Procfile").write_text(text)

    with pytest.raises(SettingsError, match=r"Procfile, line \d"):
        read_procfile(tmp_path / "Procfile")


def test_our_own_procfile_is_found_from_any_working_directory() -> None:
    assert "worker" in [line.name for line in read_procfile(own_procfile())]


def test_the_dotenv_file_adds_variables_and_the_environment_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("SD_API_KEY=from-file\nOF_THE_APP='a b'\nTAKEN=file\nEMPTY=file\nsd_api_rps=7\n")
    for name, value in (("TAKEN", "real"), ("EMPTY", ""), ("SD_API_RPS", "5")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SD_API_KEY", raising=False)

    merged = merged_environment(tmp_path / ".env")

    expected = {"SD_API_KEY": "from-file", "OF_THE_APP": "a b", "TAKEN": "real", "EMPTY": "file", "SD_API_RPS": "5"}
    assert expected.items() <= merged.items()
    assert "sd_api_rps" not in merged
    assert merged["FETCH_WORKER_DOTENV"] == "off"


def test_programs_of_our_own_environment_are_found_first() -> None:
    assert merged_environment(None)["PATH"].startswith(f"{Path(sys.executable).parent}{os.pathsep}")


@pytest.mark.parametrize(("name", "gets_keys"), [("worker", True), ("downloads", False), ("release", False)])
def test_only_the_process_named_worker_gets_the_keys(name: str, gets_keys: bool) -> None:
    keys = {"SD_API_KEY": "k1", "SD_API_KEYS": '{"a": "k2"}', "sd_api_key": "k3"}

    result = program(Line(name, "true"), {**keys, "OTHER": "x"})

    assert result.environment == ({**keys, "OTHER": "x"} if gets_keys else {"OTHER": "x"})
