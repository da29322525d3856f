"""`fetch-worker up` as an operator runs it: errors are one line, and are reported before any process starts."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis

from worker.launch.procfile import own_procfile
from worker.launch.up import procfile
from worker.settings import Settings

pytestmark = [pytest.mark.every_python, pytest.mark.usefixtures("interruptible")]

UP = (sys.executable, "-c", "from worker.cli import main; main()", "up")
TIMEOUT_SECONDS = 60
PROCFILE = """\
# stands in for worker.app
release: python -c "print('migrated')"
worker: python -c "import os, time; print(os.environ['REDIS_URL'], os.environ.get('SD_API_KEY')); time.sleep(60)"
downloads: python -c "import os, time; print('the key is', os.environ.get('SD_API_KEY')); time.sleep(60)"
"""


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    names = {name.upper() for name in Settings.model_fields}
    return (
        {name: value for name, value in os.environ.items() if name not in names}
        | {"LOG_FORMAT": "text"}
        | dict(changes)
    )


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"SD_API_RPS": "many"}, 2, "SD_API_RPS is wrong"),
        ({"REDIS_URL": "redis://:secret@127.0.0.1:1/0"}, 1, "check REDIS_URL"),
        ({"DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x"}, 1, "check DATABASE_URL"),
        ({"BROKER_URL": "amqp://u:secret@127.0.0.1:1//"}, 1, "check BROKER_URL"),
    ],
)
def test_an_error_is_one_line_without_secrets_and_nothing_is_started(
    tmp_path: Path, changes: Mapping[str, str], code: int, message: str
) -> None:
    (tmp_path / "Procfile").write_text(PROCFILE)

    result = subprocess.run(
        UP, cwd=tmp_path, env=environment(changes), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )

    assert result.returncode == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert "secret" not in result.stderr


def test_without_settings_it_starts_redis_reports_the_missing_key_and_stops_on_a_signal(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text(PROCFILE)

    with subprocess.Popen(UP, cwd=tmp_path, env=environment({}), stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        lines = [up.stdout.readline()]
        while not any(line.startswith("worker") for line in lines):
            lines.append(up.stdout.readline())
        answered = redis.Redis(unix_socket_path=str(tmp_path / "var" / "redis.sock")).ping()
        up.send_signal(signal.SIGINT)
        lines += up.stdout.readlines()

    assert up.returncode == 0
    assert answered
    assert "no API key" in lines[0]
    assert "SD_API_KEY" in lines[0]
    assert f"DATABASE_URL is not set: all processes use the file {tmp_path}/var/worker.db\n" in lines[1]
    assert "release   | migrated\n" in lines
    assert f"worker    | redis+socket://{tmp_path}/var/redis.sock None\n" in lines
    assert not (tmp_path / "var" / "redis.sock").exists()


def test_given_a_half_set_login_of_flower_when_it_runs_then_only_flower_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text(
        f"{PROCFILE}flower: python -c \"print('flower runs')\" --auth=ann@shop.example\n"
    )
    settings = {"FLOWER_OAUTH2_KEY": "client-7", "FLOWER_OAUTH2_SECRET": "secret"}

    with subprocess.Popen(UP, cwd=tmp_path, env=environment(settings), stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        lines: list[str] = []
        while not any(line.startswith("downloads") for line in lines):
            lines.append(up.stdout.readline())
        up.send_signal(signal.SIGINT)
        lines += up.stdout.readlines()

    assert up.returncode == 0
    missing = "FLOWER_AUTH_PROVIDER and FLOWER_OAUTH2_REDIRECT_URI must be set: "
    assert any(f"flower is not started: {missing}" in line for line in lines), lines
    assert "flower runs" not in "".join(lines)
    assert "secret" not in "".join(lines)


def test_a_failed_release_stops_it_before_the_other_processes_start(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text(PROCFILE.replace("print('migrated')", "raise SystemExit(3)"))
    (tmp_path / ".env").write_text("SD_API_KEY=for-the-worker\n")

    result = subprocess.run(
        UP, cwd=tmp_path, env=environment({}), capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )

    assert result.returncode == 1
    assert "release ended with exit code 3" in result.stdout
    assert "for-the-worker" not in result.stdout


@pytest.mark.parametrize(
    "text",
    [
        "web: gunicorn shop\n",
        "worker: celery -A shop worker\n",
        "worker: celery -A worker.app worker\nweb: gunicorn shop\n",
    ],
    ids=["another app's", "a worker of another app's", "ours and another app's"],
)
def test_a_procfile_of_a_web_app_is_not_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "Procfile").write_text(text)

    assert procfile(tmp_path) == own_procfile()


def test_a_procfile_that_only_runs_our_app_is_run(tmp_path: Path) -> None:
    (tmp_path / "Procfile").write_text("worker: celery -A worker.app worker --concurrency 2\n")

    assert procfile(tmp_path) == tmp_path / "Procfile"
