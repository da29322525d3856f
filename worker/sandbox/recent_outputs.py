"""The list of recent outputs of the account: the jobs that are ready, newest first, in pages."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from worker.sandbox.answers import Answer, invalid_field, json_answer
from worker.sandbox.jobs import SandboxJob

PER_PAGE = 20
TYPES = {"image": ("png",), "video": ("mp4",), "audio": ("wav",)}  # type in the request -> what the families make


def recent_outputs(jobs: Iterable[SandboxJob], body: Mapping[str, Any], *, now: float, origin: str) -> Answer:
    """Return one page of the list. `jobs` are all jobs, newest first; `body` has the type, and the page if not 1."""
    output_type, page = body.get("type", "image"), body.get("page", 1)
    if not isinstance(output_type, str) or output_type not in TYPES:
        return invalid_field("type", f"The type must be one of {', '.join(TYPES)}.")
    if type(page) is not int or page < 1:
        return invalid_field("page", "The page must be a number above 0.")
    listed = [job for job in jobs if job.family.makes in TYPES[output_type] and job.ready(now) and job.files]
    start = (page - 1) * PER_PAGE
    return json_answer(
        {
            "status": "success",
            "current_page": page,
            "data": [_entry(job, origin) for job in listed[start : start + PER_PAGE]],
            "last_page": max(1, -(-len(listed) // PER_PAGE)),
            "per_page": PER_PAGE,
            "total": len(listed),
        }
    )


def _entry(job: SandboxJob, origin: str) -> dict[str, Any]:
    created_at = datetime.fromtimestamp(job.submitted_at, UTC).isoformat(timespec="seconds")
    return {"id": job.answer_id, "output": job.links(origin), "created_at": created_at}
