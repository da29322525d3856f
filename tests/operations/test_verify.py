"""Apps read stored outputs; `verify` checks them and queues missing and damaged ones for download again."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

import worker
from tests.download_stand import PNG, Stand, png
from tests.rows import read_job, read_output
from tests.web import Web, page
from worker.cli import main
from worker.client.connection import loaded_settings
from worker.errors import OutputMissing
from worker.operations.verify import MISSING_LIMIT
from worker.storage import local
from worker.storage.local import path_of
from worker.store.schema import jobs, outputs


@pytest.fixture
def stored(stand: Stand, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Three stored outputs of different jobs, in the database that the settings name. Returns their rows."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/test.db")
    monkeypatch.setenv("STORAGE_URL", f"file:{stand.out}")
    return [stand.download(web.serves(f"/{number}.png", page(200, png(padding=number)))) for number in range(3)]


def _verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--json", *arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(printed.out) if printed.out else printed.err


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_app_opens_a_stored_output_and_gets_its_url(stored: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """STORAGE_ADDRESS, if set, is the base of the URL."""
    output = stored[1]
    with worker.open_output(output.id) as file:
        assert file.read() == png(padding=1)
    assert worker.output_url(output.id) == output.location
    monkeypatch.setenv("STORAGE_ADDRESS", "https://shop.example/outputs/")
    loaded_settings.cache_clear()
    name = "/".join(path_of(output.location).parts[-3:])
    assert worker.output_url(output.id, 60) == f"https://shop.example/outputs/{name}"


@pytest.mark.parametrize("wrong", [0, -1, 99, 2**70, True, "1"])
def test_an_unknown_output_id_raises_output_missing(stored: list[Any], wrong: Any) -> None:
    for read in (worker.open_output, worker.output_url):
        with pytest.raises(OutputMissing):
            read(wrong)


def test_a_pending_output_or_a_missing_file_raises_output_missing(stand: Stand, stored: list[Any], web: Web) -> None:
    """The error says what to do."""
    waiting = stand.add(web.url + "/x.png")
    with pytest.raises(OutputMissing, match="it is pending"):
        worker.open_output(waiting)
    path_of(stored[0].location).unlink()
    with pytest.raises(OutputMissing, match="verify"):
        worker.open_output(stored[0].id)


# ── verifying ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whole_outputs_are_not_changed(stored: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify(capsys) == (0, {"checked": 3, "whole": 3, "wrong": [], "orphans": [], "kept": []})


def test_missing_and_damaged_outputs_are_downloaded_again(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged file is quarantined, not removed. The jobs become completed again."""
    missing, damaged, whole = stored
    path_of(missing.location).unlink()
    path_of(damaged.location).write_bytes(path_of(damaged.location).read_bytes()[:-1] + b"x")
    code, report = _verify(capsys)
    assert (code, report["checked"], report["whole"]) == (0, 3, 1)
    assert [(output["output_id"], output["condition"], output["after"]) for output in report["wrong"]] == [
        (missing.id, "missing", "queued for download again"),
        (damaged.id, "damaged", "queued for download again"),
    ]
    for row in (missing, damaged):
        assert read_job(stand.engine, row.job_id).status == "downloading"
        stand.downloader().run(row.id)
        again = read_output(stand.engine, row.id)
        assert (again.status, again.location, again.sha256) == ("stored", row.location, row.sha256)
        assert read_job(stand.engine, row.job_id).status == "completed"
    assert path_of(damaged.location + ".damaged").exists()
    assert read_output(stand.engine, whole.id) == whole
    code, report = _verify(capsys)
    assert (code, report["whole"], report["orphans"]) == (0, 3, [damaged.location + ".damaged"])


