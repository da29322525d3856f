"""What is stored is shown to apps, and read again on demand: what is gone or damaged is fetched once more."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

import worker
from tests.download_stand import PNG, Stand, png
from tests.rows import job_of, output_of
from tests.web import Web, page
from worker.cli import main
from worker.errors import OutputMissing
from worker.operations.verify import SUSPICIOUS
from worker.storage import local
from worker.storage.local import path_of
from worker.store.schema import jobs, outputs


@pytest.fixture
def stored(stand: Stand, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rows of three stored outputs, each of a job of its own; the settings lead to them."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    monkeypatch.setenv("STORAGE_URL", f"file:{stand.out}")
    return [stand.download(web.serves(f"/{number}.png", page(200, png(padding=number)))) for number in range(3)]


def _verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--json", *words])
    said = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(said.out) if said.out else said.err


# ── showing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_app_reads_and_shows_what_is_stored(stored: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file, and as an address: below the web server's where there is one."""
    output = stored[1]
    with worker.open_output(output.id) as file:
        assert file.read() == png(padding=1)
    assert worker.output_url(output.id) == output.location
    monkeypatch.setenv("STORAGE_ADDRESS", "https://shop.example/outputs/")
    worker.client.tracking._settings.cache_clear()
    name = "/".join(path_of(output.location).parts[-3:])
    assert worker.output_url(output.id, 60) == f"https://shop.example/outputs/{name}"


@pytest.mark.parametrize("wrong", [0, -1, 99, 2**70, True, "1"])
def test_there_is_nothing_to_read_of_an_output_that_is_not_there(stored: list[Any], wrong: Any) -> None:
    """Whatever is asked for."""
    for read in (worker.open_output, worker.output_url):
        with pytest.raises(OutputMissing):
            read(wrong)


def test_there_is_nothing_to_read_of_an_output_that_waits_or_whose_file_is_gone(
    stand: Stand, stored: list[Any], web: Web
) -> None:
    """The error says what to do."""
    waiting = stand.add(web.url + "/x.png")
    with pytest.raises(OutputMissing, match="it is pending"):
        worker.open_output(waiting)
    path_of(stored[0].location).unlink()
    with pytest.raises(OutputMissing, match="verify"):
        worker.open_output(stored[0].id)


# ── reading again ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_while_all_is_whole_nothing_changes(stored: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """And nobody is asked."""
    assert _verify(capsys) == (0, {"checked": 3, "whole": 3, "wrong": [], "orphans": [], "kept": []})


