"""The stand-in as a pure model: requests and times in, answers out. The seed decides everything else."""

from collections import Counter, OrderedDict, deque
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
    queue_full,
    unknown_id,
)
from worker.sandbox.charges import Charges
from worker.sandbox.families import API, FAMILIES, RECENT_OUTPUTS, Family, Target, family_of, request_of
from worker.sandbox.files import file_name
from worker.sandbox.jobs import SandboxJob, failed_answer, fetch_answer, submit_answer, success_answer
from worker.sandbox.options import MAX_OUTPUTS, SandboxOptions
from worker.sandbox.orders import extension_of, next_id, order_paths, prompt_of, samples_of
from worker.sandbox.rate_limit import RateLimit
from worker.sandbox.recent_outputs import recent_outputs
from worker.sandbox.scenarios import SCENARIOS, FetchCall, Scenario, check_scenario, scenario_of
from worker.sandbox.webhooks import NOT_CALLED, Webhook, is_local, webhook_of

MAX_JOBS = 50_000  # the oldest jobs are dropped first, as in the hosted API
DEFAULT_ORDER = "v3/text2img"

_PROXIED_SHARE = 0.35

JobKey = tuple[str, str]  # store and job id


class FoundOutput(NamedTuple):
    """An output: its job, its position, and the HTTP status of its URL."""

    job: SandboxJob
    position: int
    status: int


