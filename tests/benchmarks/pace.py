"""Pace: the worker's scheduling on a virtual clock, beside the optimum that knows the truth, and beside backing off."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.optimum import (
    DEADLINE,
    Alive,
    Cost,
    burst_bound,
    frontier,
    least_delay,
    lognormal,
    mixed,
    never,
    optimum_of,
    slot_bound,
)
from tests.benchmarks.table import Table
from worker.core.pacing.policy import Pace, PaceModel, Policy
from worker.core.pacing.simulation import Simulation, TraceJob, _Job, _Run, simulate

JOBS = 4_000
RATE = 2.0  # jobs per second
CALLS = (3.0, 5.0, 10.0)
KINDS = {  # share, median in seconds, spread of its logarithm
    "image": (0.55, 10.0, 0.4),
    "queued": (0.2, 40.0, 0.6),
    "upscale": (0.1, 15.0, 0.4),
    "video": (0.1, 200.0, 0.7),
    "training": (0.05, 1_600.0, 0.3),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs, and the classes that whoever knows the truth tells apart: their shares and durations."""

    name: str
    must: float
    jobs: list[TraceJob]
    classes: list[tuple[float, Alive]]
    step: float = math.inf  # the longest between two ages of the optimum's grid, in seconds


def _times(draw: random.Random, count: int) -> list[float]:
    now, times = 0.0, []
    for _ in range(count):
        now += draw.expovariate(RATE)
        times.append(now)
    return times


def _drawn(draw: random.Random, median: float, spread: float) -> float:
    return median * math.exp(draw.gauss(0, spread))


def workloads(seed: int = 1, count: int = JOBS) -> list[Workload]:
    """All of them."""
    draw = random.Random(seed)
    times = _times(draw, count)
    names = draw.choices(list(KINDS), [share for share, _, _ in KINDS.values()], k=count)
    images = [TraceJob(at, _drawn(draw, 8.0, 0.6)) for at in times]
    mixture = [TraceJob(at, _drawn(draw, *KINDS[name][1:]), name) for at, name in zip(times, names, strict=True)]
    tail = [TraceJob(at, _drawn(draw, 8.0, 1.3)) for at in times]
    endless = [TraceJob(job.submitted, None if draw.random() < 0.03 else job.duration) for job in tail]
    found = [
        Workload("images", 1.15, images, [(1.0, lognormal(8.0, 0.6))]),
        Workload("mixture", 1.15, mixture, [(share, lognormal(m, s)) for share, m, s in KINDS.values()], 3.0),
        Workload("heavy tail", 1.15, tail, [(1.0, lognormal(8.0, 1.3))]),
        Workload("heavy tail, 3 % never end", 1.15, endless,
                 [(1.0, mixed((0.97, lognormal(8.0, 1.3)), (0.03, never)))]),
        Workload(
            "images, 3 % never end", 1.15,
            [TraceJob(job.submitted, None if draw.random() < 0.03 else job.duration) for job in images],
            [(1.0, mixed((0.97, lognormal(8.0, 0.6)), (0.03, never)))],
        ),
    ]  # fmt: skip
    base = [(at, _drawn(draw, 20.0, 1.0), draw.gauss(0, 0.3)) for at in times]
    bins = [-2.4 + 0.2 * step for step in range(25)]
    weights = [math.exp(-place * place / 2) for place in bins]
    told = [
        (weight / sum(weights), lognormal(20.0 * math.exp(place), 0.3))
        for weight, place in zip(weights, bins, strict=True)
    ]
    for bias in (1.0, 0.5, 3.0):
        jobs = [TraceJob(at, middle * math.exp(error), "image", middle * bias) for at, middle, error in base]
        found.append(Workload(f"eta × {bias:g}", 1.15, jobs, told))
    constant = [TraceJob(at, middle * math.exp(error), "image", 13.07) for at, middle, error in base]
    found.append(Workload("eta a constant", 1.15, constant, [(1.0, lognormal(20.0, math.hypot(1.0, 0.3)))]))
    slow = (times[-1] / 3, times[-1] / 3 + 600)
    surge = [
        TraceJob(job.submitted, (job.duration or 0.0) * (5 if slow[0] < job.submitted < slow[1] else 1))
        for job in images
    ]
    part = sum(slow[0] < at < slow[1] for at in times) / count
    found.append(
        Workload(
            "surge: × 5 for ten minutes", 1.25, surge, [(1 - part, lognormal(8.0, 0.6)), (part, lognormal(40.0, 0.6))]
        )
    )
    warm = [TraceJob(at, _drawn(draw, 3.0, 0.2) if draw.random() < 0.7 else _drawn(draw, 45.0, 0.2)) for at in times]
    found.append(
        Workload(
            "warm 3 s or cold 45 s", 1.35, warm, [(1.0, mixed((0.7, lognormal(3.0, 0.2)), (0.3, lognormal(45.0, 0.2))))]
        )
    )
    medians = [_drawn(draw, 15.0, 0.8) for _ in range(200)]
    which = [draw.randrange(200) for _ in times]
    rare = [TraceJob(at, _drawn(draw, medians[one], 0.4), f"model-{one}") for at, one in zip(times, which, strict=True)]
    near = {round(math.log(median) * 6) / 6 for median in medians}
    groups = [(sum(round(math.log(medians[one]) * 6) / 6 == place for one in which) / count, place) for place in near]
    found.append(Workload("200 rare kinds", 1.35, rare, [(share, lognormal(math.exp(p), 0.4)) for share, p in groups]))
    return found


