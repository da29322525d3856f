"""What one process learns is shared with all others, through the database, also after a restart."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select, update

from worker.core.pacing.policy import PacedJob
from worker.polling import duration_learner
from worker.polling.duration_learner import DurationLearner, read_models
from worker.store.paces import newest_paces
from worker.store.schema import paces

KIND = ("default", "image")


def observe_job(learner: DurationLearner, seconds: float, *, kind: str = "image", eta: float | None = None) -> None:
    """Observe a job of this duration until it is ready."""
    learner.prepare([("default", kind)])
    not_ready_age = 0.0
    while not_ready_age < seconds:
        age = learner.model("default", kind).due(PacedJob(not_ready_age, not_ready_age, eta), 0.5)[0]
        learner.observe("default", kind, PacedJob(age, not_ready_age, eta), ready=age >= seconds, planned=age)
        not_ready_age = age


def median(learner: DurationLearner, kind: str = "image") -> float:
    """Return the median duration that the learner expects."""
    learner.prepare([("default", kind)])
    return learner.model("default", kind).quantile(PacedJob(0.0), 0.5)


def test_given_a_process_that_has_learned_when_another_starts_then_it_has_the_same_model(engine: Engine) -> None:
    first = DurationLearner(engine)
    for _ in range(60):
        observe_job(first, 20.0, eta=40.0)
    first.share()

    second = DurationLearner(engine)

    assert median(second) == pytest.approx(median(first), rel=0.02)
    assert second.model(*KIND).lead == pytest.approx(first.model(*KIND).lead, rel=0.01)
    with engine.connect() as connection:
        assert [len(state) < 4_000 for state in connection.execute(select(paces.c.state)).scalars()] == [True, True]


def test_given_two_processes_that_learn_at_once_when_both_have_shared_then_both_have_everything(engine: Engine) -> None:
    draw = random.Random(5)
    learners = [DurationLearner(engine), DurationLearner(engine)]
    for number in range(120):
        observe_job(learners[number % 2], 20.0 * math.exp(draw.gauss(0, 0.3)))
        if number % 10 > 7:
            learners[number % 2].share()
    for learner in learners:
        learner.share()

    after = DurationLearner(engine)
    after.prepare([KIND])
    assert after.model(*KIND).by_age.moments.count == 120
    assert median(after) == pytest.approx(20.0, rel=0.12)


def test_given_many_threads_that_share_at_once_then_nothing_is_lost_and_none_blocks(engine: Engine) -> None:
    def work(number: int) -> None:
        learner = DurationLearner(engine)
        for kind in ("image", "video") if number % 2 else ("video", "image"):
            observe_job(learner, 10.0, kind=kind)
        learner.share()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(12)))

    with engine.connect() as connection:
        models = read_models(connection, [("default", "image"), ("default", "video"), ("default", "")])
        assert {row.kind for row in newest_paces(connection, limit=9)} == {"image", "video"}
    assert [models["default", kind][0].by_age.moments.count for kind in ("image", "video", "")] == [12, 12, 24]


def test_given_an_unknown_kind_when_its_model_is_loaded_then_it_starts_from_its_accounts_model(
    engine: Engine,
) -> None:
    first = DurationLearner(engine)
    for _ in range(40):
        observe_job(first, 60.0)
    first.share()

    assert 30.0 < median(DurationLearner(engine), "another") < 90.0
    fresh = DurationLearner(engine)
    fresh.prepare([("stranger", "image")])
    assert fresh.model("stranger", "image").quantile(PacedJob(0.0), 0.5) < 5.0


@pytest.mark.parametrize("state", ["{", "[]", "7", '{"age": 1}', json.dumps({"age": {}, "eta": {}, "lead": 0})])
def test_given_an_unreadable_state_when_it_is_loaded_then_learning_starts_again_and_is_logged(
    engine: Engine, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = DurationLearner(engine)
    observe_job(first, 20.0)
    first.share()
    with engine.begin() as connection:
        connection.execute(update(paces).values(state=state))

    second = DurationLearner(engine)
    for _ in range(30):
        observe_job(second, 20.0)
    second.share()

    assert "learning starts again" in caplog.text
    assert median(DurationLearner(engine)) == pytest.approx(20.0, rel=0.2)


def test_given_more_kinds_than_fit_in_memory_when_they_are_used_then_nothing_learned_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration_learner, "MAX_CLASSES", 4)
    learner = DurationLearner(engine)
    for number in range(9):
        observe_job(learner, 10.0, kind=f"kind-{number}")
    learner.share()

    with engine.connect() as connection:
        classes = [("default", f"kind-{number}") for number in range(9)]
        assert [model.by_age.moments.count for model, _ in read_models(connection, classes).values()] == [1] * 9
    assert len(learner._models) <= 6


def test_given_a_full_memory_when_a_batch_has_loaded_and_new_kinds_then_all_of_them_can_be_used(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration_learner, "MAX_CLASSES", 4)
    learner = DurationLearner(engine)
    learner.prepare([("default", "old"), ("default", "older")])

    learner.prepare([("default", "old"), ("default", "new"), ("default", "newer")])

    for kind in ("old", "new", "newer"):
        assert learner.model("default", kind).by_age.moments.count == 0


def test_given_nothing_learned_when_it_shares_then_nothing_is_written(engine: Engine) -> None:
    learner = DurationLearner(engine)
    learner.prepare([KIND])
    learner.share()
    learner.share_if_due()

    with engine.connect() as connection:
        assert newest_paces(connection, limit=9) == []