def test_what_is_gone_or_damaged_is_fetched_once_more(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file is moved aside, not thrown away; the jobs are finished again in the end."""
    gone, damaged, fine = stored
    path_of(gone.location).unlink()
    path_of(damaged.location).write_bytes(path_of(damaged.location).read_bytes()[:-1] + b"x")
    code, said = _verify(capsys)
    assert (code, said["checked"], said["whole"]) == (0, 3, 1)
    assert [(one["output_id"], one["condition"], one["after"]) for one in said["wrong"]] == [
        (gone.id, "missing", "put back"),
        (damaged.id, "damaged", "put back"),
    ]
    for row in (gone, damaged):
        assert job_of(stand.engine, row.job_id).status == "downloading"
        stand.downloader().run(row.id)
        again = output_of(stand.engine, row.id)
        assert (again.status, again.location, again.sha256) == ("stored", row.location, row.sha256)
        assert job_of(stand.engine, row.job_id).status == "completed"
    assert path_of(damaged.location + ".damaged").exists()
    assert output_of(stand.engine, fine.id) == fine
    code, said = _verify(capsys)
    assert (code, said["whole"], said["orphans"]) == (0, 3, [damaged.location + ".damaged"])


def test_a_dry_run_only_tells(stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Of the jobs that were named."""
    path_of(stored[0].location).unlink()
    path_of(stored[1].location).unlink()
    code, said = _verify(capsys, "--dry-run", str(stored[0].job_id))
    assert (code, said["checked"], [one["after"] for one in said["wrong"]]) == (0, 1, ["would be put back"])
    assert output_of(stand.engine, stored[0].id) == stored[0]


def test_a_file_that_no_output_knows_is_named_and_stays(
    stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a cancel in the last moment."""
    (stand.out / "0" / "stray name.png").write_bytes(PNG)
    code, said = _verify(capsys)
    assert (code, said["orphans"]) == (0, [f"file://{stand.out}/0/stray%20name.png"])
    assert (stand.out / "0" / "stray name.png").exists()


def test_no_stored_file_is_called_a_stranger_where_the_directory_is_reached_by_another_name(
    stand: Stand, stored: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strangers may be thrown away."""
    link = stand.out.with_name("link")
    link.symlink_to(stand.out)
    monkeypatch.setenv("STORAGE_URL", f"file:{link}")
    assert _verify(capsys) == (0, {"checked": 3, "whole": 3, "wrong": [], "orphans": [], "kept": []})


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_can_not_be_read_is_named_and_the_others_are_read(
    number: int, stored: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a disk goes bad; what is gone is put back all the same."""
    real, bad = local._hash, path_of(stored[number].location)

    def reads(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(local, "_hash", reads)
    path_of(stored[2].location).unlink()
    code, said = _verify(capsys)
    assert (code, said["checked"], said["whole"], said["orphans"]) == (1, 3, 1, [])
    assert [(one["output_id"], one["condition"]) for one in said["wrong"]] == [
        (stored[number].id, "unreadable"),
        (stored[2].id, "missing"),
    ]


@pytest.mark.parametrize(
    ("table", "values", "after"),
    [
        (jobs, {"status": "cancelled"}, "left: its job was cancelled"),
        (outputs, {"url": "data:image/png;sha256=00"}, "lost: its bytes came with the answer alone"),
    ],
)
def test_what_can_not_be_fetched_again_is_said(
    table: Any, values: dict[str, Any], after: str, stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """And exits with 1."""
    with stand.engine.begin() as connection:
        connection.execute(update(table).where(table.c.id == stored[0].id).values(values))
    path_of(stored[0].location).unlink()
    code, said = _verify(capsys)
    assert (code, [one["after"] for one in said["wrong"]]) == (1, [after])
    assert output_of(stand.engine, stored[0].id).status == "stored"


def test_a_disk_that_is_not_mounted_is_not_taken_for_lost_pictures(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the directory is missing, and where it is there but nothing is in it; unless the operator insists."""
    url = web.serves("/many.png", page(200, PNG))
    for number in range(SUSPICIOUS):
        stand.download(f"{url}?{number}")
    aside = stand.out.rename(stand.out.with_name("aside"))
    code, said = _verify(capsys)
    assert (code, "mount it" in said) == (1, True)
    stand.out.mkdir()
    code, said = _verify(capsys)
    assert (code, "mounted?" in said) == (1, True)
    assert output_of(stand.engine, stored[0].id) == stored[0]
    code, said = _verify(capsys, "--force")
    assert (code, said["whole"], len(said["wrong"])) == (0, 0, SUSPICIOUS + 3)
    assert aside.is_dir()


def test_a_storage_that_goes_missing_makes_outputs_wait_and_status_says_so(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written beside it, and it goes on once it is back."""
    downloader = stand.downloader()
    downloader.run(0)  # no such output; the storage is prepared by the first download
    aside = stand.out.rename(stand.out.with_name("aside"))
    output_id = stand.add(web.serves("/late.png", page(200, PNG)))
    downloader.run(output_id)
    row = output_of(stand.engine, output_id)
    assert (row.status, row.error_code) == ("pending", "storage")
    assert not stand.out.exists()
    with pytest.raises(SystemExit):
        main(["status", "--json"])
    said = json.loads(capsys.readouterr().out)["outputs"]
    assert (said["unstored"], said["trouble"]) == (1, {"storage": 1})
    assert str(stand.out) in said["storage"]
    with pytest.raises(SystemExit):
        main(["status"])
    words = capsys.readouterr().out
    assert "outputs not stored yet: 1" in words
    assert "the storage is in trouble" in words
    aside.rename(stand.out)
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(due_at=row.listed_at))
    downloader.run(output_id)
    assert output_of(stand.engine, output_id).status == "stored"
