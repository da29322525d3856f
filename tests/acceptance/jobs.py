"""Batches of jobs: made from a seed, sent by task name, waited for, and compared with what the hosted API knows."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.api import Job, Output, picture, spread
from tests.acceptance.hosted import Hosted
from tests.acceptance.report import Report
from tests.acceptance.stand import Stand, epoch, file_of, wait_until

TEMPORARY = (".", "tmp", "temp")  # how names begin or end that are not yet final
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Size:
    """How large a program's batch is."""

    jobs: int
    slowest: float  # the longest a job takes
    seed: int


def make_batch(size: Size, first_id: int) -> list[Job]:
    """Jobs of 1 to 4 outputs, ready 1 to `slowest` seconds from now; for the same size only the ids differ."""
    started = time.time()
    return [
        Job(
            remote_id=str(first_id + number),
            started=started,
            seconds=spread(size.seed, f"{number}/seconds", 1.0, size.slowest),
            outputs=(Output(),) * int(spread(size.seed, f"{number}/outputs", 1, 5)),
        )
        for number in range(size.jobs)
    ]


def track_by_name(stand: Stand, jobs: Iterable[Job], **named: object) -> list[Any]:
    """Send the jobs as a web app does that knows only the task's name; the promises of their ids."""
    return [
        stand.client.send_task("worker.track", [job.remote_id], named, queue="fetch-worker", ignore_result=False)
        for job in jobs
    ]


def rows_of(stand: Stand, jobs: Iterable[Job]) -> dict[str, dict[str, Any]]:
    """The rows of these jobs by their remote id."""
    wanted = {job.remote_id for job in jobs}
    return {row["remote_id"]: row for row in stand.rows("SELECT * FROM fetch_jobs") if row["remote_id"] in wanted}


def outputs_of(stand: Stand, remote_id: str) -> list[dict[str, Any]]:
    """The output rows of one job in their order."""
    return stand.rows(
        "SELECT o.* FROM fetch_outputs o JOIN fetch_jobs j ON o.job_id = j.id WHERE j.remote_id = :remote "
        "ORDER BY o.position",
        remote=remote_id,
    )


def wait_final(stand: Stand, jobs: Sequence[Job], seconds: float) -> bool:
    """Wait until all these jobs are in a final state."""

    def all_final() -> bool:
        rows = rows_of(stand, jobs)
        return len(rows) == len(jobs) and all(row["status"] in FINAL for row in rows.values())

    return wait_until(all_final, seconds, 0.5)


def seconds_taken(stand: Stand, jobs: Sequence[Job]) -> dict[str, float]:
    """From the start of each job at the hosted API to its completion here."""
    rows = rows_of(stand, jobs)
    return {
        job.remote_id: epoch(rows[job.remote_id]["completed_at"]) - job.started
        for job in jobs
        if job.remote_id in rows and rows[job.remote_id]["completed_at"]
    }


def check_completed(report: Report, stand: Stand, jobs: Sequence[Job]) -> None:
    """All jobs have one row and are completed, and no process died on the way."""
    rows = rows_of(stand, jobs)
    others = {job.remote_id: rows[job.remote_id]["status"] if job.remote_id in rows else "no row" for job in jobs}
    report.none_of(
        f"all {len(jobs)} jobs are completed", {key: value for key, value in others.items() if value != "completed"}
    )
    report.none_of("no process died by itself", stand.died())
    check_nothing_left_the_machine(report, stand)


def check_nothing_left_the_machine(report: Report, stand: Stand) -> None:
    """The guard that every process of the product carries has refused nothing."""
    report.none_of("no process tried to reach an address or a name outside this machine", stand.refused_connections())


def check_files(report: Report, stand: Stand, hosted: Hosted, jobs: Sequence[Job]) -> None:
    """Every output of these jobs is stored as one file that equals its source, and its row says so truly."""
    wrong, places = [], []
    for job in jobs:
        rows = outputs_of(stand, job.remote_id)
        if [row["position"] for row in rows] != list(range(len(job.outputs))):
            wrong.append(f"{job.remote_id}: {len(rows)} rows for {len(job.outputs)} outputs")
            continue
        for row in rows:
            source = picture(hosted.seed, job.remote_id, row["position"])
            fault = _fault(row, source)
            if fault:
                wrong.append(f"{job.remote_id}.{row['position']}: {fault}")
            places.append(row["location"])
    report.none_of("every file, its size and its sha256 equal the source", wrong)
    report.check("every output has a file of its own", len(set(places)) == len(places), f"{len(places)} outputs")


def _fault(row: dict[str, Any], source: bytes) -> str:
    if row["status"] != "stored":
        return f"{row['status']} {row['error_code']} {row['error_message']}"
    path = file_of(row["location"])
    if not path.is_file():
        return f"no file at {path}"
    if path.read_bytes() != source:
        return "the file differs from its source"
    said = (row["sha256"], row["size_bytes"], row["media_type"])
    true = (hashlib.sha256(source).hexdigest(), len(source), "image/png")
    return "" if said == true else f"the row says {said}, true is {true}"


def check_no_stray_files(report: Report, stand: Stand) -> None:
    """What lies in the storage is what the rows say, but for temporary names that a kill may leave."""
    places = {file_of(row["location"]) for row in stand.rows("SELECT location FROM fetch_outputs") if row["location"]}
    found = {path for path in stand.outputs.rglob("*") if path.is_file()}
    others = found - places
    stray = {path for path in others if not _is_temporary(path, stand.outputs)}
    report.figure("temporary files left", len(others) - len(stray))
    report.none_of("no file under a final name that no row points to", sorted(map(str, stray)))


def _is_temporary(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.lower().startswith(TEMPORARY) for part in parts) or path.suffix in (".part", ".tmp", ".partial")
