"""Simulate a policy on a trace of jobs: the worker's own scheduling code on a virtual clock, without any requests.

A round trip takes no time. If requests are scarce, the worker's own rate limiter reserves them, and the due jobs are
ordered by urgency as in a claim. If slots are limited, an order waits until the polls have seen a job of the account
end, and polls are worth more while orders wait.
"""

import heapq
import json
import math
import random
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from worker.core.learned_rate import reserve_slots
from worker.core.pacing.backlog import COUNTED_MOST, OrderBacklog
from worker.core.pacing.policy import WINDOW, Pace, PacedJob, PaceModel, PollPlan, urgency
from worker.errors import TraceError

LOOK_SECONDS = 0.05  # the wait of a poll run if no more requests are allowed
MAX_SLOTS = 128  # requests that are reserved at once


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One job of a trace: submitted at `submitted` seconds, ready `duration` seconds later (None: never)."""

    submitted: float
    duration: float | None
    kind: str = "image"
    eta: float | None = None


@dataclass(slots=True)
class Simulation:
    """The result of a simulation. `delays` are the seconds from ready to seen, for the jobs that were seen ready.

    With a limited number of slots, `waits` are the seconds from the order to its start at the API.
    """

    jobs: int = 0
    polls: int = 0
    delays: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


def read_trace(lines: Iterable[str]) -> list[TraceJob]:
    """Return the jobs of a trace, which has one JSON object per line. Raises TraceError with the number of the line."""
    jobs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_trace_job(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise TraceError(
                    f'line {number} is not a job of a trace ({reason}); example: {{"t": 0.5, "duration": 8.2,'
                    ' "kind": "image", "eta": null}'
                ) from None
    return jobs


def _trace_job(fields: dict[str, object]) -> TraceJob:
    submitted, duration = _number(fields["t"], "t"), fields["duration"]
    kind, eta = fields.get("kind", "image"), fields.get("eta")
    if not isinstance(kind, str):
        raise ValueError("kind is not text")
    return TraceJob(
        submitted,
        None if duration is None else _number(duration, "duration"),
        kind,
        None if eta is None else _number(eta, "eta") or None,
    )


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is not a number of seconds")
    return float(value)


@dataclass(slots=True)
class _Job:
    """A running job: when it was last seen not ready, when it is due, and how its urgency grows."""

    number: int
    trace: TraceJob
    deadline: float
    not_ready_age: float = 0.0
    polls: int = 0
    since: float = 0.0  # `submitted + not_ready_age`
    plan: PollPlan = PollPlan(0.0)  # noqa: RUF009  # a tuple


def simulate(
    trace: Sequence[TraceJob],
    pace: Pace,
    *,
    deadline_for: Callable[[str], float],
    rps: float | None = None,
    slots: int | None = None,
    seed: int = 0,
) -> Simulation:
    """Simulate a trace with models that have learned nothing yet. `rps` is the limit of requests per second.

    `slots` is how many jobs may be at the API at once. The jobs of the trace are then ordered at their time, and start
    in this order.
    """
    return _Run(pace, deadline_for, rps, seed, slots).run(trace)


class _Slots:
    """The slots of the account: the moments at which each is free, and the orders that wait for one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free_from = [-math.inf] * count
        self._waiting: deque[tuple[int, TraceJob]] = deque()
        self._backlog = OrderBacklog()

    def order(self, number: int, trace: TraceJob) -> None:
        """Add an order."""
        self._waiting.append((number, trace))

    def release(self, moment: float) -> None:
        """Free the slot of a job whose end was seen at this moment."""
        heapq.heappush(self._free_from, moment)

    def startable(self) -> tuple[int, TraceJob, float] | None:
        """Take the next order that has a slot, with the moment from which it has one. None if there is none."""
        startable = None
        if self._waiting and self._free_from:
            number, trace = self._waiting.popleft()
            startable = (number, trace, max(trace.submitted, heapq.heappop(self._free_from)))
        self._backlog.set("", min(len(self._waiting), COUNTED_MOST), self._count)
        return startable

    def pace(self, pace: Pace) -> Pace:
        """Return the pace while these orders wait."""
        return self._backlog.pace(pace, "")


