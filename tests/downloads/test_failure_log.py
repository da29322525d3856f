"""Log lines about failed downloads: one when a source begins to fail, a count once a minute, and one when it works."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.download_stand import PNG, Stand, make_due
from tests.downloads.bad_bodies import HTML
from tests.rows import read_output
from tests.waiting import wait_until
from tests.web import Web, page
from worker.core.lifecycle import GiveUp, OutputFacts, TryAgain
from worker.downloads.failure_log import MAX_TROUBLES, FailureLog
from worker.errors import StorageTrouble
from worker.storage.local import FileStorage
from worker.store.claims import ClaimedOutput

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DOWN = TryAgain(5.0, "http_error", "HTTP 503")
BROKEN = TryAgain(5.0, "not_media", "an HTML page")
DISK = TryAgain(30.0, "storage", "disk full")
OUTPUTS = 20


class Failures(FailureLog):
    """A log of failures on a clock that the test moves. No thread writes summaries."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(interval=3_600.0, clock=lambda: self.now)

    def minute(self) -> None:
        """Let a minute pass."""
        self.now += 60.0
        self.summarise()


@pytest.fixture
def failures() -> Iterator[Failures]:
    """A log without failures, with an interval of an hour."""
    log = Failures()
    yield log
    if log._timer is not None:
        log._timer.cancel()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> "Lines":
    """The lines of level INFO and above."""
    caplog.set_level(logging.DEBUG, "worker.downloads")
    return Lines(caplog)


