"""What one process learns all know: through the database, after a restart, and side by side."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select, update

from worker.core.pacing.policy import PacedJob
from worker.polling import pace_learner
from worker.polling.pace_learner import PaceLearner, read_models
from worker.store.paces import newest_paces
from worker.store.schema import paces

KIND = ("default", "image")


def finished(one: PaceLearner, seconds: float, *, kind: str = "image", eta: float | None = None) -> None:
    """A job of that duration is asked about until it is ready."""
    one.prepare([("default", kind)])
    seen = 0.0
    while seen < seconds:
        age = one.model("default", kind).due(PacedJob(seen, seen, eta), 0.5)[0]
        one.observe("default", kind, PacedJob(age, seen, eta), ready=age >= seconds, planned=age)
        seen = age


def median(one: PaceLearner, kind: str = "image") -> float:
    """What it believes."""
    one.prepare([("default", kind)])
    return one.model("default", kind).quantile(PacedJob(0.0), 0.5)


def test_given_a_process_that_has_learned_when_another_starts_then_it_knows_the_same(engine: Engine) -> None:
    first = PaceLearner(engine)
    for _ in range(60):
        finished(first, 20.0, eta=40.0)
    first.share()

    second = PaceLearner(engine)

    assert median(second) == pytest.approx(median(first), rel=0.02)
    assert second.model(*KIND).lead == pytest.approx(first.model(*KIND).lead, rel=0.01)
    with engine.connect() as connection:
        assert [len(state) < 4_000 for state in connection.execute(select(paces.c.state)).scalars()] == [True, True]


def test_given_two_processes_that_learn_at_once_when_both_have_shared_then_they_know_all_of_it(engine: Engine) -> None:
    draw = random.Random(5)
    both = [PaceLearner(engine), PaceLearner(engine)]
    for number in range(120):
        finished(both[number % 2], 20.0 * math.exp(draw.gauss(0, 0.3)))
        if number % 10 > 7:
            both[number % 2].share()
    for one in both:
        one.share()

    after = PaceLearner(engine)
    after.prepare([KIND])
    assert after.model(*KIND).by_age.moments.count == 120
    assert median(after) == pytest.approx(20.0, rel=0.12)


def test_given_many_threads_that_share_at_once_then_nothing_is_lost_and_nobody_blocks(engine: Engine) -> None:
    def work(number: int) -> None:
        mine = PaceLearner(engine)
        for kind in ("image", "video") if number % 2 else ("video", "image"):
            finished(mine, 10.0, kind=kind)
        mine.share()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(12)))

    with engine.connect() as connection:
        found = read_models(connection, [("default", "image"), ("default", "video"), ("default", "")])
        assert {row.kind for row in newest_paces(connection, limit=9)} == {"image", "video"}
    assert [found["default", kind][0].by_age.moments.count for kind in ("image", "video", "")] == [12, 12, 24]


def test_given_a_kind_that_was_never_seen_when_it_is_asked_for_then_it_begins_where_its_account_is(
    engine: Engine,
) -> None:
    first = PaceLearner(engine)
    for _ in range(40):
        finished(first, 60.0)
    first.share()

    assert 30.0 < median(PaceLearner(engine), "another") < 90.0
    fresh = PaceLearner(engine)
    fresh.prepare([("stranger", "image")])
    assert fresh.model("stranger", "image").quantile(PacedJob(0.0), 0.5) < 5.0


@pytest.mark.parametrize("state", ["{", "[]", "7", '{"age": 1}', json.dumps({"age": {}, "eta": {}, "lead": 0})])
def test_given_a_state_that_nobody_can_read_when_it_is_loaded_then_it_is_learned_anew_and_said(
    engine: Engine, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = PaceLearner(engine)
    finished(first, 20.0)
    first.share()
    with engine.begin() as connection:
        connection.execute(update(paces).values(state=state))

    second = PaceLearner(engine)
    for _ in range(30):
        finished(second, 20.0)
    second.share()

    assert "learning starts again" in caplog.text
    assert median(PaceLearner(engine)) == pytest.approx(20.0, rel=0.2)


def test_given_more_kinds_than_are_kept_when_they_come_then_none_of_what_was_learned_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_learner, "CLASSES_MOST", 4)
    mine = PaceLearner(engine)
    for number in range(9):
        finished(mine, 10.0, kind=f"kind-{number}")
    mine.share()

    with engine.connect() as connection:
        classes = [("default", f"kind-{number}") for number in range(9)]
        assert [model.by_age.moments.count for model, _ in read_models(connection, classes).values()] == [1] * 9
    assert len(mine._models) <= 6


def test_given_nothing_learned_when_it_shares_then_nothing_is_written(engine: Engine) -> None:
    mine = PaceLearner(engine)
    mine.prepare([KIND])
    mine.share()
    mine.share_if_due()

    with engine.connect() as connection:
        assert newest_paces(connection, limit=9) == []
