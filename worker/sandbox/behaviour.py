"""What the stand-in answers, as a pure model: calls and times come in, answers go out, the seed decides the rest."""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, isfinite
from random import Random
from typing import Any

from worker.sandbox.pictures import LARGEST, SMALLEST, picture_name

JOBS_KEPT = 50_000  # the oldest are forgotten first, as the real one forgets
MOST_OUTPUTS = 4

_ID = r"(?P<id>[A-Za-z0-9][A-Za-z0-9_-]{0,127})"
_PROXIED_SHARE = 0.35
_TIP = "This is the stand-in of the API: the waiting is real, the pictures are drawn here."
_REQUEST_TIP = "Send a POST request with the header Content-Type: application/json and one valid JSON object."
_KEY_TIP = _REQUEST_TIP + " Its key must be the one that the stand-in was started with."

LIMIT_STYLES = ("http429", "http200")


class Family(StrEnum):
    """Endpoints that share one kind of job and one place to fetch it from."""

    V3 = "v3"
    DREAMBOOTH = "dreambooth"
    V6 = "v6"


_SUBMIT_PATHS = {
    "/api/v3/text2img": Family.V3,
    "/api/v3/dreambooth": Family.DREAMBOOTH,
    "/api/v4/dreambooth": Family.DREAMBOOTH,
    "/api/v6/images/text2img": Family.V6,
}
_FETCH_BASES = {  # where `fetch_result` points; the version 4 answer really names a version 3 path
    Family.V3: "/api/v3/fetch/",
    Family.DREAMBOOTH: "/api/v3/dreambooth/fetch/",
    Family.V6: "/api/v6/images/fetch/",
}
_FETCH_BY_PATH = tuple((re.compile(re.escape(base) + _ID), family) for family, base in _FETCH_BASES.items())
_FETCH_BY_BODY = {"/api/v4/dreambooth/fetch": Family.DREAMBOOTH, "/api/v6/images/fetch": Family.V6}


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """How the stand-in behaves. Raises ValueError, with a sentence, for what makes no sense."""

    seed: int = 0
    min_seconds: float = 2.0  # a job is ready this long after its submission at the earliest
    max_seconds: float = 8.0
    min_outputs: int = 1  # pictures of a job whose submission has no `samples`
    max_outputs: int = 4
    key: str = "sandbox-key"
    rps: float = 0.0  # keyed calls per second before the limit answers; 0: no limit
    limit_style: str = "http429"
    size: int = 512  # pixels, both ways
    failure_rate: float = 0.0  # share of the jobs that end as failed
    eta: bool = True  # whether the answer to a submission has an estimate
    first_id: int = 12_202_888

    def __post_init__(self) -> None:
        if not (isfinite(self.max_seconds) and 0 <= self.min_seconds <= self.max_seconds):
            raise ValueError("seconds must be numbers from 0 up, the least not above the most")
        if not 1 <= self.min_outputs <= self.max_outputs <= MOST_OUTPUTS:
            raise ValueError(f"outputs must be between 1 and {MOST_OUTPUTS}, the least not above the most")
        if not self.key:
            raise ValueError("the key must not be empty")
        if not (isfinite(self.rps) and self.rps >= 0):
            raise ValueError("rps must be 0 (no limit) or more")
        if self.limit_style not in LIMIT_STYLES:
            raise ValueError(f"the limit style is one of {', '.join(LIMIT_STYLES)}")
        if not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"the size must be between {SMALLEST} and {LARGEST} pixels")
        if not 0 <= self.failure_rate <= 1:
            raise ValueError("the failure rate must be between 0 and 1")
        if self.first_id < 1:
            raise ValueError("the first id must be 1 or more")


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. A Content-Length of its own is sent as it stands, and the connection closed after it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    drip_seconds: float = 0.0  # between any two bytes of the body
    drip_headers: bool = False  # the headers come as slowly


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job; nothing about it is decided later."""

    id: str
    family: Family
    prompt: str
    submitted_at: float
    ready_at: float
    fails: bool
    proxied: bool
    size: int
    pictures: tuple[str, ...]

    def ready(self, now: float) -> bool:
        """Whether its pictures can be had."""
        return now >= self.ready_at and not self.fails

    def state(self, now: float) -> str:
        """The status in the words of the API."""
        if now < self.ready_at:
            return "processing"
        return "failed" if self.fails else "success"


def json_answer(content: Mapping[str, Any], status: int = 200) -> Answer:
    """An answer as the API gives nearly all of them: JSON, mostly with HTTP 200, whatever it says."""
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(content, separators=(",", ":")).encode())


def invalid_request() -> Answer:
    """For a call that is not POST, or has no JSON object."""
    return json_answer({"status": "error", "message": "Invalid API Request", "tip": _REQUEST_TIP})


def fetch_target(path: str, body: Mapping[str, Any]) -> tuple[Family, str] | None:
    """Which job a fetch call is about, or None where the path is no fetch path."""
    if path in _FETCH_BY_BODY:
        return _FETCH_BY_BODY[path], str(body.get("request_id", ""))
    for pattern, family in _FETCH_BY_PATH:
        if found := pattern.fullmatch(path):
            return family, found["id"]
    return None


def parse_body(content_type: str, raw: bytes) -> Mapping[str, Any] | None:
    """The JSON object of a call, or None where there is none that can be read."""
    if "application/json" not in content_type.lower():
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


class Behaviour:
    """The jobs and the request budget of one stand-in. Not for several threads at once; `now` never comes from here."""

    __slots__ = ("_allowance", "_counted_at", "_jobs", "_next_id", "_pictures", "options")

    def __init__(self, options: SandboxOptions) -> None:
        self.options = options
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._pictures: dict[str, tuple[Job, int]] = {}
        self._next_id = options.first_id
        self._allowance: float | None = None
        self._counted_at = 0.0

    def answer(self, path: str, body: Mapping[str, Any], *, now: float, origin: str) -> Answer:
        """The answer to a POST; `origin` is the address that links in it start with."""
        if body.get("key") != self.options.key:
            return json_answer({"status": "error", "message": "Invalid Api Key", "tip": _KEY_TIP})
        wait = self._over_limit(now)
        if wait:
            return self._limited(wait)
        if path == "/api/v3/system_load":
            return json_answer(self._load(now))
        if path in _SUBMIT_PATHS:
            return self._submitted(_SUBMIT_PATHS[path], body, now=now, origin=origin)
        target = fetch_target(path, body)
        if target is None:
            return json_answer({"status": "error", "message": "Not found"}, status=404)
        return self._fetched(*target, now=now, origin=origin)

    def submit(self, prompt: str, *, samples: int | None, family: Family, now: float) -> Job:
        """Take in a job."""
        options = self.options
        job_id = str(self._next_id)
        self._next_id += 1
        dice = Random(f"{options.seed}|{job_id}")
        drawn = dice.randint(options.min_outputs, options.max_outputs)
        job = Job(
            id=job_id,
            family=family,
            prompt=prompt,
            submitted_at=now,
            ready_at=now + dice.uniform(options.min_seconds, options.max_seconds),
            fails=dice.random() < options.failure_rate,
            proxied=dice.random() < _PROXIED_SHARE,
            size=options.size,
            pictures=tuple(picture_name(options.seed, job_id, index) for index in range(samples or drawn)),
        )
        self._jobs[job_id] = job
        self._pictures.update({name: (job, index) for index, name in enumerate(job.pictures)})
        if len(self._jobs) > JOBS_KEPT:
            _, forgotten = self._jobs.popitem(last=False)
            for name in forgotten.pictures:
                del self._pictures[name]
        return job

    def job(self, job_id: str) -> Job | None:
        """The job of an id, if it is known."""
        return self._jobs.get(job_id)

    def latest(self, count: int) -> list[Job]:
        """The youngest jobs, youngest first."""
        newest: list[Job] = []
        for job in reversed(self._jobs.values()):
            if len(newest) == count:
                break
            newest.append(job)
        return newest

    def picture(self, name: str, *, now: float) -> tuple[Job, int] | None:
        """The job and index of a picture that can be had now; a promised one is not there before its job is ready."""
        known = self._pictures.get(name)
        return known if known and known[0].ready(now) else None

    def accepted(self, job: Job, *, now: float, origin: str) -> dict[str, Any]:
        """The answer to a submission: the pictures at once where they are ready, else where to ask for them."""
        meta = {
            "prompt": job.prompt,
            "model_id": "stand-in",
            "negative_prompt": None,
            "W": job.size,
            "H": job.size,
            "steps": 20,
            "n_samples": len(job.pictures),
            "seed": Random(f"meta|{job.id}").randrange(2**32),
            "safety_checker": "no",
        }
        if job.ready(now):
            return {
                "status": "success",
                "generationTime": round(job.ready_at - job.submitted_at, 6),
                **_ready(job, origin),
                "nsfw_content_detected": False,
                "webhook_status": "",
                "meta": meta,
                "tip": _TIP,
            }
        estimate = (job.ready_at - now) * Random(f"eta|{job.id}").uniform(0.6, 1.6)
        return {
            "status": "processing",
            "tip": _TIP,
            **({"eta": round(estimate, 10)} if self.options.eta else {}),
            "messege": "Please fetch the result after the estimated seconds",
            "webhook_status": "",
            "fetch_result": f"{origin}{_FETCH_BASES[job.family]}{job.id}",
            "id": int(job.id),
            "output": [],
            "future_links": _links(job, origin),
            "meta": meta,
        }

    def _submitted(self, family: Family, body: Mapping[str, Any], *, now: float, origin: str) -> Answer:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            return _invalid_field("prompt", "The prompt field is required.")
        samples = _samples(body.get("samples"))
        if samples is None:
            return _invalid_field("samples", f"The samples field must be between 1 and {MOST_OUTPUTS}.")
        job = self.submit(prompt, samples=samples or None, family=family, now=now)
        return json_answer(self.accepted(job, now=now, origin=origin))

    def _fetched(self, family: Family, job_id: str, *, now: float, origin: str) -> Answer:
        job = self._jobs.get(job_id)
        if job is None or job.family is not family:
            return json_answer(
                {"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": _TIP}
            )
        if now < job.ready_at:
            label = "messege" if family is Family.DREAMBOOTH else "message"
            return json_answer({"status": "processing", label: "try again later.", "output": "", "tip": _TIP})
        if job.fails:
            return json_answer(
                {"status": "failed", "id": "", "message": "Processing failed: Invalid input dimensions", "output": ""}
            )
        return json_answer({"status": "success", **_ready(job, origin)})

    def _load(self, now: float) -> dict[str, Any]:
        waiting = [job.ready_at - now for job in self._jobs.values() if now < job.ready_at]
        return {"queue_num": len(waiting), "queue_time": ceil(max(waiting, default=0)), "status": "ok"}

    def _over_limit(self, now: float) -> float:
        """Seconds until the next call is allowed; 0 counts this one."""
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


def _invalid_field(name: str, complaint: str) -> Answer:
    return json_answer({"status": "error", "message": {name: [complaint]}})


def _samples(given: object) -> int | None:
    """How many pictures are wanted: 0 where nothing is said, None where it can't be."""
    if given is None or given == "":
        return 0
    if isinstance(given, str) and re.fullmatch("[0-9]{1,3}", given):
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= MOST_OUTPUTS:
        return given
    return None


def _ready(job: Job, origin: str) -> dict[str, Any]:
    proxies = {"proxy_links": [f"{origin}/cdn2/generations/{name}" for name in job.pictures]} if job.proxied else {}
    return {"id": int(job.id), "output": _links(job, origin), **proxies}


def _links(job: Job, origin: str) -> list[str]:
    return [f"{origin}/generations/{name}" for name in job.pictures]
