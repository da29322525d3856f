"""`move-storage` is killed at random moments and run again: every file and every row is there exactly once."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.moving import assert_all_at, files_below, objects_in, plant_outputs, write_files
from tests.s3_servers import S3Server
from tests.waiting import wait_until
from worker.settings import Settings

COUNT = 300
LONG_COUNT = 10_000
SLOW = """
import sys, time
from worker.cli import main
from worker.operations import move_storage

read = move_storage._read
move_storage._read = lambda *arguments: time.sleep(0.02) or read(*arguments)
main(sys.argv[1:])
"""  # the command, slowed down: otherwise it moves some hundred files faster than it can be killed


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server. The environment variables lead to it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


UseStorage = Callable[[str], Settings]


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", SLOW, "move-storage", "--yes", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _kill_again_and_again(count: Callable[[], int], rng: random.Random, *, kills: int, longest: float) -> None:
    """Kill the command `kills` times, at random moments after a copy. Then let it end. `count` counts copies."""
    killed = 0
    for _ in range(kills):
        killed += _killed(count, rng.uniform(0, longest))
    process = _start()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()
    assert killed > 0
    report = json.loads(out)
    print(f"{killed} kills, then {report['moved']} outputs were left")
    assert report["problems"] == []


def _killed(count: Callable[[], int], seconds: float) -> bool:
    """Kill the command some seconds after its first copy. Return False if it ended before."""
    before = count()
    process = _start()
    wait_until(lambda: process.poll() is not None or count() > before, "the command has copied a file")
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def _check_kills_between_folders(
    engine: Engine, folder: Path, use_storage: UseStorage, count: int, *, longest: float
) -> None:
    write_files(folder / "old", plant_outputs(engine, f"file://{folder}/old", count))
    settings = use_storage(f"file:{folder}/new")

    _kill_again_and_again(lambda: len(files_below(folder / "new")), random.Random(count), kills=3, longest=longest)

    assert_all_at(engine, settings, f"file://{folder}/new", files_below(folder / "new"), count)
    assert files_below(folder / "old") == set()


def _check_kills_with_s3(
    engine: Engine, folder: Path, s3: S3Server, use_storage: UseStorage, count: int, *, kills: int, longest: float
) -> None:
    """Move from a folder to a bucket, and back to another folder."""
    bucket, rng = s3.bucket(), random.Random(count)
    write_files(folder / "old", plant_outputs(engine, f"file://{folder}/old", count))
    settings = use_storage(f"s3://{bucket}/out")

    _kill_again_and_again(lambda: len(objects_in(s3, bucket)), rng, kills=kills, longest=longest)

    assert_all_at(engine, settings, f"s3://{bucket}/out", objects_in(s3, bucket), count)
    assert files_below(folder / "old") == set()
    settings = use_storage(f"file:{folder}/new")

    _kill_again_and_again(lambda: len(files_below(folder / "new")), rng, kills=kills, longest=longest)

    assert_all_at(engine, settings, f"file://{folder}/new", files_below(folder / "new"), count)
    assert objects_in(s3, bucket) == set()


def test_given_kills_at_random_moments_when_run_again_then_every_file_and_row_is_there_once(
    configured_sqlite: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    _check_kills_between_folders(configured_sqlite, tmp_path, use_storage, COUNT, longest=1.0)


@pytest.mark.server
def test_given_kills_while_moving_to_s3_and_back_then_every_file_and_row_is_there_once(
    configured_sqlite: Engine, tmp_path: Path, s3_environment: S3Server, use_storage: UseStorage
) -> None:
    _check_kills_with_s3(configured_sqlite, tmp_path, s3_environment, use_storage, COUNT // 2, kills=3, longest=1.2)


@pytest.mark.long
@pytest.mark.server
def test_ten_thousand_outputs_survive_kills_between_folders(
    database: Engine, tmp_path: Path, use_storage: UseStorage
) -> None:
    """On PostgreSQL."""
    _check_kills_between_folders(database, tmp_path, use_storage, LONG_COUNT, longest=6.0)


@pytest.mark.long
@pytest.mark.server
def test_ten_thousand_outputs_survive_kills_between_a_folder_and_s3(
    configured_sqlite: Engine, tmp_path: Path, s3_environment: S3Server, use_storage: UseStorage
) -> None:
    _check_kills_with_s3(configured_sqlite, tmp_path, s3_environment, use_storage, LONG_COUNT, kills=4, longest=15.0)