class Lines:
    """What was logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self) -> list[str]:
        """Return the lines of level INFO and above."""
        return [record.getMessage() for record in self._caplog.records if record.levelno >= logging.INFO]

    def debug(self) -> list[str]:
        """Return the lines of level DEBUG about single attempts."""
        messages = [record.getMessage() for record in self._caplog.records if record.levelno == logging.DEBUG]
        return [message for message in messages if message.startswith("output not stored")]


def output(number: int, host: str = "cdn.test") -> ClaimedOutput:
    """Return a claimed output of a host."""
    return ClaimedOutput(number, "t", 1, number, (f"https://{host}/{number}.png",), None, OutputFacts(1, 0, NOW), NOW)


def test_given_a_host_that_fails_for_minutes_when_attempts_go_on_then_each_minute_has_one_line(
    failures: Failures, lines: Lines
) -> None:
    for _ in range(3):
        for number in range(OUTPUTS):
            failures.failed(output(number), DOWN)
        failures.minute()
    failures.failed(output(0), GiveUp("unreachable", "connection refused"))
    failures.minute()
    failures.minute()

    assert lines.all() == [
        "downloads fail source=cdn.test output=0 code=http_error outcome=again later reason=HTTP 503",
        "downloads still fail source=cdn.test code=http_error count=20 given_up=0 seconds=60",
        "downloads still fail source=cdn.test code=http_error count=40 given_up=0 seconds=120",
        "downloads still fail source=cdn.test code=http_error count=60 given_up=0 seconds=180",
        "downloads still fail source=cdn.test code=unreachable count=61 given_up=1 seconds=240",
    ]
    assert len(lines.debug()) == 61


def test_given_a_host_that_failed_when_a_download_succeeds_then_one_line_says_that_it_works(
    failures: Failures, lines: Lines
) -> None:
    for number in range(OUTPUTS):
        failures.failed(output(number), DOWN)
    failures.failed(output(7, "other.test"), DOWN)
    failures.now = 12.0
    for number in range(OUTPUTS):
        failures.stored(output(number))
    failures.minute()
    failures.failed(output(1), DOWN)

    assert lines.all()[2:] == [
        "downloads work again source=cdn.test count=20 given_up=0 seconds=12",
        "downloads fail source=cdn.test output=1 code=http_error outcome=again later reason=HTTP 503",
    ]


def test_given_a_host_that_fails_now_and_then_when_minutes_pass_then_each_has_two_lines_at_most(
    failures: Failures, lines: Lines
) -> None:
    for minute in range(1, 4):
        for number in range(OUTPUTS):
            failures.failed(output(number), DOWN)
            failures.stored(output(number))
        failures.minute()
        assert len(lines.all()) <= 2 * minute + 1


def test_given_a_full_disk_when_outputs_of_two_hosts_fail_then_the_storage_is_the_source(
    failures: Failures, lines: Lines
) -> None:
    for number in range(OUTPUTS):
        failures.failed(output(number, f"cdn{number % 2}.test"), DISK)
    failures.stored(output(1))

    assert lines.all() == [
        "downloads fail source=storage output=0 code=storage outcome=again later reason=disk full",
        "downloads work again source=storage count=20 given_up=0 seconds=0",
    ]


def test_given_bad_files_of_a_host_that_works_when_it_delivers_then_they_are_counted_and_no_recovery_is_logged(
    failures: Failures, lines: Lines
) -> None:
    for number in range(OUTPUTS):
        failures.failed(output(number), BROKEN)
        failures.stored(output(100 + number))
    failures.minute()
    failures.minute()
    failures.failed(output(1), BROKEN)

    first = "downloads fail source=cdn.test output={} code=not_media outcome=again later reason=an HTML page"
    assert lines.all() == [
        first.format(0),
        "downloads still fail source=cdn.test code=not_media count=20 given_up=0 seconds=60",
        first.format(1),
    ]


def test_given_more_hosts_than_are_remembered_when_they_fail_then_memory_is_limited(failures: Failures) -> None:
    for number in range(MAX_TROUBLES + 10):
        failures.failed(output(number, f"cdn{number}.test"), DOWN)

    assert len(failures._troubles) == MAX_TROUBLES


def test_given_failures_when_nothing_else_happens_then_a_thread_logs_their_number(lines: Lines) -> None:
    log = FailureLog(interval=0.1)
    for number in range(OUTPUTS):
        log.failed(output(number), DOWN)

    wait_until(lambda: any("still fail" in line for line in lines.all()), "a summary is logged")

    assert "count=20" in lines.all()[1]


def test_given_a_server_that_answers_503_and_recovers_when_outputs_are_downloaded_then_two_lines_are_logged(
    stand: Stand, web: Web, lines: Lines
) -> None:
    downloader = stand.downloader()
    ids = [stand.add(web.serves(f"/{number}.png", page(503, HTML))) for number in range(OUTPUTS)]
    for output_id in ids:
        downloader.run(output_id)
    for number in range(OUTPUTS):
        web.serves(f"/{number}.png", page(200, PNG))
    make_due(stand.engine)
    for output_id in ids:
        downloader.run(output_id)

    assert {read_output(stand.engine, output_id).status for output_id in ids} == {"stored"}
    assert [line.split(" source")[0] for line in lines.all()] == ["downloads fail", "downloads work again"]
    assert "HTTP 503" in lines.all()[0]
    assert len(lines.debug()) == OUTPUTS


def test_given_a_storage_that_fails_and_recovers_when_outputs_are_downloaded_then_two_lines_are_logged(
    stand: Stand, web: Web, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise StorageTrouble("no space left on device")

    downloader = stand.downloader()
    ids = [stand.add(web.serves(f"/{number}.png", page(200, PNG))) for number in range(OUTPUTS)]
    with monkeypatch.context() as broken:
        broken.setattr(FileStorage, "keep", refuse)
        for output_id in ids:
            downloader.run(output_id)
    make_due(stand.engine)
    for output_id in ids:
        downloader.run(output_id)

    assert {read_output(stand.engine, output_id).status for output_id in ids} == {"stored"}
    assert [line.split(" output")[0].split(" count")[0] for line in lines.all()] == [
        "downloads fail source=storage",
        "downloads work again source=storage",
    ]
    assert "no space left on device" in lines.all()[0]
