"""Progress of long downloads: reported while they last, for valid claims only, and without slowing them down."""

import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from tests.download_stand import PNG, Stand
from tests.rows import NOW, add_downloading, add_output, claim_one_output, read_output, seconds, try_claim_output
from tests.web import Web, head, page
from worker.core.lifecycle import TryAgain
from worker.downloads import progress as progress_module
from worker.downloads.progress import ReceivedBytes
from worker.storage.partial_files import PartialFiles
from worker.store.claims import record_progress
from worker.store.results import record_attempt

SOON = 20.0
EVERY = 0.05


@pytest.fixture
def fast_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report often enough for a test."""
    monkeypatch.setattr(progress_module, "REPORT_SECONDS", EVERY)


def test_a_long_download_reports_its_progress_until_it_ends(stand: Stand, web: Web, fast_reports: None) -> None:
    go_on = threading.Event()

    def half(client: socket.socket) -> None:
        client.sendall(head(200, Content_Length=str(len(PNG))) + PNG[:3_000])
        go_on.wait(SOON)
        client.sendall(PNG[3_000:])

    output_id = stand.add(web.serves("/a.png", half))
    thread = threading.Thread(target=stand.downloader().run, args=(output_id,))
    thread.start()
    until = time.monotonic() + SOON
    while read_output(stand.engine, output_id).received_bytes is None and time.monotonic() < until:
        time.sleep(EVERY)
    row = read_output(stand.engine, output_id)
    go_on.set()
    thread.join(SOON)
    over = read_output(stand.engine, output_id)

    assert (row.received_bytes, row.status) == (3_000, "pending")
    assert (over.received_bytes, over.status) == (None, "stored")
    _assert_no_thread()


def _assert_no_thread() -> None:
    """The thread ends when there are no downloads."""
    until = time.monotonic() + SOON
    while any(thread.name == "received-bytes" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(EVERY)


def test_a_short_download_needs_no_statement(stand: Stand, web: Web) -> None:
    statements: list[str] = []
    event.listen(stand.engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    row = stand.download(web.serves("/a.png", page(200, PNG)))

    assert row.status == "stored"
    assert not [statement for statement in statements if "SET received_bytes=CASE" in statement]


def test_only_a_long_attempt_is_reported(stand: Stand, tmp_path: Path) -> None:
    """However long the thread has been running for others."""
    output_id = stand.add("https://cdn.test/a.png")
    with stand.engine.begin() as connection:
        output = try_claim_output(connection, output_id, now=datetime.now(UTC))
    assert output is not None
    progress = ReceivedBytes(stand.engine, "holder")

    with PartialFiles(tmp_path / "parts").receive(1, "t") as incoming, progress.counted(output, incoming):
        incoming.write(b"12345")
        now = time.monotonic()
        young, old = progress.lasting(now), progress.lasting(now + progress_module.REPORT_SECONDS)

    assert (young, old) == ({}, {(output.id, output.token): 5})
    assert progress.lasting(now + 60) == {}


def test_a_database_that_is_away_does_not_stop_a_download(
    stand: Stand, tmp_path: Path, fast_reports: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def away(*_: object, **__: object) -> int:
        tries.append(1)
        raise OSError("away, with a secret in it")

    monkeypatch.setattr(progress_module, "record_progress", away)
    caplog.set_level("INFO")
    output_id = stand.add("https://cdn.test/a.png")
    with stand.engine.begin() as connection:
        output = try_claim_output(connection, output_id, now=datetime.now(UTC))
    assert output is not None
    progress = ReceivedBytes(stand.engine, "holder")

    with PartialFiles(tmp_path / "parts").receive(1, "t") as incoming, progress.counted(output, incoming):
        until = time.monotonic() + SOON
        while len(tries) < 3 and time.monotonic() < until:
            incoming.write(b"x")
            time.sleep(EVERY)

    assert len(tries) >= 3, "it goes on trying"
    assert "could not record the received bytes reason=OSError" in caplog.text
    assert "secret" not in caplog.text
    _assert_no_thread()


def test_only_rows_with_a_valid_claim_are_updated(engine: Engine) -> None:
    """Not claims of other processes, expired claims, rows that were claimed again, or locked rows."""
    with engine.begin() as connection:
        job_id = add_downloading(connection)
        ids = [add_output(connection, job_id, position) for position in range(4)]
        claims = [claim_one_output(connection, output_id, token=f"t{output_id}") for output_id in ids[:3]]
        try_claim_output(connection, ids[3], token="theirs", holder="another")  # no secret
    received = {(output.id, output.token): 10 * output.id for output in claims}
    other_claims = {(ids[3], "theirs"): 5, (ids[0], "older"): 6}

    with engine.begin() as connection:
        first = record_progress(connection, "holder", received | other_claims, now=NOW + seconds(5))
        older = record_progress(connection, "holder", {(ids[0], "older"): 6}, now=NOW + seconds(5))
        late = record_progress(connection, "holder", {(ids[0], claims[0].token): 99}, now=NOW + seconds(31))
    written = [read_output(engine, output_id).received_bytes for output_id in ids]

    assert (first, older, late) == (3, 0, 0)
    assert written == [10 * ids[0], 10 * ids[1], 10 * ids[2], None]


def test_an_ended_attempt_has_no_received_bytes(engine: Engine) -> None:
    with engine.begin() as connection:
        output = claim_one_output(connection, add_output(connection, add_downloading(connection)))
        record_progress(connection, "holder", {(output.id, output.token): 7}, now=NOW)
        record_attempt(connection, output, TryAgain(5.0, "unreachable", "no answer"), now=NOW)

    with engine.begin() as connection:
        after = record_progress(connection, "holder", {(output.id, output.token): 8}, now=NOW)

    assert (after, read_output(engine, output.id).received_bytes) == (0, None)
