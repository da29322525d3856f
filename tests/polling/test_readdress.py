"""Jobs that were tracked under a wrong SD_API_URL: none ends, and they move to the corrected URL."""

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
def env(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as env:
        yield env


@pytest.mark.parametrize("path", ["/api/v33", "/api/v3/text2img", "/api/v6", "/v3", "/api/v3/fetch"])
def test_a_bare_id_tracked_under_a_wrong_path_is_stored_once_the_url_is_corrected(
    env: Kit, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as mistyped:
        mistyped.setenv("SD_API_URL", f"{env.api.root_url}{path}")
        job_id = worker.track(77)

    job = env.worker.run(job_id)

    assert job.status == "completed"
    assert env.api.calls.by_path[f"{path}/fetch/77"] <= 1


def test_a_moved_job_is_polled_at_its_right_address_even_after_its_deadline(
    env: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an answer from a wrong address would expire it. That answer is not stored either."""
    with monkeypatch.context() as mistyped:
        mistyped.setenv("SD_API_URL", f"{env.api.root_url}/api/v33")
        job_id = worker.track(77, submitted_at=datetime.now(UTC) - timedelta(hours=3), deadline=60)

    job = env.worker.run(job_id)

    assert (job.status, env.api.calls.by_path["/api/v33/fetch/77"]) == ("completed", 1)
    with env.worker.engine.connect() as connection:
        assert connection.execute(select(unread)).all() == []


def test_a_job_with_its_own_address_keeps_it(env: Kit) -> None:
    """Another family may use the same id for another job."""
    job_id = worker.track(77, fetch_url=f"{env.api.root_url}/api/v33/fetch/77")

    env.worker.advance(300)

    job = worker.get(job_id)
    assert job is not None
    assert (job.status, job.outputs) == ("pending", ())
    assert env.api.calls.by_path["/api/v3/fetch/77"] == 0


def test_a_job_with_an_unknown_path_of_its_own_ends_at_its_deadline_and_another_job_continues(env: Kit) -> None:
    wrong = worker.track(77, fetch_url=f"{env.api.root_url}/api/v33/fetch/77", deadline=600)

    env.worker.advance(900)
    job = env.worker.run(worker.track(78))

    ended = worker.get(wrong)
    assert ended is not None
    assert (ended.status, job.status) == ("expired", "completed")
    assert "no such path" in str(ended.error_message)


def test_only_jobs_at_the_default_address_are_moved_and_never_onto_another_job(engine: Engine) -> None:
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
