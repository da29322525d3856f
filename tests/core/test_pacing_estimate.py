"""Progress estimates are correct for simulated jobs: of the jobs with "50 % in 8 s", half are ready by then."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from worker.core.pacing.estimate import DOWNLOADING_PART, WAITING_PART, Progress, progress
from worker.core.pacing.policy import Pace, PacedJob, PaceModel
from worker.core.pacing.survival import LogDurationStats, SurvivalModel

DEADLINE = 400.0
PACE = Pace("learned", 0.5, 1.0)
Draw = Callable[[random.Random], tuple[float, float | None]]  # duration and eta of a job


@dataclass(frozen=True, slots=True)
class EstimateRecord:
    """An estimate for a job at some time, and the real remaining seconds. They are negative if it was ready already."""

    estimate: Progress
    seconds_left: float


def simulate_polls(draw: Draw, *, jobs: int, taught: int, seed: int, pace: Pace = PACE) -> list[EstimateRecord]:
    """Poll jobs as the worker does. After `taught` jobs, estimate the progress of each job at a random moment."""
    rng, model, estimates = random.Random(seed), PaceModel(), list[EstimateRecord]()
    for number in range(jobs):
        duration, eta = draw(rng)
        look_age = rng.expovariate(1.0) * 15.0
        job = PacedJob(0.0, eta=eta)
        age = pace.first(job, model, spread=rng.random()).wait
        for _ in range(200):
            if number >= taught and job.not_ready_age <= look_age < age:
                unseen_job = job._replace(age=look_age, seconds_left=DEADLINE - look_age)
                estimates.append(EstimateRecord(progress("pending", unseen_job, model), duration - look_age))
            ready = age >= duration
            model.observe(job._replace(age=age), ready, age)
            if ready or age > DEADLINE:
                break
            job = job._replace(age=age, not_ready_age=age)
            age += pace.next(job, model, spread=rng.random()).wait
        if ready:
            model.note(job)
    return estimates


def images(rng: random.Random) -> tuple[float, float | None]:
    """Return a lognormal duration with a median of 8 s."""
    return 8.0 * math.exp(rng.gauss(0, 0.6)), None


def warm_or_cold(rng: random.Random) -> tuple[float, float | None]:
    """Return about 5 s or about 40 s."""
    return (5.0 if rng.random() < 0.6 else 40.0) * math.exp(rng.gauss(0, 0.15)), None


def sometimes_never(rng: random.Random) -> tuple[float, float | None]:
    """Return a duration of `images`; one job in five never ends."""
    return (math.inf if rng.random() < 0.2 else images(rng)[0]), None


def with_an_eta(rng: random.Random) -> tuple[float, float | None]:
    """Return a duration between 2 s and two minutes, close to the eta."""
    eta = 2.0 * 60.0 ** rng.random()
    return eta * math.exp(rng.gauss(0, 0.2)), eta


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (images, 0.5),
        (images, 0.9),
        (warm_or_cold, 0.5),
        (warm_or_cold, 0.9),
        (sometimes_never, 0.5),  # the 90 % point is never reached
        (with_an_eta, 0.5),
        (with_an_eta, 0.9),
    ],
)
def test_estimated_times_are_calibrated(draw: Draw, share: float) -> None:
    estimates = simulate_polls(draw, jobs=4_000, taught=600, seed=7)

    name = "median_seconds" if share == 0.5 else "p90_seconds"
    dated = [(seconds, each.seconds_left) for each in estimates if (seconds := getattr(each.estimate, name))]
    assert len(dated) > 600
    in_time = sum(left <= seconds for seconds, left in dated) / len(dated)
    assert in_time == pytest.approx(share, abs=0.08), f"{in_time:.1%} of {len(dated)}"
    now = [each.seconds_left <= 0 for each in estimates if getattr(each.estimate, name) == 0.0]
    assert len(now) < 20 or sum(now) / len(now) > share - 0.1, "as good as ready, it was said"


@pytest.mark.parametrize("draw", [images, warm_or_cold, sometimes_never, with_an_eta])
def test_estimated_chances_are_calibrated(draw: Draw) -> None:
    estimates = simulate_polls(draw, jobs=6_000, taught=600, seed=8, pace=Pace("learned", 1.0, 1.0))

    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0)):
        alike = [each for each in estimates if low <= each.estimate.chance < high]
        if len(alike) > 100:
            expected = sum(each.estimate.chance for each in alike) / len(alike)
            assert sum(each.seconds_left <= 0 for each in alike) / len(alike) == pytest.approx(expected, abs=0.1)
    ready, expected = sum(each.seconds_left <= 0 for each in estimates), sum(each.estimate.chance for each in estimates)
    assert ready == pytest.approx(expected, abs=0.06 * len(estimates))
    assert ready > 0.03 * len(estimates), "there is too little to tell"


def test_a_late_job_of_a_kind_that_often_never_ends_gets_no_time() -> None:
    estimates = simulate_polls(sometimes_never, jobs=3_000, taught=1_000, seed=9)
    late = [each.estimate for each in estimates if each.estimate.fraction > 0.7]
    new = [each.estimate for each in estimates if each.estimate.fraction < 0.2]

    assert len(late) > 60
    assert sum(each.median_seconds is None for each in late) > 0.8 * len(late)
    assert all(each.median_seconds is not None for each in new)


@pytest.mark.parametrize("eta", [None, 4.0, 960.0])
def test_estimates_for_a_new_kind_are_cautious(eta: float | None) -> None:
    estimate = progress("pending", PacedJob(0.0, eta=eta), PaceModel())

    assert estimate.median_seconds is not None
    assert estimate.p90_seconds == pytest.approx(9 * estimate.median_seconds)
    assert 5.0 < estimate.median_seconds < 150.0
    assert estimate.chance == estimate.fraction == 0.0


def test_a_new_kind_starts_from_the_other_kinds_of_the_account() -> None:
    account = PaceModel(SurvivalModel(), SurvivalModel())
    for _ in range(30):
        account.note(PacedJob(60.0, 55.0))

    estimate = progress("pending", PacedJob(0.0), PaceModel.after(account))

    assert estimate.median_seconds == pytest.approx(57.0, rel=0.25)


@pytest.mark.parametrize(
    "model", [PaceModel(), PaceModel(SurvivalModel(LogDurationStats(40.0, math.log(8.0), 0.2)))], ids=["unseen", "seen"]
)
def test_the_fraction_grows_with_time_and_not_back_after_an_answer(model: PaceModel) -> None:
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
def test_a_ready_or_final_job_has_certain_progress(status: str, phase: str, fraction: float) -> None:
    estimate = progress(status, PacedJob(30.0, 2.0), PaceModel())

    assert estimate == Progress(1.0, 0.0, 0.0, phase, fraction)  # type: ignore[arg-type]  # a table's column is text


def test_clock_differences_and_invalid_etas_give_valid_estimates() -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    row = SimpleNamespace(
        submitted_at=now + timedelta(hours=1),
        not_ready_at=now + timedelta(hours=2),
        eta=-5.0,
        eta_at=now - timedelta(days=9),
        deadline_at=now + timedelta(hours=2),
    )
    job = PacedJob.at(now, row)

    estimate = progress("pending", job, PaceModel())

    assert (job.age, job.not_ready_age, job.eta, job.eta_age) == (3_600.0, 3_600.0, None, 0.0)
    assert estimate.median_seconds is not None
    assert math.isfinite(estimate.median_seconds)