class Behaviour:
    """The jobs and the rate limit of one stand-in. Not thread-safe. The caller passes the time as `now`."""

    def __init__(self, options: SandboxOptions) -> None:
        self.options = options
        self.charges = Charges()
        self.next_orders: deque[Scenario] = deque()  # their `order` and `sent` apply to the next orders, in turn
        self._jobs: OrderedDict[JobKey, SandboxJob] = OrderedDict()
        self._files: dict[str, tuple[SandboxJob, int]] = {}
        self._orders = 0
        self._counts: Counter[str] = Counter()  # number of ids issued, by counter
        self._ready_fetches: Counter[JobKey] = Counter()  # fetches of jobs that were ready
        self._queue: list[float] = []  # ready times of the jobs that are not ready
        self._webhooks: list[tuple[float, int, SandboxJob]] = []
        self._rate_limit = RateLimit()

    def answer(self, path: str, body: Mapping[str, Any], *, now: float, origin: str, method: str = "POST") -> Answer:
        """Return the answer to a request. `origin` is the start of links in the answer."""
        request = request_of(path, body, method)
        if request is None:
            return no_such_route(path)
        if isinstance(request, Family):
            return self._order_answer(request, body, now=now, origin=origin)
        refusal = self._account_refusal(body, now)
        if refusal is not None:
            return refusal
        if isinstance(request, Target):
            return self._fetch_answer(request, now=now, origin=origin)
        if request == RECENT_OUTPUTS:
            return recent_outputs(reversed(self._jobs.values()), body, now=now, origin=origin)
        return json_answer(self._account_answer(request, now))

    def submit(
        self,
        prompt: str,
        *,
        samples: int | None = None,
        family: str = DEFAULT_ORDER,
        scenario: str = "",
        now: float,
        body: Mapping[str, Any] | None = None,
    ) -> SandboxJob:
        """Add a job that is ordered at a path below `/api/`. Raises ValueError for an unknown path or scenario."""
        ordered = family_of(family.removeprefix(API).strip("/"))
        if ordered is None:
            raise ValueError(f"the path of an order must be one of {', '.join(order_paths())}, not {family!r}")
        if scenario:
            check_scenario(scenario)
        return self._submit(ordered, prompt, samples or 0, scenario, now, body or {})

    def adopt(self, target: Target, *, submitted_at: float, scenario: str = "") -> SandboxJob:
        """Add a job with an id that was not issued here."""
        return self._submit(target.family, "", 0, scenario, submitted_at, {}, target.id)

    def cuts_next_order(self) -> bool:
        """Return whether the connection of the next order is closed before it is read, and count that order."""
        cuts = scenario_of(self.options.scenario(self._orders)).cut_early
        self._orders += cuts  # the next order takes the next scenario
        return cuts

    def job(self, job_id: str, store: str | None = None) -> SandboxJob | None:
        """Return the job with an id, if known. Without a store, return the oldest job with that id."""
        if store is not None:
            return self._jobs.get((store, job_id))
        keys = ((family.store, job_id) for family in FAMILIES)
        job = next((self._jobs[key] for key in keys if key in self._jobs), None)
        return job or next((job for (_, stored_id), job in self._jobs.items() if stored_id == job_id), None)

    def latest(self, count: int) -> list[SandboxJob]:
        """Return the newest jobs, newest first."""
        newest = reversed(self._jobs.values())
        return [job for job, _ in zip(newest, range(count), strict=False)]

    def file(self, name: str, *, now: float, proxy: bool = False) -> FoundOutput | None:
        """Return an output by its name. Its status is 404 until the job is ready."""
        entry = self._files.get(name)
        if entry is None:
            return None
        job, index = entry
        if not job.ready(now):
            return FoundOutput(job, index, 404)
        status_of = scenario_of(job.scenario).file
        return FoundOutput(job, index, (status_of(now - job.ready_at, proxy) if status_of else 0) or 200)

    def accepted(self, job: SandboxJob, *, now: float, origin: str) -> dict[str, Any]:
        """Return the answer to an order: the outputs if the job is ready, or else where to fetch them."""
        content = submit_answer(job, now=now, origin=origin, eta=self.options.eta)
        if job.webhook and not is_local(job.webhook) and "webhook_status" in content:
            content["webhook_status"] = NOT_CALLED
        modify = scenario_of(job.scenario).accepted
        return content if modify is None else modify(job, content, origin)

    def webhooks_due(self, now: float, origin: str) -> list[Webhook]:
        """Return the webhooks to call now. Each is returned once."""
        due = []
        while self._webhooks and self._webhooks[0][0] <= now:
            job = heappop(self._webhooks)[2]
            has_failed = job.fails or job.scenario == "failed"
            due.append(webhook_of(job, failed_answer(job) if has_failed else success_answer(job, origin)))
        return due

    @property
    def has_webhooks(self) -> bool:
        """Return whether webhooks are waiting for their time."""
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
    ) -> SandboxJob:
        options, store = self.options, family.store
        counter = family.counter or store
        number = self._orders
        self._orders += 1
        is_order = not job_id
        if is_order:
            job_id = next_id(family, options, self._counts[counter])
            self._counts[counter] += 1
        scenario = scenario or options.scenario(number)
        rng = Random(f"{options.seed or 0}|{number}")
        count = rng.randint(options.min_outputs, options.max_outputs) if family.makes == "png" else 1
        seconds = rng.uniform(options.min_seconds, options.max_seconds)
        fixed_seconds = scenario_of(scenario).seconds
        extension = extension_of(family, body)
        webhook = body.get("webhook")
        job = SandboxJob(
            id=job_id,
            number=number,
            family=family,
            prompt=prompt,
            submitted_at=now,
            ready_at=now + (seconds if fixed_seconds is None else fixed_seconds),
            fails=rng.random() < options.failure_rate,
            proxied=rng.random() < _PROXIED_SHARE,
            size=options.size,
            files=tuple(
                file_name(options.seed or 0, store, job_id, index=index, extension=extension)
                for index in range((samples or count) if family.makes else 0)
            ),
            scenario=scenario,
            webhook=webhook if isinstance(webhook, str) else "",
            track_id=body.get("track_id"),
        )
        self._jobs[store, job_id] = job
        self._files.update({name: (job, index) for index, name in enumerate(job.files)})
        heappush(self._queue, job.ready_at)
        if is_order:
            self.charges.charge(store, {**body, "prompt": prompt, "samples": samples}, self._queue_length(now))
        if job.webhook and is_local(job.webhook):
            heappush(self._webhooks, (job.ready_at, number, job))
        if len(self._jobs) > MAX_JOBS:
            key, oldest = self._jobs.popitem(last=False)
            self._ready_fetches.pop(key, None)
            for name in oldest.files:
                del self._files[name]
        return job

    def _account_refusal(self, body: Mapping[str, Any], now: float) -> Answer | None:
        """Return the answer to a call whose key or account is refused."""
        if body.get("key") != self.options.key:
            return invalid_key()
        scenarios = map(scenario_of, self.options.scenarios)
        refusal = self._rate_limit.refusal(self.options, now)
        return refusal or next((scenario.account() for scenario in scenarios if scenario.account is not None), None)

    def _order_answer(self, family: Family, body: Mapping[str, Any], *, now: float, origin: str) -> Answer:
        refusal = self._account_refusal(body, now) or self._order_refusal(family, body, now)
        if refusal is not None:
            self.charges.refused += 1
            return refusal
        samples = samples_of(body.get("samples")) if family.makes == "png" else 0
        job = self._submit(family, prompt_of(body), samples or 0, body.get("scenario", ""), now, body)
        status = 202 if family.shape == "workflow" else 200
        answer = json_answer(self.accepted(job, now=now, origin=origin), status=status)
        send = (self.next_orders.popleft() if self.next_orders else scenario_of(job.scenario)).sent
        return answer if send is None else send(answer)

    def _order_refusal(self, family: Family, body: Mapping[str, Any], now: float) -> Answer | None:
        requested = body.get("scenario", "")
        if requested and (not isinstance(requested, str) or requested not in SCENARIOS):
            return invalid_field("scenario", f"The scenario must be one of {', '.join(SCENARIOS)}.")
        if self.next_orders and (refuse_next := self.next_orders[0].order) is not None:
            self.next_orders.popleft()
            return refuse_next()
        refuse = scenario_of(requested or self.options.scenario(self._orders)).order
        if refuse is not None:
            self._orders += not requested  # the next order takes the next scenario
            return refuse()
        limit = self.options.queue_limit
        if limit and self._queue_length(now) >= limit:
            return queue_full(limit)
        if family.prompt and not prompt_of(body).strip():
            return invalid_field("prompt", "The prompt field is required.")
        if samples_of(body.get("samples")) is None:
            return invalid_field("samples", f"The samples field must be between 1 and {MAX_OUTPUTS}.")
        return None

    def _fetch_answer(self, target: Target, *, now: float, origin: str) -> Answer:
        key = (target.store, target.id)
        job = self._jobs.get(key)
        if job is None:
            if target.family.unknown_status == 404:
                text = "The specified ID does not exist or is not queued"
                return json_answer({"status": "error", "message": text}, status=404)
            return unknown_id()
        ready, body = now >= job.ready_at, fetch_answer(job, now=now, origin=origin)
        answer, answer_fetch = None, scenario_of(job.scenario).fetched
        if answer_fetch is not None:
            answer = answer_fetch(FetchCall(job, self._ready_fetches[key], ready, body, now, origin))
        self._ready_fetches[key] += ready
        return answer or json_answer(body)

    def _queue_length(self, now: float) -> int:
        while self._queue and self._queue[0] <= now:
            heappop(self._queue)
        return len(self._queue)

    def _account_answer(self, call: str, now: float) -> dict[str, Any]:
        queued = self._queue_length(now)
        match call:
            case "v3/system_load":
                seconds = ceil(max(self._queue, default=now) - now)
                return {"queue_num": queued, "queue_time": seconds, "status": "ok"}
            case "v6/processing/request_count":
                text = "Requests that are processed now"
                return {"status": "success", "processing_count": queued, "message": text}
            case _:
                return {"status": "success", "data": {"balance": 43.6, "currency": "USD"}}
