"""What a policy would do with a trace of jobs: the worker's own scheduling on a virtual clock, with nobody asked.

A round trip takes no time. Where requests are short the worker's own budget gives them out, and the same order of
urgency decides which of the due jobs get them as in a claim.
"""

import heapq
import json
import math
import random
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from worker.core.pacing.policy import WINDOW, Pace, PacedJob, PaceModel, PollPlan
from worker.core.rate import reserve_slots
from worker.errors import TraceError

LOOK_SECONDS = 0.05  # a poll run looks again after it, where the budget had no more
PLACES = 128


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One job of a trace: submitted at `submitted` seconds, ready `duration` seconds later (None: never)."""

    submitted: float
    duration: float | None
    kind: str = "image"
    eta: float | None = None


@dataclass(slots=True)
class Simulation:
    """What came of it. `delays` are the seconds from ready to seen, of the jobs that were seen ready."""

    jobs: int = 0
    polls: int = 0
    delays: list[float] = field(default_factory=list)


def read_trace(lines: Iterable[str]) -> list[TraceJob]:
    """The jobs of a trace, a JSON object a line. Raises TraceError, which names the line."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_trace_job(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as wrong:
                reason = f"it has no {wrong}" if isinstance(wrong, KeyError) else str(wrong)
                raise TraceError(
                    f'line {number} is no job of a trace ({reason}); for example {{"t": 0.5, "duration": 8.2,'
                    ' "kind": "image", "eta": null}'
                ) from None
    return found


def _trace_job(said: dict[str, object]) -> TraceJob:
    submitted, duration = _number(said["t"], "t"), said["duration"]
    kind, eta = said.get("kind", "image"), said.get("eta")
    if not isinstance(kind, str):
        raise ValueError("kind is no text")
    return TraceJob(
        submitted,
        None if duration is None else _number(duration, "duration"),
        kind,
        None if eta is None else _number(eta, "eta") or None,
    )


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is no number of seconds")
    return float(value)


@dataclass(slots=True)
class _Job:
    """A job under way: when it was last seen not ready, when it is due, and how its urgency grows."""

    number: int
    trace: TraceJob
    deadline: float
    not_ready_age: float = 0.0
    polls: int = 0
    since: float = 0.0  # `submitted + seen`
    growth: float = 0.0
    offset: float = 0.0


def simulate(
    trace: Sequence[TraceJob],
    pace: Pace,
    *,
    deadline_for: Callable[[str], float],
    rps: float | None = None,
    seed: int = 0,
) -> Simulation:
    """Runs a trace from a state in which nothing is known. `rps` is how many requests per second may be made."""
    return _Run(pace, deadline_for, rps, seed).over(trace)


class _Run:
    def __init__(self, pace: Pace, deadline_for: Callable[[str], float], rps: float | None, seed: int) -> None:
        self._pace = pace
        self._deadline_for = deadline_for
        self._rps = rps
        self._random = random.Random(seed)
        self._account = PaceModel()
        self._models: dict[str, PaceModel] = {}
        self._future: list[tuple[float, int, _Job]] = []
        self._due: list[tuple[float, int, _Job]] = []
        self._done = Simulation()

    def over(self, trace: Sequence[TraceJob]) -> Simulation:
        self._done.jobs = len(trace)
        arrivals = sorted(trace, key=lambda job: job.submitted)
        now, free, arrived = 0.0, -math.inf, 0
        while arrived < len(arrivals) or self._future or self._due:
            now = max(now, self._next_event(arrivals, arrived)) if not self._due else now
            while arrived < len(arrivals) and arrivals[arrived].submitted <= now:
                self._arrive(arrived, arrivals[arrived])
                arrived += 1
            while self._future and self._future[0][0] <= now:
                insort(self._due, heapq.heappop(self._future))
            if not self._due:
                continue
            if self._rps is None:
                for due, _, job in self._drained():
                    self._ask(job, max(due, now))
                continue
            found = reserve_slots(free, now, rate=self._rps, requested=min(PLACES, len(self._due)))
            if found.count:
                free = found.free
                for place, job in enumerate(self._best(now, found.count)):
                    self._ask(job, now + max(0.0, found.first + place * found.step))
            now += max(LOOK_SECONDS, found.wait)
        return self._done

    def _next_event(self, arrivals: Sequence[TraceJob], arrived: int) -> float:
        moments = [arrivals[arrived].submitted] if arrived < len(arrivals) else []
        return min([*moments, self._future[0][0]] if self._future else moments)

    def _drained(self) -> list[tuple[float, int, _Job]]:
        drained, self._due = self._due, []
        return drained

    def _arrive(self, number: int, trace: TraceJob) -> None:
        model = self._models.get(trace.kind)
        if model is None:
            model = self._models[trace.kind] = PaceModel.after(self._account)
        job = _Job(number, trace, self._deadline_for(trace.kind), since=trace.submitted)
        plan = self._pace.first(
            PacedJob(0.0, eta=trace.eta, seconds_left=job.deadline), model, spread=self._random.random()
        )
        self._plan(job, trace.submitted, plan)

    def _plan(self, job: _Job, now: float, plan: PollPlan) -> None:
        if plan.scale is not None and plan.growth is not None:
            job.growth, job.offset = plan.growth, plan.growth * math.log(plan.scale)
        heapq.heappush(self._future, (now + plan.wait, job.number, job))

    def _best(self, now: float, count: int) -> list[_Job]:
        """Takes the most urgent of the due jobs, out of four windows, as a claim does."""
        due = self._due
        if count >= len(due):
            return [job for _, _, job in self._drained()]
        chosen = sorted(self._candidates(now), key=lambda place: (-self._urgency(due[place][2], now), place))[:count]
        best = [due[place][2] for place in chosen]
        for place in sorted(chosen, reverse=True):
            del due[place]
        return best

    def _urgency(self, job: _Job, now: float) -> float:
        return job.growth * math.log(max(now - job.since, 0.001)) - job.offset

    def _candidates(self, now: float) -> Iterable[int]:
        due = self._due
        if len(due) <= 4 * WINDOW:
            return range(len(due))
        oldest = due[0][0]
        places = set(range(WINDOW)) | set(range(len(due) - WINDOW, len(due)))
        for _ in range(2):
            end = bisect_right(due, (oldest + (now - oldest) * self._random.random(), math.inf))
            places.update(range(max(0, end - WINDOW), end))
        return places

    def _ask(self, job: _Job, now: float) -> None:
        trace = job.trace
        age = now - trace.submitted
        job.polls += 1
        self._done.polls += 1
        ready = trace.duration is not None and age >= trace.duration
        asked = PacedJob(age, job.not_ready_age, trace.eta, 0.0, job.polls, job.deadline - age)
        model = self._models[trace.kind]
        model.observe(asked, ready)
        if ready:
            self._account.note(asked)
            self._done.delays.append(age - (trace.duration or 0.0))
        elif age < job.deadline:
            job.not_ready_age, job.since = age, now
            waiting = PacedJob(age, age, trace.eta, 0.0, job.polls, job.deadline - age)
            self._plan(job, now, self._pace.next(waiting, model, spread=self._random.random()))


def quantile(values: Sequence[float], share: float) -> float:
    """A quantile of sorted values, by the nearest rank; 0 where there are none.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
