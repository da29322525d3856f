"""Pages: each ends in time and has the position of the search, and together they contain every row once."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from tests.rows import NOW, add_downloading, add_job, add_output
from worker.store.engine import database_now
from worker.store.reports import pages
from worker.store.reports.pages import LOOK_SECONDS, OutputFilter, Page, jobs_page, outputs_page
from worker.store.reports.search import JobFilter

READY = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small windows, so that a few rows need several of them."""
    monkeypatch.setattr(pages, "WINDOW", 4)


def slow_clock() -> Callable[[], float]:
    """Return a clock by which each window uses up the whole time."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += LOOK_SECONDS * 1.5
        return now

    return clock


def read_all_pages(page: Callable[[int | None], Page]) -> tuple[list[int], list[Page]]:
    """Return all rows of all pages, and the pages."""
    pages = [page(None)]
    while pages[-1].before is not None:
        pages.append(page(pages[-1].before))
    return [row.id for page_read in pages for row in page_read.rows], pages


@pytest.mark.parametrize("clock", [slow_clock, lambda: lambda: 0.0], ids=["no time", "time enough"])
@pytest.mark.parametrize(
    ("job_filter", "matches"),
    [
        (JobFilter(), lambda number: True),
        (JobFilter(accounts=("shop",)), lambda number: number % 7 < 2),
        (JobFilter(accounts=("shop",), statuses=("completed",)), lambda number: number % 7 < 2 and number % 3 > 0),
        (JobFilter(kinds=("video",)), lambda number: number > 30),
        (JobFilter(statuses=("pending",)), lambda number: number % 3 == 0),
        (JobFilter(late=60.0), lambda number: number % 3 == 0 and number > 11),
        (JobFilter(accounts=("nobody",)), lambda number: False),
    ],
    ids=["all", "account", "account and state", "kind", "state", "late", "none"],
)
def test_the_pages_together_contain_every_matching_job_once_newest_first(
    engine: Engine, job_filter: JobFilter, matches: Callable[[int], bool], clock: Callable[[], Callable[[], float]]
) -> None:
    with engine.begin() as connection:
        now = database_now(connection)
        ids = {}
        for number in range(40):
            values = {"account": "shop" if number % 7 < 2 else "default", "kind": "video" if number > 30 else "image"}
            late = now - timedelta(minutes=number - 10)
            ids[number] = add_job(connection, str(number), **values, **(READY if number % 3 else {"due_at": late}))
        shown, pages = read_all_pages(
            lambda before: jobs_page(connection, job_filter, before=before, limit=5, clock=clock())
        )

    assert shown == [ids[number] for number in range(39, -1, -1) if matches(number)]
    assert all(len(page.rows) <= 5 for page in pages)


def test_a_page_ends_after_its_time_and_has_the_position_of_the_search(engine: Engine) -> None:
    with engine.begin() as connection:
        first = add_job(connection, "first", account="shop")
        ids = [add_job(connection, str(number)) for number in range(30)]

        job_filter = JobFilter(accounts=("shop",))
        page = jobs_page(connection, job_filter, before=None, limit=5, clock=slow_clock())
        whole = jobs_page(connection, job_filter, before=None, limit=5, clock=lambda: 0.0)

    assert (page.rows, page.before, page.searched_to) == ([], ids[-4], ids[-4])
    assert ([row.id for row in whole.rows], whole.before, whole.searched_to) == ([first], None, None)


def test_a_text_finds_a_job_by_id_remote_id_or_reference_page_by_page(engine: Engine) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, f"r{number}", reference="ours") for number in range(8)]
        same_reference = add_job(connection, "ours")

        def find(text: str) -> list[int]:
            page = lambda before: jobs_page(connection, JobFilter(), text=text, before=before, limit=3)  # noqa: E731
            return read_all_pages(page)[0]

        assert find("ours") == [same_reference, *ids[::-1]]
        assert find("r3") == [ids[3]]
        assert find(str(ids[2])) == [ids[2]]
        assert find("9" * 30) == []


@pytest.mark.parametrize("clock", [slow_clock, lambda: lambda: 0.0], ids=["no time", "time enough"])
def test_outputs_are_found_by_status_code_and_host_once_each(
    engine: Engine, clock: Callable[[], Callable[[], float]]
) -> None:
    failed_values = {"status": "failed", "due_at": None, "error_code": "gone"}
    with engine.begin() as connection:
        jobs = [add_downloading(connection, str(number)) for number in range(2)]
        waiting = [add_output(connection, jobs[0], number) for number in range(15)]
        failed = [add_output(connection, jobs[1], number, **failed_values) for number in range(3)]
        here = add_output(connection, jobs[1], 3, url="http://percent%25.test/a.png", error_code="unreachable")

        def find(output_filter: OutputFilter) -> list[int]:
            return read_all_pages(
                lambda before: outputs_page(connection, output_filter, before=before, limit=4, clock=clock())
            )[0]

        assert find(OutputFilter()) == [here, *failed[::-1], *waiting[::-1]]
        assert find(OutputFilter(status="failed")) == failed[::-1]
        assert find(OutputFilter(status="pending")) == [here, *waiting[::-1]]
        assert find(OutputFilter(code="unreachable")) == [here]
        assert find(OutputFilter(host="cdn.test")) == [*failed[::-1], *waiting[::-1]]
        assert find(OutputFilter(host="percent%25.test")) == [here]
        assert find(OutputFilter(host="percent%.test")) == []
        assert find(OutputFilter(job_id=jobs[0])) == waiting[::-1]
        assert find(OutputFilter(job_id=jobs[0], status="stored")) == []
