"""A job of the stand-in, and the answers of its family: to the order, while it is processing, and when it is done."""

from dataclasses import dataclass
from math import isfinite
from random import Random
from typing import Any

from worker.sandbox.answers import TIP
from worker.sandbox.families import Family

TRAINING_STATES = (
    "deploying_gpu",
    "training_started",
    "training_success",
    "trained_model_compressing",
    "trained_model_uploading",
    "trained_model_uploaded",
    "deploying_model",
)


@dataclass(frozen=True, slots=True)
class SandboxJob:
    """A submitted job. Everything about it is decided at submission."""

    id: str
    number: int  # sequence number of the order, over all families
    family: Family
    prompt: str
    submitted_at: float
    ready_at: float
    fails: bool
    proxied: bool
    size: int
    files: tuple[str, ...]
    scenario: str = ""
    webhook: str = ""
    track_id: object = None

    def ready(self, now: float) -> bool:
        """Return whether its outputs are available."""
        return now >= self.ready_at and not self.fails

    def state(self, now: float) -> str:
        """Return the status as the API names it."""
        if now < self.ready_at:
            return "processing"
        return "failed" if self.fails else "success"

    @property
    def answer_id(self) -> int | str:
        """The id as it appears in answers: mostly a number."""
        return self.id if self.family.text_ids or not self.id.isdecimal() else int(self.id)

    def links(self, origin: str) -> list[str]:
        """Return the URLs of its outputs."""
        return [f"{origin}/generations/{name}" for name in self.files]

    def proxy_links(self, origin: str) -> list[str]:
        """Return the alternative URLs of its outputs, below the proxy path."""
        return [f"{origin}/cdn2/generations/{name}" for name in self.files]

    def fetch_result(self, origin: str) -> str:
        """Return the URL at which the job is fetched."""
        return f"{origin}/api/{self.family.fetch[0].replace('{id}', self.id)}"


def submit_answer(job: SandboxJob, *, now: float, origin: str, eta: bool = True) -> dict[str, Any]:
    """Return the answer to an order: the outputs if the job is ready, or else where to fetch them."""
    family, shape = job.family, job.family.shape
    if shape == "training":
        wait = f"it takes about {_seconds(job, job.submitted_at)} seconds"
        return {"status": "success", family.label: TRAINING_STATES[0], "data": wait, "training_id": job.id}
    if shape == "workflow":
        name = family.store.split("/")[-2]
        run: dict[str, Any] = {"status": "success", "execution_id": job.answer_id, "workflow_id": name}
        return {**run, "status_url": job.fetch_result(origin)}
    if job.ready(now):
        extra = {"nsfw_content_detected": False} if family.makes == "png" else {}
        timing = {"generationTime": round(job.ready_at - job.submitted_at, 6)}
        return {**success_answer(job, origin), **timing, **extra, "webhook_status": "", "meta": meta(job), "tip": TIP}
    estimate = {"eta": _eta(job, now)} if eta else {}
    if shape == "chat":
        return {"status": "processing", **estimate, "meta": {"chat_id": job.id}}
    if shape == "task":
        links = {"links": job.links(origin), "proxy_links": job.proxy_links(origin), "fileId": job.files[0]}
        return {**estimate, **links, family.label: "Request has been queued", "meta": meta(job), "seconds": None,
                "status": "queued", "taskId": job.id}  # fmt: skip
    return {
        "status": "processing",
        "tip": TIP,
        **estimate,
        family.label: "Please fetch the result after the estimated seconds",
        "webhook_status": "",
        **({"fetch_result": job.fetch_result(origin)} if family.fetch_result else {}),
        **({} if shape == "nameless" else {"id": job.answer_id}),
        "output": list(family.no_output) if isinstance(family.no_output, tuple) else family.no_output,
        **({"future_links": job.links(origin)} if family.promises else {}),
        "meta": meta(job),
    }


