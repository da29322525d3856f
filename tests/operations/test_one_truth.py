"""A mess of many troubles: every command, page and metric tells of the same ones, from a shell with keys or without."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from tests import planted
from tests.admin_pages import PASSWORD, Operator
from tests.metrics.exposition import open_metrics, parse, registry_of
from tests.rows import add_downloading, add_job, add_output, add_process, seconds
from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.cli import main
from worker.settings import load
from worker.store.engine import database_now

BURST = 200
DURATION = re.compile(r"\d[\d.,]* (?:ms|s|min|h|d|requests per second)\b")
EXPECTED = {
    "account_refused", "account_slowed", "api_unreachable", "backlog", "host_not_allowed", "lost_claims",
    "no_downloader", "outputs_unreachable", "past_deadline", "redis_away", "storage", "webhooks_refused",
}  # fmt: skip


def plant(connection: Connection) -> None:
    """Plant the mess: everything but a missing worker goes wrong."""
    now = database_now(connection)
    late = now - seconds(20)
    add_process(
        connection, queues=frozenset({"fetch-worker", "fetch-worker.polls"}), redis_answers=False,
        accounts={"default": 5.0, "refused": 5.0, "slowed": 5.0},
    )  # fmt: skip
    planted.add_breaker(connection, "account", "default", asked_at=now)
    planted.add_open_breaker(connection, "account", "refused", "key rejected: Invalid API key")
    planted.add_breaker(connection, "account", "slowed", asked_at=now, ceiling=2.0, cut_at=now)
    planted.add_open_breaker(connection, "host", "dead.test", "unreachable: no answer")
    planted.add_open_breaker(connection, "host", "other.test", "not on SD_API_HOSTS: add other.test to it")
    for number in range(BURST):
        add_job(connection, f"burst {number}", due_at=late)
    for number in range(3):
        add_job(connection, f"refused {number}", account="refused", due_at=late)
    add_job(connection, "dead", fetch_host="dead.test", due_at=late)
    add_job(connection, "unlisted", fetch_host="other.test", due_at=late)
    add_job(connection, "forgotten", due_at=now + timedelta(hours=4), deadline_at=now - timedelta(hours=2))
    planted.add_claimed_job(connection, "lost", planted.ELSEWHERE, over=60, account="slowed")
    for code, message, place in (("storage", "No space left on device", 1), ("unreachable", "no answer", 2)):
        job_id = add_downloading(connection, f"output {place}")
        add_output(connection, job_id, error_code=code, error_message=message, listed_at=now - seconds(130), attempts=3)
    told = planted.add_failed_job(connection, "told")
    planted.add_event(connection, told, due=300, error_message="HTTP 500", http_status=500, attempts=3)


def without_times(texts: Iterable[str]) -> list[str]:
    """Return the texts in order, with T for each duration and rate: time passes between two commands."""
    return sorted(DURATION.sub("T", text) for text in texts)


class Shell:
    """Runs commands in this process and reads what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def document(self, *arguments: str) -> dict[str, Any]:
        """Return the JSON that a command prints."""
        with pytest.raises(SystemExit):
            main([*arguments, "--json"])
        document: dict[str, Any] = json.loads(self._capsys.readouterr().out)
        return document


@pytest.mark.parametrize("keys", [None, '{"default": "canary-key", "refused": "canary-2"}'], ids=["no key", "keys"])
def test_every_command_page_and_metric_tells_of_the_same_troubles(
    engine: Engine,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: str | None,
) -> None:
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("STORAGE_URL", f"file:{tmp_path}")
    monkeypatch.delenv("SD_API_KEY", raising=False)
    if keys is None:
        monkeypatch.delenv("SD_API_KEYS", raising=False)
    else:
        monkeypatch.setenv("SD_API_KEYS", keys)
    with engine.begin() as connection:
        plant(connection)

    shell = Shell(capsys)
    status = shell.document("status")
    top = shell.document("top", "--once")
    doctor = shell.document("doctor")
    page = Operator(make_site(load(), AccessControl(PASSWORD, "127.0.0.1")).test_client()).page("/")
    metrics = parse(open_metrics(registry_of(engine)))

    troubles = status["troubles"]
    lines = [f"{trouble['text']}: {trouble['command']}" for trouble in troubles]
    assert {trouble["code"] for trouble in troubles} == EXPECTED
    assert next(trouble["jobs"] for trouble in troubles if trouble["code"] == "backlog") == BURST
    assert without_times(f"{trouble['text']}: {trouble['command']}" for trouble in top["troubles"]) == without_times(
        lines
    )
    red = [check["message"] for check in doctor["checks"] if not check["ok"]]
    assert [line for line in without_times(lines) if line not in without_times(red)] == []
    shown = " ".join(DURATION.sub("T", page).split())
    assert [line for line in without_times(f"{t['text']} {t['command']}" for t in troubles) if line not in shown] == []
    codes = Counter(trouble["code"] for trouble in troubles)
    assert {key[0]: count for key, count in metrics.all("troubles").items()} == codes
    jobs = {code: sum(trouble["jobs"] for trouble in troubles if trouble["code"] == code) for code in codes}
    assert {key[0]: count for key, count in metrics.all("trouble_jobs").items()} == {
        code: count for code, count in jobs.items() if count
    }
