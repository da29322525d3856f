"""Results of attempts: none is lost while the database is away, and lost claims are released once, by any thread."""

import shutil
import socket
import sqlite3
import threading
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, OperationalError

from tests.download_stand import KEY, PNG, Stand, make_due, png
from tests.downloads.bad_bodies import HTML
from tests.rows import add_downloading, add_output, read_output
from tests.web import Web, page
from worker.downloads import recorder
from worker.downloads.recorder import AttemptRecorder
from worker.errors import StorageTrouble
from worker.storage.local import FileStorage
from worker.storage.partial_files import PartialFiles
from worker.store import engine as engine_module
from worker.store.engine import make_engine
from worker.store.results import record_attempt
from worker.store.schema import outputs
from worker.system.redaction import Scrubber

HOLDER = "host:1:1"
CLAIMS = 40
THREADS = 4


def test_three_bad_bodies_fail_an_output(stand: Stand, web: Web) -> None:
    """Not the first or the second."""
    output_id = stand.add(web.serves("/a.png", page(200, HTML)), listed_at=datetime.now(UTC) - timedelta(minutes=2))
    downloader = stand.downloader()
    for status in ("pending", "pending", "failed"):
        make_due(stand.engine)
        downloader.run(output_id)
        assert read_output(stand.engine, output_id).status == status
    assert len(web.requests) == 3


def test_a_message_can_be_stored_in_every_database(stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the path of the storage can't."""

    def refuses(*_: Any, **__: Any) -> str:
        raise StorageTrouble("can't write to /srv/\udcff\x00")

    monkeypatch.setattr(FileStorage, "keep", refuses)
    row = stand.download(web.serves("/a.png", page(200, PNG)))
    assert (row.error_code, row.error_message) == ("storage", "can't write to /srv/? ")


def test_no_message_in_a_row_contains_a_key(stand: Stand) -> None:
    """Also if the link contained it."""
    row = stand.download(f"ftp{KEY}://h/a.png")
    assert KEY not in row.error_message


def test_a_cancelled_output_is_not_changed_by_its_download(stand: Stand, web: Web) -> None:
    """The claim is lost when the download ends."""

    def cancelled_meanwhile(client: Any) -> None:
        with stand.engine.begin() as connection:
            connection.execute(
                update(outputs).values(
                    status="failed", error_code="cancelled", due_at=None, claim_token=None, claim_holder=None
                )
            )
        page(200, PNG)(client)

    output_id = stand.add(web.serves("/a.png", cancelled_meanwhile))
    assert stand.downloader().run(output_id) == "the claim was lost"
    assert read_output(stand.engine, output_id).status == "failed"
    assert stand.notified == []


# ── database errors ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_database_that_is_away_when_a_download_ends_then_the_next_run_records_its_result(
    tmp_path: Path, migrated_sqlite: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is not downloaded twice. Otherwise the lease would be renewed as long as there is other work."""
    monkeypatch.setattr(engine_module, "LOCK_TIMEOUT_SECONDS", 0)
    shutil.copy(migrated_sqlite, tmp_path / "away.db")
    engine = make_engine(make_url(f"sqlite:///{tmp_path}/away.db"))
    stand = Stand(engine, tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "away.db", isolation_level=None, check_same_thread=False)) as somebody:

        def lock_table(client: socket.socket) -> None:
            somebody.execute("BEGIN IMMEDIATE")
            page(200, PNG)(client)

        first = stand.add(web.serves("/first.png", lock_table))
        loader = stand.downloader()
        with pytest.raises(OperationalError):
            loader.run(first)
        with pytest.raises(OperationalError):
            loader.run(first)
        somebody.execute("COMMIT")

    second = stand.add(web.serves("/second.png", page(200, png(padding=7))))
    loader.run(second)

    assert [read_output(engine, output).status for output in (first, second)] == ["stored", "stored"]
    assert [request.path for request in web.requests] == ["/first.png", "/second.png"]
    engine.dispose()


def test_a_kept_result_that_can_not_be_written_releases_its_claim(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its lease would be renewed as long as this process has other work."""
    first, second = stand.add(web.serves("/a.png", page(200, PNG))), stand.add(web.serves("/b.png", page(200, PNG)))
    loader = stand.downloader()
    troubles: list[Exception] = [
        OperationalError("", {}, Exception("away")),
        DataError("", {}, Exception("no such value")),
    ]

    def fails(*arguments: Any, **options: Any) -> Any:
        if troubles:
            raise troubles.pop(0)
        return record_attempt(*arguments, **options)

    monkeypatch.setattr(recorder, "record_attempt", fails)
    with pytest.raises(OperationalError):
        loader.run(first)
    for _ in range(3):
        loader.run(second)
    assert [read_output(stand.engine, output).status for output in (first, second)] == ["stored", "stored"]


def test_given_a_result_that_could_not_be_recorded_when_the_process_is_never_idle_then_the_output_is_due_again(
    stand: Stand, web: Web
) -> None:
    """Otherwise its lease would be renewed with those of the other downloads."""
    busy = stand.downloader()

    def rename_table(old: str, new: str) -> None:
        with stand.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    def hide_table(client: socket.socket) -> None:
        rename_table("fetch_outputs", "away")
        page(200, PNG)(client)

    unlucky = stand.add(web.serves("/unlucky.png", hide_table))
    with pytest.raises(OperationalError):
        busy.run(unlucky)
    rename_table("away", "fetch_outputs")
    web.serves("/unlucky.png", page(200, PNG))
    other_id = stand.add(web.serves("/other.png", page(200, PNG)))

    busy.run(other_id)
    busy.run(unlucky)

    assert {read_output(stand.engine, output_id).status for output_id in (unlucky, other_id)} == {"stored"}


def test_given_lost_claims_when_several_threads_finish_earlier_work_then_each_claim_is_released_and_no_thread_fails(
    engine: Engine, tmp_path: Path
) -> None:
    recorder = AttemptRecorder(
        engine,
        HOLDER,
        partials=PartialFiles(tmp_path),
        scrubber=Scrubber([]),
        deadline=timedelta(days=1),
        notify=lambda _: None,
    )
    tokens = [f"{number:032x}" for number in range(CLAIMS)]
    with engine.begin() as connection:
        job = add_downloading(connection)
        outputs = [
            add_output(connection, job, number, claim_token=token, claim_holder=HOLDER)
            for number, token in enumerate(tokens)
        ]
    for token in tokens:
        with suppress(OperationalError), recorder.release_later_on_error(token):
            raise OperationalError("COMMIT", {}, Exception("the connection was lost"))
    start = threading.Barrier(THREADS)
    errors: list[Exception] = []

    def finish() -> None:
        start.wait()
        try:
            recorder.finish_earlier()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=finish) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert {read_output(engine, output).claim_token for output in outputs} == {None}
