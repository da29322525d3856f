"""Pace: the worker's scheduling on a virtual clock, beside the optimum and beside simple policies."""

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
    """Jobs, and the classes that the optimum knows: their shares and survival functions."""

    name: str
    must: float
    jobs: list[TraceJob]
    classes: list[tuple[float, Alive]]
    step: float = math.inf  # the longest step of the optimum's grid, in seconds


def _times(rng: random.Random, count: int) -> list[float]:
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(RATE)
        times.append(now)
    return times


def _draw_duration(rng: random.Random, median: float, spread: float) -> float:
    return median * math.exp(rng.gauss(0, spread))


def workloads(seed: int = 1, count: int = JOBS) -> list[Workload]:
    """Return all workloads."""
    rng = random.Random(seed)
    times = _times(rng, count)
    names = rng.choices(list(KINDS), [share for share, _, _ in KINDS.values()], k=count)
    images = [TraceJob(at, _draw_duration(rng, 8.0, 0.6)) for at in times]
    mixture = [TraceJob(at, _draw_duration(rng, *KINDS[name][1:]), name) for at, name in zip(times, names, strict=True)]
    tail = [TraceJob(at, _draw_duration(rng, 8.0, 1.3)) for at in times]
    endless = [TraceJob(job.submitted, None if rng.random() < 0.03 else job.duration) for job in tail]
    result = [
        Workload("images", 1.15, images, [(1.0, lognormal(8.0, 0.6))]),
        Workload("mixture", 1.15, mixture, [(share, lognormal(m, s)) for share, m, s in KINDS.values()], 3.0),
        Workload("heavy tail", 1.15, tail, [(1.0, lognormal(8.0, 1.3))]),
        Workload("heavy tail, 3 % never end", 1.15, endless,
                 [(1.0, mixed((0.97, lognormal(8.0, 1.3)), (0.03, never)))]),
        Workload(
            "images, 3 % never end", 1.15,
            [TraceJob(job.submitted, None if rng.random() < 0.03 else job.duration) for job in images],
            [(1.0, mixed((0.97, lognormal(8.0, 0.6)), (0.03, never)))],
        ),
    ]  # fmt: skip
    base = [(at, _draw_duration(rng, 20.0, 1.0), rng.gauss(0, 0.3)) for at in times]
    bins = [-2.4 + 0.2 * step for step in range(25)]
    weights = [math.exp(-offset * offset / 2) for offset in bins]
    eta_classes = [
        (weight / sum(weights), lognormal(20.0 * math.exp(offset), 0.3))
        for weight, offset in zip(weights, bins, strict=True)
    ]
    for bias in (1.0, 0.5, 3.0):
        jobs = [TraceJob(at, middle * math.exp(error), "image", middle * bias) for at, middle, error in base]
        result.append(Workload(f"eta × {bias:g}", 1.15, jobs, eta_classes))
    constant = [TraceJob(at, middle * math.exp(error), "image", 13.07) for at, middle, error in base]
    result.append(Workload("eta a constant", 1.15, constant, [(1.0, lognormal(20.0, math.hypot(1.0, 0.3)))]))
    slow = (times[-1] / 3, times[-1] / 3 + 600)
    surge = [
        TraceJob(job.submitted, (job.duration or 0.0) * (5 if slow[0] < job.submitted < slow[1] else 1))
        for job in images
    ]
    part = sum(slow[0] < at < slow[1] for at in times) / count
    result.append(
        Workload(
            "surge: × 5 for ten minutes", 1.25, surge, [(1 - part, lognormal(8.0, 0.6)), (part, lognormal(40.0, 0.6))]
        )
    )
    warm = [
        TraceJob(at, _draw_duration(rng, 3.0, 0.2) if rng.random() < 0.7 else _draw_duration(rng, 45.0, 0.2))
        for at in times
    ]
    result.append(
        Workload(
            "warm 3 s or cold 45 s", 1.35, warm, [(1.0, mixed((0.7, lognormal(3.0, 0.2)), (0.3, lognormal(45.0, 0.2))))]
        )
    )
    medians = [_draw_duration(rng, 15.0, 0.8) for _ in range(200)]
    kinds = [rng.randrange(200) for _ in times]
    rare = [
        TraceJob(at, _draw_duration(rng, medians[kind], 0.4), f"model-{kind}")
        for at, kind in zip(times, kinds, strict=True)
    ]
    centers = {round(math.log(median) * 6) / 6 for median in medians}
    groups = [
        (sum(round(math.log(medians[kind]) * 6) / 6 == center for kind in kinds) / count, center) for center in centers
    ]
    result.append(
        Workload("200 rare kinds", 1.35, rare, [(share, lognormal(math.exp(center), 0.4)) for share, center in groups])
    )
    return result


def run(jobs: list[TraceJob], price: float, *, policy: Policy = "learned", rps: float | None = None) -> Simulation:
    """Simulate the jobs without a minimum interval between polls, so that only the policy decides."""
    return simulate(jobs, Pace(policy, price, 0.0), deadline_for=lambda kind: DEADLINE, rps=rps)


def mean(result: Simulation) -> float:
    """Return the mean delay over all jobs. As in the optimum, a job that never ends has no delay."""
    return sum(result.delays) / result.jobs


