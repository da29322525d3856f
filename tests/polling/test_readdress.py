"""Jobs that were tracked under a mistyped SD_API_URL: none ends, and they follow the setting once it is corrected."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, select

import worker
from tests.rows import BASE, add_job, read_job
from worker.store.jobs import readdress
from worker.store.schema import unread
from worker.testing import Kit, kit


@pytest.fixture
def made(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as made:
        yield made


@pytest.mark.parametrize("path", ["/api/v33", "/api/v3/text2img", "/api/v6", "/v3", "/api/v3/fetch"])
def test_a_bare_id_that_was_tracked_under_a_mistyped_path_is_stored_once_it_is_corrected(
    made: Kit, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as mistyped:
        mistyped.setenv("SD_API_URL", f"{made.api.root_url}{path}")
        job_id = worker.track(77)

    job = made.worker.run(job_id)

    assert job.status == "completed"
    assert made.api.calls.by_path[f"{path}/fetch/77"] <= 1


def test_a_moved_job_is_asked_at_its_right_address_though_its_deadline_is_over(
    made: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would expire by an answer from an address that was never its own. That answer is not kept either."""
    with monkeypatch.context() as mistyped:
        mistyped.setenv("SD_API_URL", f"{made.api.root_url}/api/v33")
        job_id = worker.track(77, submitted_at=datetime.now(UTC) - timedelta(hours=3), deadline=60)

    job = made.worker.run(job_id)

    assert (job.status, made.api.calls.by_path["/api/v33/fetch/77"]) == ("completed", 1)
    with made.worker.engine.connect() as connection:
        assert connection.execute(select(unread)).all() == []


def test_a_job_that_names_its_own_address_keeps_it(made: Kit) -> None:
    """Another family may know the id as somebody else's job."""
    job_id = worker.track(77, fetch_url=f"{made.api.root_url}/api/v33/fetch/77")

    made.worker.advance(300)

    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.outputs) == ("pending", ())
    assert made.api.calls.by_path["/api/v3/fetch/77"] == 0


def test_a_job_whose_own_path_the_api_does_not_have_ends_at_its_deadline_and_another_job_goes_on(made: Kit) -> None:
    wrong = worker.track(77, fetch_url=f"{made.api.root_url}/api/v33/fetch/77", deadline=600)

    made.worker.advance(900)
    job = made.worker.run(worker.track(78))

    ended = worker.get(wrong)
    assert ended is not None
    assert (ended.status, job.status) == ("expired", "completed")
    assert "no such path" in str(ended.error_message)


def test_only_jobs_at_the_default_address_are_moved_and_none_onto_another_job(engine: Engine) -> None:
    wrong = {"fetch_base": "https://api.test/api/v33/fetch", "fetch_host": "api.test"}
    with engine.begin() as connection:
        default = add_job(connection, "1", **wrong, fetch_url="https://api.test/api/v33/fetch/1", default_address=True)
        named = add_job(connection, "2", **wrong, fetch_url="https://api.test/api/v33/fetch/2")
        twice = add_job(connection, "3", **wrong, fetch_url="https://api.test/api/v33/fetch/3", default_address=True)
        right = add_job(connection, "3", default_address=True)

    with engine.begin() as connection:
        moved = readdress(connection, [default, named, twice, right], BASE, "api.test")
        again = readdress(connection, [default], BASE, "api.test")

    assert (moved, again) == ({default, right}, {default})
    assert (read_job(engine, default).fetch_url, read_job(engine, default).fetch_base) == (f"{BASE}/1", BASE)
    assert read_job(engine, named).fetch_url.endswith("/api/v33/fetch/2")
    assert read_job(engine, twice).fetch_url.endswith("/api/v33/fetch/3")
