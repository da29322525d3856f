"""Stored outputs to move: in a folder or a bucket, with a file for each row."""

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, func, insert, select

from tests.rows import NOW, job_values, output_values
from tests.s3_servers import S3Server
from worker.settings import Settings
from worker.storage.base import name_of
from worker.storage.local import PARTIAL, path_of
from worker.storage.select import storage_of
from worker.store.schema import jobs, moved_files, outputs

ENDED = {"status": "completed", "due_at": None, "ready_at": NOW, "completed_at": NOW}


class PlantedFile(NamedTuple):
    """A file for an output, by its relative name."""

    name: str
    body: bytes


def body_of(number: int) -> bytes:
    """Return the content of the file of an output. Each is another one."""
    return f"picture {number} ".encode() * (1 + number % 400)


def plant_outputs(engine: Engine, root: str, count: int) -> list[PlantedFile]:
    """Insert `count` completed jobs with one stored output each, at locations below `root`. Return their files."""
    files, rows = [], []
    with engine.begin() as connection:
        first = int(connection.execute(select(func.coalesce(func.max(jobs.c.id), 0))).scalar_one()) + 1
        ids = range(first, first + count)
        connection.execute(insert(jobs), [{"id": number, **job_values(f"r{number}", **ENDED)} for number in ids])
        for number in ids:
            body = body_of(number)
            digest = hashlib.sha256(body).hexdigest()
            name = name_of(job_id=number, position=0, sha256=digest[:16], extension="png")
            files.append(PlantedFile(name, body))
            stored: dict[str, Any] = {
                "status": "stored",
                "due_at": None,
                "stored_at": datetime.now(UTC),
                "location": f"{root}/{name}",
                "size_bytes": len(body),
                "sha256": digest,
                "media_type": "image/png",
            }
            rows.append(output_values(number, **stored))
        connection.execute(insert(outputs), rows)
    return files


def write_files(folder: Path, files: Iterable[PlantedFile]) -> None:
    """Write files below a folder, which also gets the folder for partial files that each storage has."""
    (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.body)


def files_below(folder: Path) -> set[str]:
    """Return the locations of all files below a folder, partial files too."""
    return {f"file://{path}" for path in folder.rglob("*") if path.is_file()}


def objects_in(s3: S3Server, bucket: str) -> set[str]:
    """Return the locations of all objects in a bucket."""
    pages = s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", ())}


def assert_all_at(engine: Engine, settings: Settings, root: str, present: set[str], count: int) -> None:
    """Fail unless each output is stored below `root`, whole and once, and there is no other file."""
    with engine.connect() as connection:
        rows = connection.execute(select(outputs).order_by(outputs.c.id)).all()
        left_over = connection.execute(select(moved_files.c.location)).scalars().all()
    assert (len(rows), list(left_over)) == (count, [])
    for row in rows:
        assert row.status == "stored"
        assert row.location.startswith(f"{root}/")
        with storage_of(row.location, settings).open(row.location) as file:
            body = file.read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (row.size_bytes, row.sha256)
    assert present == {row.location for row in rows}


def remove_file(location: str) -> None:
    """Delete the file at a `file:` location."""
    path_of(location).unlink()
