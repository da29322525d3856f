"""What the stand-in answers, as a pure model: calls and times come in, answers go out, the seed decides the rest."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from heapq import heappop, heappush
from math import ceil
from random import Random
from typing import Any, NamedTuple

from worker.sandbox.answers import (
    Answer,
    invalid_field,
    invalid_key,
    json_answer,
    no_such_route,
    unknown_id,
)
from worker.sandbox.families import FAMILIES, Family, Target, family_of, target_of
from worker.sandbox.files import file_name
from worker.sandbox.jobs import Job, accepted, done, failed, waiting
from worker.sandbox.options import MOST_OUTPUTS, PLANS, SandboxOptions
from worker.sandbox.orders import extension_of, next_id, orders, samples_of
from worker.sandbox.scenarios import SCENARIOS, Look, Scenario, check_scenario
from worker.sandbox.webhooks import NOT_CALLED, Webhook, is_local, webhook_of

JOBS_KEPT = 50_000  # the oldest are forgotten first, as the real one forgets
DEFAULT_ORDER = "v3/text2img"

_PROXIED_SHARE = 0.35
_API = "/api/"
_USUAL = Scenario(about="as usual")

Place = tuple[str, str]  # a store and the id of a job in it


class Found(NamedTuple):
    """An output: its job, its place in it, and the HTTP status that its address answers."""

    job: Job
    position: int
    status: int


def fetch_target(path: str, body: Mapping[str, Any], method: str = "POST") -> Target | None:
    """Return the job that a call is about, or None where its path is no fetch path."""
    return target_of(path.removeprefix(_API), body, method) if path.startswith(_API) else None


class Behaviour:
    """The jobs and the request budget of one stand-in. Not for several threads at once; `now` never comes from here."""

    def __init__(self, options: SandboxOptions) -> None:
        self.options = options
        self._jobs: OrderedDict[Place, Job] = OrderedDict()
        self._files: dict[str, tuple[Job, int]] = {}
        self._orders = 0
        self._counts: Counter[str] = Counter()  # ids given out, by counter
        self._turns: Counter[Place] = Counter()  # fetches of jobs that were ready
        self._queue: list[float] = []  # when the jobs that wait are ready
        self._webhooks: list[tuple[float, int, Job]] = []
        self._allowance: float | None = None
        self._counted_at = 0.0

    def answer(self, path: str, body: Mapping[str, Any], *, now: float, origin: str, method: str = "POST") -> Answer:
        """Return the answer to a call; `origin` is the address that links in it start with."""
        route, target = path.removeprefix(_API), fetch_target(path, body, method)
        family = family_of(route) if path.startswith(_API) and method == "POST" and target is None else None
        account = _ACCOUNT_CALLS.get(route)
        if target is None and family is None and account is None:
            return no_such_route(path)
        if body.get("key") != self.options.key:
            return invalid_key()
        wait = self._over_limit(now)
        if wait:
            return self._limited(wait)
        for name in self.options.scenarios:
            scenario = SCENARIOS[name]
            if scenario.account is not None:
                return scenario.account()
        if account is not None:
            return json_answer(account(self, now))
        if target is not None:
            return self._fetched(target, now=now, origin=origin)
        return no_such_route(path) if family is None else self._ordered(family, body, now=now, origin=origin)

    def submit(
        self,
        prompt: str,
        *,
        samples: int | None = None,
        family: str = DEFAULT_ORDER,
        scenario: str = "",
        now: float,
        body: Mapping[str, Any] | None = None,
    ) -> Job:
        """Take in a job that is ordered at a path below `/api/`. Raises ValueError for what is not known."""
        row = family_of(family.removeprefix(_API).strip("/"))
        if row is None:
            raise ValueError(f"the path of an order must be one of {', '.join(orders())}, not {family!r}")
        if scenario:
            check_scenario(scenario)
        return self._submit(row, prompt, samples or 0, scenario, now, body or {})

    def adopt(self, target: Target, *, submitted_at: float, scenario: str = "") -> Job:
        """Take in a job under an id that was not given out here."""
        return self._submit(target.family, "", 0, scenario, submitted_at, {}, target.id)

    def job(self, job_id: str, store: str | None = None) -> Job | None:
        """Return the job of an id, if it is known; without a store, the oldest one of that id."""
        if store is not None:
            return self._jobs.get((store, job_id))
        places = ((family.store, job_id) for family in FAMILIES)
        named = next((self._jobs[place] for place in places if place in self._jobs), None)
        return named or next((job for (_, kept), job in self._jobs.items() if kept == job_id), None)

    def latest(self, count: int) -> list[Job]:
        """Return the youngest jobs, youngest first."""
        newest = reversed(self._jobs.values())
        return [job for job, _ in zip(newest, range(count), strict=False)]

    def file(self, name: str, *, now: float, proxy: bool = False) -> Found | None:
        """Return an output by its name; a promised one has status 404 until its job is ready."""
        known = self._files.get(name)
        if known is None:
            return None
        job, index = known
        if not job.ready(now):
            return Found(job, index, 404)
        trick = SCENARIOS.get(job.scenario, _USUAL).file
        return Found(job, index, (trick(now - job.ready_at, proxy) if trick else 0) or 200)

    def accepted(self, job: Job, *, now: float, origin: str) -> dict[str, Any]:
        """Return the answer to an order: the outputs at once where they are ready, else where to ask for them."""
        content = accepted(job, now=now, origin=origin, eta=self.options.eta)
        if job.webhook and not is_local(job.webhook) and "webhook_status" in content:
            content["webhook_status"] = NOT_CALLED
        change = SCENARIOS.get(job.scenario, _USUAL).accepted
        return content if change is None else change(job, content, origin)

    def webhooks_due(self, now: float, origin: str) -> list[Webhook]:
        """Return the webhooks that are to be called now, each once."""
        due = []
        while self._webhooks and self._webhooks[0][0] <= now:
            job = heappop(self._webhooks)[2]
            ends = job.fails or job.scenario == "failed"
            due.append(webhook_of(job, failed(job) if ends else done(job, origin)))
        return due

    @property
    def webhooks_wait(self) -> bool:
        """Return whether a webhook is to be called later."""
        return bool(self._webhooks)

    def _submit(
        self,
        family: Family,
        prompt: str,
        samples: int,
        scenario: str,
        now: float,
        body: Mapping[str, Any],
        job_id: str = "",
    ) -> Job:
        options, store = self.options, family.store
        counter = family.counter or store
        number = self._orders
        self._orders += 1
        if not job_id:
            job_id = next_id(family, options, self._counts[counter])
            self._counts[counter] += 1
        if not scenario and options.scenarios:
            scenario = options.scenarios[number % len(options.scenarios)]
        dice = Random(f"{options.seed or 0}|{number}")
        drawn = dice.randint(options.min_outputs, options.max_outputs) if family.makes == "png" else 1
        seconds = dice.uniform(options.min_seconds, options.max_seconds)
        told = SCENARIOS.get(scenario, _USUAL).seconds
        extension = extension_of(family, body)
        webhook = body.get("webhook")
        job = Job(
            id=job_id,
            number=number,
            family=family,
            prompt=prompt,
            submitted_at=now,
            ready_at=now + (seconds if told is None else told),
            fails=dice.random() < options.failure_rate,
            proxied=dice.random() < _PROXIED_SHARE,
            size=options.size,
            files=tuple(
                file_name(options.seed or 0, store, job_id, index=index, extension=extension)
                for index in range((samples or drawn) if family.makes else 0)
            ),
            scenario=scenario,
            webhook=webhook if isinstance(webhook, str) else "",
            track_id=body.get("track_id"),
        )
        self._jobs[store, job_id] = job
        self._files.update({name: (job, index) for index, name in enumerate(job.files)})
        heappush(self._queue, job.ready_at)
        if job.webhook and is_local(job.webhook):
            heappush(self._webhooks, (job.ready_at, number, job))
        if len(self._jobs) > JOBS_KEPT:
            place, forgotten = self._jobs.popitem(last=False)
            self._turns.pop(place, None)
            for name in forgotten.files:
                del self._files[name]
        return job

    def _ordered(self, family: Family, body: Mapping[str, Any], *, now: float, origin: str) -> Answer:
        named = body.get("scenario", "")
        if named and (not isinstance(named, str) or named not in SCENARIOS):
            return invalid_field("scenario", f"The scenario must be one of {', '.join(SCENARIOS)}.")
        ahead = named or (
            self.options.scenarios[self._orders % len(self.options.scenarios)] if self.options.scenarios else ""
        )
        refusal = SCENARIOS.get(ahead, _USUAL).order
        if refusal is not None:
            self._orders += not named  # the next order takes the next scenario
            return refusal()
        most, queued = PLANS[self.options.plan], self._queued(now)
        if most and queued >= most:
            text = f"Rate limit exceeded. Maximum {most} queued requests allowed."
            wait = max(1, ceil(min(self._queue[0] - now, 30)))
            return json_answer({"status": "error", "message": text, "retry_after": wait}, status=429)
        prompt = body.get("prompt", body.get("text", ""))
        prompt = prompt if isinstance(prompt, str) else ""
        if family.prompt and not prompt.strip():
            return invalid_field("prompt", "The prompt field is required.")
        samples = samples_of(body.get("samples"))
        if samples is None:
            return invalid_field("samples", f"The samples field must be between 1 and {MOST_OUTPUTS}.")
        job = self._submit(family, prompt, samples if family.makes == "png" else 0, named, now, body)
        return json_answer(
            self.accepted(job, now=now, origin=origin), status=202 if family.shape == "workflow" else 200
        )

    def _fetched(self, target: Target, *, now: float, origin: str) -> Answer:
        place = (target.store, target.id)
        job = self._jobs.get(place)
        if job is None:
            if target.family.unknown_status == 404:
                text = "The specified ID does not exist or is not queued"
                return json_answer({"status": "error", "message": text}, status=404)
            return unknown_id()
        ready = now >= job.ready_at
        usual = waiting(job, now=now) if not ready else failed(job) if job.fails else done(job, origin)
        play = SCENARIOS.get(job.scenario, _USUAL).fetched
        answer = None if play is None else play(Look(job, self._turns[place], ready, usual, now, origin))
        self._turns[place] += ready
        return answer or json_answer(usual)

    def _queued(self, now: float) -> int:
        while self._queue and self._queue[0] <= now:
            heappop(self._queue)
        return len(self._queue)

    def _load(self, now: float) -> dict[str, Any]:
        return {"queue_num": self._queued(now), "queue_time": ceil(max(self._queue, default=now) - now), "status": "ok"}

    def _count(self, now: float) -> dict[str, Any]:
        return {
            "status": "success",
            "processing_count": self._queued(now),
            "message": "Requests that are processed now",
        }

    def _balance(self, now: float) -> dict[str, Any]:
        return {"status": "success", "data": {"balance": 43.6, "currency": "USD"}}

    def _over_limit(self, now: float) -> float:
        """Return the seconds until the next call is allowed; 0 counts this one."""
        rate = self.options.rps
        if not rate:
            return 0.0
        most = max(1.0, rate)  # one second's worth may come at once
        passed = max(0.0, now - self._counted_at)
        left = most if self._allowance is None else min(most, self._allowance + passed * rate)
        self._counted_at = now
        self._allowance = left - 1 if left >= 1 else left
        return 0.0 if left >= 1 else (1 - left) / rate

    def _limited(self, wait: float) -> Answer:
        seconds = max(1, ceil(wait))
        if self.options.limit_style == "http429":
            text = f"Rate limit exceeded. At most {self.options.rps:g} requests per second are allowed."
            return json_answer({"status": "error", "message": text, "retry_after": seconds}, status=429)
        tips = f"too many requests in a short time, please wait for {seconds} seconds and try again"
        return json_answer({"status": "error", "message": "Rate limit exceeded", "tips": tips, "retry_after": seconds})


_ACCOUNT_CALLS = {
    "v3/system_load": Behaviour._load,
    "v6/processing/request_count": Behaviour._count,
    "wallet_balance": Behaviour._balance,
}