def processing_answer(job: SandboxJob, *, now: float) -> dict[str, Any]:
    """Return the answer to a fetch before the job is ready. It has no id, no estimate, and empty text as output."""
    if job.family.shape == "training":
        elapsed, duration = now - job.submitted_at, job.ready_at - job.submitted_at
        share = elapsed / duration if isfinite(duration) and duration > 0 else 0.0
        return _training(job, TRAINING_STATES[min(int(share * len(TRAINING_STATES)), len(TRAINING_STATES) - 1)])
    if job.family.shape == "workflow":
        state = "pending" if now - job.submitted_at < 1 else "running"
        return {"status": "success", "execution": {"id": job.answer_id, "status": state}}
    return {"status": "processing", job.family.fetch_label: "try again later.", "output": "", "tip": TIP}


def fetch_answer(job: SandboxJob, *, now: float, origin: str) -> dict[str, Any]:
    """Return the usual answer to a fetch."""
    if now < job.ready_at:
        return processing_answer(job, now=now)
    return failed_answer(job) if job.fails else success_answer(job, origin)


def failed_answer(job: SandboxJob, message: str = "Processing failed: Invalid input dimensions") -> dict[str, Any]:
    """Return the answer about a failed job."""
    if job.family.shape == "training":
        return {**_training(job, "training_failed"), "data": f"Training failed: {message}"}
    if job.family.shape == "workflow":
        return {"status": "success", "execution": {"id": job.answer_id, "status": "failed", "error": message}}
    return {"status": "failed", "id": "", "message": message, "output": ""}


def success_answer(job: SandboxJob, origin: str) -> dict[str, Any]:
    """Return the answer about a job with outputs, in the form of its family."""
    family = job.family
    if family.shape == "training":
        return _training(job, "model_ready")
    if family.shape == "workflow":
        result = {"status": "success", "output": job.links(origin), "proxy_links": job.proxy_links(origin)}
        return {"status": "success", "execution": {"id": job.answer_id, "status": "completed", "output": result}}
    links = job.links(origin)
    answer: dict[str, Any] = {"status": "success"}
    if family.shape == "chat":
        answer["meta"] = {"chat_id": job.id}
    elif family.makes == "glb":
        answer["id"] = None  # as in the documentation of the enterprise server
    elif family.shape != "task":
        answer["id"] = job.answer_id
    single = family.output == "text" and len(links) == 1
    answer["links" if family.output == "links" else "output"] = links[0] if single else links
    return answer | _proxies(job, origin)


def _proxies(job: SandboxJob, origin: str) -> dict[str, Any]:
    links = job.proxy_links(origin)
    match job.family.proxies:
        case "null":
            return {"proxy_links": None}
        case "object":
            return {"proxy_links": {str(index): link for index, link in enumerate(links)}}
        case "text" if len(links) == 1:
            return {"proxy_links": links[0]}
        case "list" if job.proxied:
            return {"proxy_links": links}
        case _:
            return {}


def meta(job: SandboxJob) -> dict[str, Any]:
    """Return the part of an answer that repeats the order."""
    return {
        "prompt": job.prompt,
        "model_id": "stand-in",
        "negative_prompt": None,
        "W": job.size,
        "H": job.size,
        "steps": 20,
        "n_samples": len(job.files),
        "seed": Random(f"meta|{job.number}").randrange(2**32),
        "safety_checker": "no",
    }


def _training(job: SandboxJob, state: str) -> dict[str, Any]:
    """Return the state of a training. Its top status is always `success`; documents differ on the name of the state."""
    name = "model_training_status" if job.number % 2 else job.family.label
    return {"status": "success", name: state, "data": "the training is in progress", "training_id": job.id}


def _eta(job: SandboxJob, now: float) -> float:
    if job.family.eta is not None:
        return job.family.eta
    return round(_seconds(job, now) * Random(f"eta|{job.number}").uniform(0.6, 1.6), 10)


def _seconds(job: SandboxJob, now: float) -> float:
    return job.ready_at - now if isfinite(job.ready_at) else 60.0
