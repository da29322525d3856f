"""What a page is told of progress is true of simulated jobs: of those told "50 % in 8 s", half are ready by then."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from worker.core.pacing.estimate import DOWNLOADING_PART, WAITING_PART, Progress, progress
from worker.core.pacing.policy import Pace, PacedJob, PaceModel
from worker.core.pacing.survival import LogDurationStats, SurvivalModel

DEADLINE = 400.0
PACE = Pace("learned", 0.5, 1.0)
Draw = Callable[[random.Random], tuple[float, float | None]]  # duration and eta of a job


@dataclass(frozen=True, slots=True)
class Told:
    """What was told of a job at some moment, and how long it really took from then; negative where it was ready."""

    said: Progress
    left: float


def polled(draw: Draw, *, jobs: int, taught: int, seed: int, pace: Pace = PACE) -> list[Told]:
    """Jobs are polled as the worker does; once `taught` were, a page looks at each at some moment."""
    dice, model, told = random.Random(seed), PaceModel(), list[Told]()
    for number in range(jobs):
        duration, eta = draw(dice)
        look = dice.expovariate(1.0) * 15.0
        job = PacedJob(0.0, eta=eta)
        age = pace.first(job, model, spread=dice.random()).wait
        for _ in range(200):
            if number >= taught and job.not_ready_age <= look < age:
                seen_then = job._replace(age=look, seconds_left=DEADLINE - look)
                told.append(Told(progress("pending", seen_then, model), duration - look))
            ready = age >= duration
            model.observe(job._replace(age=age), ready, age)
            if ready or age > DEADLINE:
                break
            job = job._replace(age=age, not_ready_age=age)
            age += pace.next(job, model, spread=dice.random()).wait
        if ready:
            model.note(job)
    return told


def images(dice: random.Random) -> tuple[float, float | None]:
    """Lognormal, median 8 s."""
    return 8.0 * math.exp(dice.gauss(0, 0.6)), None


def warm_or_cold(dice: random.Random) -> tuple[float, float | None]:
    """Some 5 s, or some 40."""
    return (5.0 if dice.random() < 0.6 else 40.0) * math.exp(dice.gauss(0, 0.15)), None


def never_sometimes(dice: random.Random) -> tuple[float, float | None]:
    """One of five never ends."""
    return (math.inf if dice.random() < 0.2 else images(dice)[0]), None


def with_an_eta(dice: random.Random) -> tuple[float, float | None]:
    """Anything from 2 s to two minutes, as the eta says."""
    eta = 2.0 * 60.0 ** dice.random()
    return eta * math.exp(dice.gauss(0, 0.2)), eta


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (images, 0.5),
        (images, 0.9),
        (warm_or_cold, 0.5),
        (warm_or_cold, 0.9),
        (never_sometimes, 0.5),  # nine of ten never are
        (with_an_eta, 0.5),
        (with_an_eta, 0.9),
    ],
)
def test_of_jobs_that_are_told_a_time_so_many_are_ready_by_then(draw: Draw, share: float) -> None:
    told = polled(draw, jobs=4_000, taught=600, seed=7)

    name = "median_seconds" if share == 0.5 else "p90_seconds"
    dated = [(seconds, one.left) for one in told if (seconds := getattr(one.said, name))]
    assert len(dated) > 600
    in_time = sum(left <= seconds for seconds, left in dated) / len(dated)
    assert in_time == pytest.approx(share, abs=0.08), f"{in_time:.1%} of {len(dated)}"
    now = [one.left <= 0 for one in told if getattr(one.said, name) == 0.0]
    assert len(now) < 20 or sum(now) / len(now) > share - 0.1, "as good as ready, it was said"


@pytest.mark.parametrize("draw", [images, warm_or_cold, never_sometimes, with_an_eta])
def test_of_jobs_that_are_told_a_chance_so_many_are_ready(draw: Draw) -> None:
    told = polled(draw, jobs=6_000, taught=600, seed=8, pace=Pace("learned", 1.0, 1.0))

    for least, most in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0)):
        alike = [one for one in told if least <= one.said.chance < most]
        if len(alike) > 100:
            expected = sum(one.said.chance for one in alike) / len(alike)
            assert sum(one.left <= 0 for one in alike) / len(alike) == pytest.approx(expected, abs=0.1)
    ready, expected = sum(one.left <= 0 for one in told), sum(one.said.chance for one in told)
    assert ready == pytest.approx(expected, abs=0.06 * len(told))
    assert ready > 0.03 * len(told), "there is too little to tell"


def test_where_many_never_end_no_time_is_promised_to_a_job_that_is_late() -> None:
    told = polled(never_sometimes, jobs=3_000, taught=1_000, seed=9)
    late = [one.said for one in told if one.said.fraction > 0.7]
    new = [one.said for one in told if one.said.fraction < 0.2]

    assert len(late) > 60
    assert sum(one.median_seconds is None for one in late) > 0.8 * len(late)
    assert all(one.median_seconds is not None for one in new)


@pytest.mark.parametrize("eta", [None, 4.0, 960.0])
def test_of_a_kind_that_nobody_has_seen_little_is_promised(eta: float | None) -> None:
    said = progress("pending", PacedJob(0.0, eta=eta), PaceModel())

    assert said.median_seconds is not None
    assert said.p90_seconds == pytest.approx(9 * said.median_seconds)
    assert 5.0 < said.median_seconds < 150.0
    assert said.chance == said.fraction == 0.0


def test_what_one_kind_showed_is_where_another_of_the_account_begins() -> None:
    account = PaceModel(SurvivalModel(), SurvivalModel())
    for _ in range(30):
        account.note(PacedJob(60.0, 55.0))

    said = progress("pending", PacedJob(0.0), PaceModel.after(account))

    assert said.median_seconds == pytest.approx(57.0, rel=0.25)


@pytest.mark.parametrize(
    "model", [PaceModel(), PaceModel(SurvivalModel(LogDurationStats(40.0, math.log(8.0), 0.2)))], ids=["unseen", "seen"]
)
def test_an_answer_moves_no_bar_back_and_time_moves_it_on(model: PaceModel) -> None:
    shown = [
        progress("pending", PacedJob(age, seen), model).fraction
        for age, seen in ((0.0, 0.0), (4.0, 0.0), (4.0, 4.0), (9.0, 4.0), (9.0, 9.0), (50.0, 9.0), (50.0, 50.0))
    ]

    assert shown == sorted(shown)
    assert shown[0] == 0.0
    assert 0.5 < shown[-1] <= WAITING_PART < DOWNLOADING_PART < 1.0


@pytest.mark.parametrize(
    ("status", "phase", "fraction"),
    [
        ("downloading", "downloading", DOWNLOADING_PART),
        ("completed", "final", 1.0),
        ("failed", "final", 1.0),
        ("expired", "final", 1.0),
        ("cancelled", "final", 1.0),
    ],
)
def test_a_job_that_is_ready_or_over_is_certain(status: str, phase: str, fraction: float) -> None:
    said = progress(status, PacedJob(30.0, 2.0), PaceModel())

    assert said == Progress(1.0, 0.0, 0.0, phase, fraction)  # type: ignore[arg-type]  # a table's column is text


def test_clocks_that_differ_and_etas_that_make_no_sense_make_no_nonsense() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    job = PacedJob.at(
        now,
        submitted_at=now + timedelta(hours=1),
        not_ready_at=now + timedelta(hours=2),
        eta=-5.0,
        eta_at=now - timedelta(days=9),
        deadline_at=now + timedelta(hours=2),
    )

    said = progress("pending", job, PaceModel())

    assert (job.age, job.not_ready_age, job.eta, job.eta_age) == (3_600.0, 3_600.0, None, 0.0)
    assert said.median_seconds is not None
    assert math.isfinite(said.median_seconds)
