"""Batches of jobs: create them from a seed, track them by task name, wait for them, and check their results."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.api import ApiJob, ApiOutput, picture, spread
from tests.acceptance.api_process import ApiProcess
from tests.acceptance.deployment import Deployment, epoch, file_of, wait_until
from tests.acceptance.report import Report

TEMPORARY = (".", "tmp", "temp")  # prefixes of temporary file and folder names
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a batch of jobs."""

    jobs: int
    slowest: float  # the longest duration of a job, in seconds
    seed: int


def make_batch(size: Size, first_id: int) -> list[ApiJob]:
    """Return jobs with 1 to 4 outputs, ready in 1 to `slowest` seconds. Only the ids depend on `first_id`."""
    started = time.time()
    return [
        ApiJob(
            remote_id=str(first_id + number),
            started=started,
            seconds=spread(size.seed, f"{number}/seconds", 1.0, size.slowest),
            outputs=(ApiOutput(),) * int(spread(size.seed, f"{number}/outputs", 1, 5)),
        )
        for number in range(size.jobs)
    ]


def track_by_name(deployment: Deployment, jobs: Iterable[ApiJob], **options: object) -> list[Any]:
    """Track the jobs by task name, as a web app without the package does. Return the results."""
    return [
        deployment.client.send_task("worker.track", [job.remote_id], options, queue="fetch-worker", ignore_result=False)
        for job in jobs
    ]


def rows_of(deployment: Deployment, jobs: Iterable[ApiJob]) -> dict[str, dict[str, Any]]:
    """Return the rows of these jobs by remote id."""
    remote_ids = {job.remote_id for job in jobs}
    return {
        row["remote_id"]: row for row in deployment.rows("SELECT * FROM fetch_jobs") if row["remote_id"] in remote_ids
    }


def outputs_of(deployment: Deployment, remote_id: str) -> list[dict[str, Any]]:
    """Return the output rows of a job, ordered by position."""
    return deployment.rows(
        "SELECT o.* FROM fetch_outputs o JOIN fetch_jobs j ON o.job_id = j.id WHERE j.remote_id = :remote "
        "ORDER BY o.position",
        remote=remote_id,
    )


def wait_final(deployment: Deployment, jobs: Sequence[ApiJob], seconds: float) -> bool:
    """Wait until all these jobs are in a final state. Return whether they are."""

    def all_final() -> bool:
        rows = rows_of(deployment, jobs)
        return len(rows) == len(jobs) and all(row["status"] in FINAL for row in rows.values())

    return wait_until(all_final, seconds, 0.5)


def seconds_taken(deployment: Deployment, jobs: Sequence[ApiJob]) -> dict[str, float]:
    """Return the seconds from the start of each job at the API to its completion, by remote id."""
    rows = rows_of(deployment, jobs)
    return {
        job.remote_id: epoch(rows[job.remote_id]["completed_at"]) - job.started
        for job in jobs
        if job.remote_id in rows and rows[job.remote_id]["completed_at"]
    }


def check_completed(report: Report, deployment: Deployment, jobs: Sequence[ApiJob]) -> None:
    """Check that all jobs are completed and that no process exited by itself."""
    rows = rows_of(deployment, jobs)
    statuses = {job.remote_id: rows[job.remote_id]["status"] if job.remote_id in rows else "no row" for job in jobs}
    report.none_of(
        f"all {len(jobs)} jobs are completed", {key: value for key, value in statuses.items() if value != "completed"}
    )
    report.none_of("no process exited by itself", deployment.died())
    check_no_foreign_connections(report, deployment)


def check_no_foreign_connections(report: Report, deployment: Deployment) -> None:
    """Check that no process tried to connect to another machine."""
    report.none_of(
        "no process tried to reach an address or a name outside this machine", deployment.refused_connections()
    )


def check_files(report: Report, deployment: Deployment, api: ApiProcess, jobs: Sequence[ApiJob]) -> None:
    """Check that every output is stored as a file that equals its source, and that its row is correct."""
    faults, locations = [], []
    for job in jobs:
        rows = outputs_of(deployment, job.remote_id)
        if [row["position"] for row in rows] != list(range(len(job.outputs))):
            faults.append(f"{job.remote_id}: {len(rows)} rows for {len(job.outputs)} outputs")
            continue
        for row in rows:
            source = picture(api.seed, job.remote_id, row["position"])
            fault = _fault(row, source)
            if fault:
                faults.append(f"{job.remote_id}.{row['position']}: {fault}")
            locations.append(row["location"])
    report.none_of("every file, its size and its sha256 equal the source", faults)
    report.check("every output has its own file", len(set(locations)) == len(locations), f"{len(locations)} outputs")


def _fault(row: dict[str, Any], source: bytes) -> str:
    if row["status"] != "stored":
        return f"{row['status']} {row['error_code']} {row['error_message']}"
    path = file_of(row["location"])
    if not path.is_file():
        return f"no file at {path}"
    if path.read_bytes() != source:
        return "the file differs from its source"
    recorded = (row["sha256"], row["size_bytes"], row["media_type"])
    expected = (hashlib.sha256(source).hexdigest(), len(source), "image/png")
    return "" if recorded == expected else f"the row has {recorded}, expected {expected}"


def check_no_stray_files(report: Report, deployment: Deployment) -> None:
    """Check that the storage has no file without a row, except temporary files that a kill may leave."""
    locations = {
        file_of(row["location"]) for row in deployment.rows("SELECT location FROM fetch_outputs") if row["location"]
    }
    files = {path for path in deployment.outputs.rglob("*") if path.is_file()}
    unreferenced = files - locations
    stray = {path for path in unreferenced if not _is_temporary(path, deployment.outputs)}
    report.figure("temporary files left", len(unreferenced) - len(stray))
    report.none_of("no file with a final name is without a row", sorted(map(str, stray)))


def _is_temporary(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.lower().startswith(TEMPORARY) for part in parts) or path.suffix in (".part", ".tmp", ".partial")