def at_calls(jobs: list[TraceJob], calls: float) -> Simulation:
    """Simulate the learned policy at the price that leads to about `calls` polls per job."""
    low, high = 0.001, 1_000.0
    while True:
        price = math.sqrt(low * high)
        result = run(jobs, price)
        polls = result.polls / result.jobs
        if abs(polls / calls - 1) < 0.02 or high / low < 1.05:
            return result
        low, high = (price, high) if polls > calls else (low, price)


def best_of(workload: Workload) -> list[Cost]:
    """Return the least delay for each number of requests, given the distributions but not the durations."""
    if len(workload.classes) == 1:
        return optimum_of(workload.classes[0][1], [job.duration for job in workload.jobs])
    return frontier(workload.classes, workload.step)


def measure_pace(table: Table, folder: Path) -> None:
    """Measure the delay relative to the optimum at equal polls, and relative to other policies."""
    for workload in workloads():
        costs = best_of(workload)
        for calls in CALLS:
            result = at_calls(workload.jobs, calls)
            polls = result.polls / result.jobs
            name = f"{workload.name}, {calls:g} polls per job: mean delay ÷ optimum"
            table.single(name, mean(result), least_delay(costs, polls), "s", must=workload.must)
        for policy in ("exponential", "fixed"):
            result = run(workload.jobs, 0.5, policy=policy)
            polls = result.polls / result.jobs
            name = f"{workload.name}, {policy} ({polls:.1f} polls per job): mean delay ÷ optimum"
            table.single(name, mean(result), least_delay(costs, polls), "s")
    short_budget(table)
    bursts(table)
    two_learning_processes(table)


def short_budget(table: Table) -> None:
    """Measure the delay when the rate limit allows fewer polls than the policy wants."""
    workload = next(item for item in workloads(count=10_000) if item.name == "mixture")
    jobs, costs = workload.jobs, frontier(workload.classes, workload.step)
    for calls, must in ((1.2, 1 / 6), (2.0, 1 / 4), (3.0, 1 / 3), (8.0, 1 / 2.2)):
        rps = calls * len(jobs) / jobs[-1].submitted
        learned = mean(run(jobs, 0.05, rps=rps))
        exponential = mean(run(jobs, 0.5, policy="exponential", rps=rps))
        table.single(
            f"mixture, {calls:g} requests per job there are: mean delay ÷ exponential's",
            learned,
            exponential,
            "s",
            must=must,
        )
        table.single("the optimum at as many requests ÷ exponential's", least_delay(costs, calls), exponential, "s")


def bursts(table: Table, count: int = 20, size: int = 200, rps: float = 2.0) -> None:
    """Measure bursts of jobs that are submitted at the same time."""
    rng = random.Random(3)
    durations = [[_draw_duration(rng, 8.0, 0.6) for _ in range(size)] for _ in range(count)]
    jobs = [TraceJob(number * 400.0, duration) for number, burst in enumerate(durations) for duration in burst]
    slots = sum(slot_bound(burst, rps) for burst in durations) / count
    bound = max(slots, burst_bound(lognormal(8.0, 0.6), size, rps))
    learned = mean(run(jobs, 0.05, rps=rps))
    exponential = mean(run(jobs, 0.5, policy="exponential", rps=rps))
    table.single(
        f"bursts of {size} jobs at {rps:g} requests/s: mean delay ÷ lower bound", learned, bound, "s", must=1.4
    )
    table.single("the same, exponential", exponential, bound, "s")


class TwoProcesses(_Run):
    """A simulation with two processes: each learns from its own polls, and they share their models once a second."""

    def __init__(self, pace: Pace, seed: int) -> None:
        super().__init__(pace, lambda kind: DEADLINE, None, seed)
        self._rng = random.Random(seed)
        self._processes = [PaceModel(), PaceModel()]
        self._shared = PaceModel()
        self._share_at = 0.0

    def _arrive(self, number: int, trace: TraceJob) -> None:
        self._models[trace.kind] = self._rng.choice(self._processes)
        super()._arrive(number, trace)

    def _ask(self, job: _Job, now: float) -> None:
        if now >= self._share_at:
            self._share_at = now + 1.0
            for index, model in enumerate(self._processes):
                model.merge_into(self._shared)
                self._processes[index] = PaceModel.restored(self._shared.snapshot(), self._account)
            self._processes[0] = PaceModel.restored(self._shared.snapshot(), self._account)
        self._models[job.trace.kind] = self._rng.choice(self._processes)
        super()._ask(job, now)


def two_learning_processes(table: Table, traces: int = 60) -> None:
    """Measure short traces of a new kind with two learning processes, relative to one."""
    pace, delay_one, delay_two = Pace("learned", 0.5, 0.0), 0.0, 0.0
    for seed in range(traces):
        rng = random.Random(seed)
        jobs = [TraceJob(0.25 * number, _draw_duration(rng, 8.0, 0.6)) for number in range(300)]
        delay_one += mean(simulate(jobs, pace, deadline_for=lambda kind: DEADLINE, seed=seed)) / traces
        delay_two += mean(TwoProcesses(pace, seed).run(jobs)) / traces
    table.single(
        "300 jobs of a new kind, two processes that learn: mean delay ÷ with one", delay_two, delay_one, "s", must=1.05
    )