def test_a_dry_run_only_reports(stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Only the outputs of the given jobs are checked."""
    path_of(stored[0].location).unlink()
    path_of(stored[1].location).unlink()
    code, report = _verify(capsys, "--dry-run", str(stored[0].job_id))
    assert (code, report["checked"], [output["after"] for output in report["wrong"]]) == (
        0,
        1,
        ["would be queued for download again"],
    )
    assert read_output(stand.engine, stored[0].id) == stored[0]


def test_an_orphan_file_is_reported_and_stays(
    stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A cancel in the last moment can leave such a file."""
    (stand.out / "0" / "stray name.png").write_bytes(PNG)
    code, report = _verify(capsys)
    assert (code, report["orphans"]) == (0, [f"file://{stand.out}/0/stray%20name.png"])
    assert (stand.out / "0" / "stray name.png").exists()


def test_a_symbolic_link_to_the_storage_folder_makes_no_orphans(
    stand: Stand, stored: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Operators may remove orphans."""
    link = stand.out.with_name("link")
    link.symlink_to(stand.out)
    monkeypatch.setenv("STORAGE_URL", f"file:{link}")
    assert _verify(capsys) == (0, {"checked": 3, "whole": 3, "wrong": [], "orphans": [], "kept": []})


@pytest.mark.parametrize("number", [0, 1])
def test_an_unreadable_file_is_reported_and_the_others_are_checked(
    number: int, stored: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk may have bad sectors. Missing outputs are still queued for download again."""
    real, bad = local._hash, path_of(stored[number].location)

    def reads(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(local, "_hash", reads)
    path_of(stored[2].location).unlink()
    code, report = _verify(capsys)
    assert (code, report["checked"], report["whole"], report["orphans"]) == (1, 3, 1, [])
    assert [(output["output_id"], output["condition"]) for output in report["wrong"]] == [
        (stored[number].id, "unreadable"),
        (stored[2].id, "missing"),
    ]


@pytest.mark.parametrize(
    ("table", "values", "after"),
    [
        (jobs, {"status": "cancelled"}, "left: its job was cancelled"),
        (
            outputs,
            {"url": "data:image/png;sha256=00"},
            "lost: the API sent its bytes inside the answer, so there is no link to download",
        ),
    ],
)
def test_an_output_that_can_not_be_downloaded_again_is_reported(
    table: Any, values: dict[str, Any], after: str, stand: Stand, stored: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1."""
    with stand.engine.begin() as connection:
        connection.execute(update(table).where(table.c.id == stored[0].id).values(values))
    path_of(stored[0].location).unlink()
    code, report = _verify(capsys)
    assert (code, [output["after"] for output in report["wrong"]]) == (1, [after])
    assert read_output(stand.engine, stored[0].id).status == "stored"


def test_an_unmounted_disk_does_not_count_as_missing_outputs(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may be absent or empty. `--force` overrides this."""
    url = web.serves("/many.png", page(200, PNG))
    for number in range(MISSING_LIMIT):
        stand.download(f"{url}?{number}")
    aside = stand.out.rename(stand.out.with_name("aside"))
    code, report = _verify(capsys)
    assert (code, "mount it" in report) == (1, True)
    stand.out.mkdir()
    code, report = _verify(capsys)
    assert (code, "mounted?" in report) == (1, True)
    assert read_output(stand.engine, stored[0].id) == stored[0]
    code, report = _verify(capsys, "--force")
    assert (code, report["whole"], len(report["wrong"])) == (0, 0, MISSING_LIMIT + 3)
    assert aside.is_dir()


def test_outputs_wait_while_the_storage_is_missing_and_status_reports_it(
    stand: Stand, stored: list[Any], web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written elsewhere, and downloads continue once the storage is back."""
    downloader = stand.downloader()
    downloader.run(0)  # no such output; the storage is prepared by the first download
    aside = stand.out.rename(stand.out.with_name("aside"))
    output_id = stand.add(web.serves("/late.png", page(200, PNG)))
    downloader.run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.error_code) == ("pending", "storage")
    assert not stand.out.exists()
    with pytest.raises(SystemExit):
        main(["status", "--json"])
    report = json.loads(capsys.readouterr().out)["outputs"]
    assert (report["unstored"], report["trouble"]) == (1, {"storage": 1})
    assert str(stand.out) in report["storage"]
    with pytest.raises(SystemExit):
        main(["status"])
    text = capsys.readouterr().out
    assert "outputs not stored yet: 1" in text
    assert "can't be written" in text
    aside.rename(stand.out)
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(due_at=row.listed_at))
    downloader.run(output_id)
    assert read_output(stand.engine, output_id).status == "stored"