class _Run:
    def __init__(
        self,
        pace: Pace,
        deadline_for: Callable[[str], float],
        rps: float | None,
        seed: int,
        slots: int | None = None,
    ) -> None:
        self._usual_pace = pace
        self._deadline_for = deadline_for
        self._rps = rps
        self._random = random.Random(seed)
        self._account = PaceModel()
        self._models: dict[str, PaceModel] = {}
        self._future: list[tuple[float, int, _Job]] = []
        self._due: list[tuple[float, int, _Job]] = []
        self._done = Simulation()
        self._request_from = -math.inf  # from when the rate limiter has requests that are not reserved
        self._slots = None if slots is None else _Slots(slots)

    @property
    def _pace(self) -> Pace:
        return self._usual_pace if self._slots is None else self._slots.pace(self._usual_pace)

    def run(self, trace: Sequence[TraceJob]) -> Simulation:
        self._done.jobs = len(trace)
        arrivals = sorted(trace, key=lambda job: job.submitted)
        now, arrived = 0.0, 0
        while arrived < len(arrivals) or self._future or self._due:
            now = max(now, self._next_event(arrivals, arrived)) if not self._due else now
            while arrived < len(arrivals) and arrivals[arrived].submitted <= now:
                self._order(arrived, arrivals[arrived])
                arrived += 1
            while self._future and self._future[0][0] <= now:
                insort(self._due, heapq.heappop(self._future))
            if not self._due:
                continue
            if self._rps is None:
                for due, _, job in self._drained():
                    self._ask(job, max(due, now))
                continue
            reserved = reserve_slots(self._request_from, now, rate=self._rps, requested=min(MAX_SLOTS, len(self._due)))
            if reserved.count:
                self._request_from = reserved.free
                for place, job in enumerate(self._best(now, reserved.count)):
                    self._ask(job, now + max(0.0, reserved.first + place * reserved.step))
            now += max(LOOK_SECONDS, reserved.wait)
        return self._done

    def _next_event(self, arrivals: Sequence[TraceJob], arrived: int) -> float:
        moments = [arrivals[arrived].submitted] if arrived < len(arrivals) else []
        return min([*moments, self._future[0][0]] if self._future else moments)

    def _drained(self) -> list[tuple[float, int, _Job]]:
        drained, self._due = self._due, []
        return drained

    def _order(self, number: int, trace: TraceJob) -> None:
        """Start a job, or let it wait for a slot."""
        if self._slots is None:
            self._arrive(number, trace)
        else:
            self._slots.order(number, trace)
            self._start_orders(self._slots)

    def _start_orders(self, slots: _Slots) -> None:
        while (startable := slots.startable()) is not None:
            number, trace, moment = startable
            sent = self._sent(moment)
            self._done.waits.append(sent - trace.submitted)
            self._arrive(number, replace(trace, submitted=sent))

    def _sent(self, moment: float) -> float:
        """Return when an order that has a slot from `moment` on is sent, within the request rate."""
        if self._rps is None:
            return moment
        reserved = reserve_slots(self._request_from, moment, rate=self._rps, requested=1)
        if not reserved.count:
            moment += reserved.wait
            reserved = reserve_slots(self._request_from, moment, rate=self._rps, requested=1)
        self._request_from = reserved.free
        return moment + max(0.0, reserved.first)

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
        job.plan = plan
        heapq.heappush(self._future, (now + plan.wait, job.number, job))

    def _best(self, now: float, count: int) -> list[_Job]:
        """Take the most urgent due jobs from four windows, as a claim does."""
        due = self._due
        if count >= len(due):
            return [job for _, _, job in self._drained()]
        chosen = sorted(self._candidates(now), key=lambda place: (-_urgency(due[place][2], now), place))[:count]
        best = [due[place][2] for place in chosen]
        for place in sorted(chosen, reverse=True):
            del due[place]
        return best

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
        polled = PacedJob(age, job.not_ready_age, trace.eta, 0.0, job.polls, job.deadline - age)
        model = self._models[trace.kind]
        model.observe(polled, ready)
        if ready:
            self._account.note(polled)
            self._done.delays.append(age - (trace.duration or 0.0))
        elif age < job.deadline:
            job.not_ready_age, job.since = age, now
            waiting = PacedJob(age, age, trace.eta, 0.0, job.polls, job.deadline - age)
            self._plan(job, now, self._pace.next(waiting, model, spread=self._random.random()))
            return
        if self._slots is not None:
            self._slots.release(now)
            self._start_orders(self._slots)


def _urgency(job: _Job, now: float) -> float:
    return urgency(now - job.since, job.plan.scale, job.plan.growth)


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values by the nearest-rank method, or 0 if there are no values.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