def run(jobs: list[TraceJob], price: float, *, policy: Policy = "learned", rps: float | None = None) -> Simulation:
    """A simulation with nothing between two requests but the policy."""
    return simulate(jobs, Pace(policy, price, 0.0), deadline_for=lambda kind: DEADLINE, rps=rps)


def mean(done: Simulation) -> float:
    """The mean delay, over all jobs: as the optimum counts it too, one that never ends has none."""
    return sum(done.delays) / done.jobs


def at_calls(jobs: list[TraceJob], calls: float) -> Simulation:
    """The learned policy at the price that makes it ask about so often."""
    low, high = 0.001, 1_000.0
    while True:
        price = math.sqrt(low * high)
        done = run(jobs, price)
        polls = done.polls / done.jobs
        if abs(polls / calls - 1) < 0.02 or high / low < 1.05:
            return done
        low, high = (price, high) if polls > calls else (low, price)


def best_of(workload: Workload) -> list[Cost]:
    """The least delay for each number of requests, of whoever knows the truth but not what comes."""
    if len(workload.classes) == 1:
        return optimum_of(workload.classes[0][1], [job.duration for job in workload.jobs])
    return frontier(workload.classes, workload.step)


def measure_pace(table: Table, folder: Path) -> None:
    """Delay beside the optimum at equal calls, and beside backing off behind the same limiter."""
    for workload in workloads():
        costs = best_of(workload)
        for calls in CALLS:
            done = at_calls(workload.jobs, calls)
            polls = done.polls / done.jobs
            what = f"{workload.name}, {calls:g} polls per job: mean delay ÷ optimum"
            table.one(what, mean(done), least_delay(costs, polls), "s", must=workload.must)
        for policy in ("exponential", "fixed"):
            done = run(workload.jobs, 0.5, policy=policy)
            polls = done.polls / done.jobs
            what = f"{workload.name}, {policy} ({polls:.1f} polls per job): mean delay ÷ optimum"
            table.one(what, mean(done), least_delay(costs, polls), "s")
    short_budget(table)
    bursts(table)
    two_that_learn(table)


def short_budget(table: Table) -> None:
    """Too few requests for all that is due."""
    workload = next(one for one in workloads(count=10_000) if one.name == "mixture")
    jobs, costs = workload.jobs, frontier(workload.classes, workload.step)
    for calls, must in ((1.2, 1 / 6), (2.0, 1 / 4), (3.0, 1 / 3), (8.0, 1 / 2.2)):
        rps = calls * len(jobs) / jobs[-1].submitted
        ours = mean(run(jobs, 0.05, rps=rps))
        theirs = mean(run(jobs, 0.5, policy="exponential", rps=rps))
        table.one(
            f"mixture, {calls:g} requests per job there are: mean delay ÷ exponential's", ours, theirs, "s", must=must
        )
        table.one("the optimum at as many requests ÷ exponential's", least_delay(costs, calls), theirs, "s")


def bursts(table: Table, count: int = 20, size: int = 200, rps: float = 2.0) -> None:
    """Jobs handed over all at once, again and again."""
    draw = random.Random(3)
    drawn = [[_drawn(draw, 8.0, 0.6) for _ in range(size)] for _ in range(count)]
    jobs = [TraceJob(number * 400.0, duration) for number, burst in enumerate(drawn) for duration in burst]
    slots = sum(slot_bound(burst, rps) for burst in drawn) / count
    bound = max(slots, burst_bound(lognormal(8.0, 0.6), size, rps))
    ours = mean(run(jobs, 0.05, rps=rps))
    theirs = mean(run(jobs, 0.5, policy="exponential", rps=rps))
    table.one(f"bursts of {size} jobs at {rps:g} requests/s: mean delay ÷ lower bound", ours, bound, "s", must=1.4)
    table.one("the same, exponential", theirs, bound, "s")


class TwoProcesses(_Run):
    """The same with two processes: each learns what it asks itself, and once a second they share it."""

    def __init__(self, pace: Pace, seed: int) -> None:
        super().__init__(pace, lambda kind: DEADLINE, None, seed)
        self._draw = random.Random(seed)
        self._processes = [PaceModel(), PaceModel()]
        self._shared = PaceModel()
        self._share_at = 0.0

    def _arrive(self, number: int, trace: TraceJob) -> None:
        self._models[trace.kind] = self._draw.choice(self._processes)
        super()._arrive(number, trace)

    def _ask(self, job: _Job, now: float) -> None:
        if now >= self._share_at:
            self._share_at = now + 1.0
            for place, model in enumerate(self._processes):
                model.merge_into(self._shared)
                self._processes[place] = PaceModel.restored(self._shared.snapshot(), self._account)
            self._processes[0] = PaceModel.restored(self._shared.snapshot(), self._account)
        self._models[job.trace.kind] = self._draw.choice(self._processes)
        super()._ask(job, now)


def two_that_learn(table: Table, traces: int = 60) -> None:
    """Short traces of one new kind: what it costs that two processes have to tell each other."""
    pace, one, two = Pace("learned", 0.5, 0.0), 0.0, 0.0
    for seed in range(traces):
        draw = random.Random(seed)
        jobs = [TraceJob(0.25 * number, _drawn(draw, 8.0, 0.6)) for number in range(300)]
        one += mean(simulate(jobs, pace, deadline_for=lambda kind: DEADLINE, seed=seed)) / traces
        two += mean(TwoProcesses(pace, seed).over(jobs)) / traces
    table.one("300 jobs of a new kind, two processes that learn: mean delay ÷ with one", two, one, "s", must=1.05)
