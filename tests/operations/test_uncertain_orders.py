"""A real server loses the answer to an order: that is a trouble, `why` explains it, and `attach` repairs it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

import worker
from worker.operations.explain import why
from worker.operations.job_context import read_context
from worker.operations.order_findings import order_document
from worker.operations.troubles import read_evidence, read_troubles
from worker.store.jobs import job_row
from worker.testing import Kit, kit


@pytest.fixture
def testkit(tmp_path: Path, engine: Engine) -> Iterator[Kit]:
    """A worker and a stand-in of the API on each kind of database."""
    with kit(tmp_path / "kit", database=engine) as running_kit:
        yield running_kit


def troubles(testkit: Kit) -> list[tuple[str, int]]:
    """Return the codes of the troubles, and the number of jobs of each."""
    settings = testkit.worker.settings
    with testkit.worker.engine.connect() as connection:
        rows = read_troubles(connection, settings, read_evidence(connection, settings))
    return [(trouble.code, trouble.jobs) for trouble in rows]


def test_given_a_lost_answer_then_a_person_is_told_and_can_attach_the_job(testkit: Kit) -> None:
    testkit.api.loses_the_answer()
    lost = worker.order("v3/text2img", {"prompt": "a lake"})
    testkit.worker.advance(1)
    answered = worker.order("v3/text2img", {"prompt": "a hill"})
    testkit.worker.run(answered)

    settings = testkit.worker.settings
    with testkit.worker.engine.connect() as connection:
        row = job_row(connection, lost)
        assert row is not None
        context = read_context(connection, row, (), (), settings)
    assert row.status == "uncertain"
    assert why(context).startswith("it was sent at ")
    document = order_document(context)
    assert document is not None
    assert (document["payload"], document["attempts"], document["place"]) == ({"prompt": "a lake"}, 1, None)
    assert ("uncertain_orders", 1) in troubles(testkit)

    job = worker.get(answered)
    assert job is not None
    assert worker.attach(lost, int(job.remote_id) - 1)
    assert testkit.worker.run(lost).status == "completed"
    assert "uncertain_orders" not in [code for code, _ in troubles(testkit)]
    assert testkit.api.charged == 2
