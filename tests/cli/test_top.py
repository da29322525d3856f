"""The command `top`: its snapshot shows every problem and true rates, and fits the terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import Connection, Engine

from tests import planted
from tests.planted import DEAD, ELSEWHERE
from tests.rows import add_process, seconds
from tests.waiting import wait_until
from worker.cli import main
from worker.cli.top import render
from worker.coordination.rate_limiter import RateLimiter, redis_client
from worker.operations.snapshot import Snapshot
from worker.operations.snapshot_reader import SnapshotReader
from worker.settings import load
from worker.store.counters import ANSWERS, Tally
from worker.store.schema import HELD_UNTIL

ROOT = Path(__file__).parents[2]
# Takes the terminal of its own session, so that Ctrl-C reaches it as in a real terminal.
LIVE = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from worker.cli import main
main(["top", "--every", "0.2"])
"""
NO_REDIS = "redis://127.0.0.1:1/0"

Top = Callable[..., str]


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the commands use; Redis is not reachable."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", NO_REDIS)
    monkeypatch.setenv("SD_API_KEY", "sk-canary-7f3a")
    return engine


@pytest.fixture
def top(capsys: pytest.CaptureFixture[str]) -> Top:
    """Return a function that runs `top` and returns its output."""

    def command(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["top", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    return command


def add_problems(connection: Connection) -> dict[str, int]:
    """Create every problem that `top` shows. Return the job ids."""
    at = planted.now()
    add_process(connection, accounts={"default": 10.0, "refused": 10.0, "resting": 10.0})
    planted.add_open_breaker(connection, "account", "refused", "key rejected: Invalid API key")
    planted.add_breaker(connection, "account", "resting", paused_at=at - seconds(30))
    planted.add_open_breaker(connection, "host", "api.dead.test", "unreachable: no answer from 10.1.2.3")
    planted.add_breaker(connection, "account", "default", asked_at=at - seconds(400))
    jobs = {
        "late": planted.add_waiting_job(connection, "late"),
        "refused": planted.add_waiting_job(connection, "refused", account="refused"),
        "resting": planted.add_waiting_job(connection, "resting", account="resting"),
        "keyless": planted.add_waiting_job(connection, "keyless", account="keyless"),
        "dead host": planted.add_waiting_job(connection, "host", fetch_host="api.dead.test"),
        "overdue": planted.add_waiting_job(connection, "overdue", due=-500, deadline_at=at - seconds(90)),
        "stuck": planted.add_claimed_job(connection, "stuck", ELSEWHERE, over=70),
        "dead": planted.add_claimed_job(connection, "dead", DEAD, over=-20),
        "unreachable": planted.add_downloading_job(
            connection, "cdn", error_code="unreachable", error_message="no answer: ConnectTimeout"
        ),
        "receiving": planted.add_receiving_job(connection, "receiving", received_bytes=5_000_000),
        "abandoned": planted.add_receiving_job(connection, "abandoned", over=60),
        "failed": planted.add_failed_job(connection, "failed"),
        "endless": planted.add_claimed_job(
            connection, "endless", ELSEWHERE, over=-20_000, asked_at=planted.now() - seconds(600)
        ),
        "forgotten": planted.add_waiting_job(connection, "forgotten", due=7_200, deadline_at=at - seconds(900)),
        "by hand": planted.add_waiting_job(connection, "hand", due_at=HELD_UNTIL, held_at=at),
    }
    refused = {"error_message": "it answered 500 to ann@shop.test", "http_status": 500}
    planted.add_event(connection, jobs["failed"], due=300, **refused)
    return jobs


def test_every_problem_is_in_the_document(database: Engine, top: Top) -> None:
    with database.begin() as connection:
        jobs = add_problems(connection)

    printed = top("--once", "--json")

    snapshot = json.loads(printed)
    accounts = {account["account"]: account for account in snapshot["accounts"]}
    assert accounts["refused"]["reason"] == "key rejected: Invalid API key"
    assert accounts["refused"]["since"] < accounts["refused"]["until"]
    assert (accounts["resting"]["reason"], accounts["resting"]["until"]) == ("held by an operator", None)
    assert accounts["keyless"]["reason"] == "no key for account keyless"
    assert accounts["default"]["reason"] is None
    assert [(host["host"], host["reason"]) for host in snapshot["hosts"]] == [
        ("api.dead.test", "unreachable: no answer from [ip]")
    ]
    late = {job["id"]: job for job in snapshot["late"]}
    assert late[jobs["late"]]["why"] == "no worker polls"
    assert late[jobs["refused"]]["why"] == "held: key rejected: Invalid API key"
    assert late[jobs["resting"]]["why"] == "held: held by an operator"
    assert late[jobs["keyless"]]["why"] == "no key for account keyless"
    assert late[jobs["dead host"]]["why"].startswith("held: api.dead.test unreachable")
    assert late[jobs["stuck"]]["why"] == f"claimed by {ELSEWHERE}, which is silent"
    assert 85 < late[jobs["overdue"]]["past_deadline_seconds"] < 150
    assert snapshot["late"][0]["id"] == jobs["overdue"], "the latest is first"
    assert jobs["by hand"] not in late
    assert snapshot["late_count"] == len(late) == 7
    claims = {(claim["what"], claim["id"]): claim for claim in snapshot["claims"]}
    assert claims["job", jobs["stuck"]]["dead"] is False
    assert 65 < claims["job", jobs["stuck"]]["over_seconds"] < 130
    assert claims["job", jobs["dead"]]["dead"] is True
    assert claims["job", jobs["dead"]]["over_seconds"] < 0, "its lease still runs"
    assert claims["job", jobs["endless"]]["over_seconds"] < -19_000, "no work takes as long as this claim is held"
    assert sorted(kind for kind, _ in claims) == ["job", "job", "job", "output"]
    (overdue,) = snapshot["overdue"]
    assert overdue["id"] == jobs["forgotten"]
    assert 890 < overdue["past_deadline_seconds"] < 960
    assert 7_100 < overdue["asked_in_seconds"] <= 7_200
    (transfer,) = snapshot["transfers"]
    assert (transfer["job_id"], transfer["bytes"], transfer["host"]) == (
        jobs["receiving"],
        5_000_000,
        "cdn.dead.test:8443",
    )
    assert 100_000 < transfer["bytes_per_second"] <= 500_000
    unstored = snapshot["unstored"][0]
    assert (unstored["code"], unstored["host"], unstored["count"]) == ("unreachable", "cdn.dead.test:8443", 1)
    assert unstored["message"] == "no answer: ConnectTimeout"
    assert [(job["id"], job["code"]) for job in snapshot["failures"]] == [(jobs["failed"], "api_failed")]
    (webhook,) = snapshot["webhooks"]
    assert (webhook["receiver"], webhook["http_status"]) == ("shop.test", 500)
    assert webhook["message"] == "it answered 500 to [e-mail]"
    assert (snapshot["jobs"]["pending"], snapshot["jobs"]["downloading"], snapshot["jobs"]["failed"]) == (11, 3, 1)
    assert snapshot["asked_seconds"] >= 400
    assert not re.search(r"sk-canary|sig=|hidden|users/ann|ann@", printed)


def test_a_snapshot_fits_80_by_24_and_cuts_each_section(database: Engine) -> None:
    with database.begin() as connection:
        add_problems(connection)
        for number in range(30):
            planted.add_failed_job(connection, f"more{number}")
            planted.add_waiting_job(connection, f"late{number}", due=-10.0 - number)
            planted.add_receiving_job(connection, f"r{number}")
        count(connection, delays=3)

    snapshot = SnapshotReader(database, load()).read()
    small, large = screen(snapshot, 80, 24), screen(snapshot, 140, 140)

    assert len(small) <= 24
    assert max(map(len, small)) <= 80
    for title in ("ACCOUNTS", "HELD HOSTS", "LOST CLAIMS", "LATE JOBS", "NOT STORED", "DOWNLOADS", "LATE WEBHOOKS"):
        assert any(line.startswith(title) for line in small), small
        assert any(line.startswith(title) for line in large)
    assert any(line.startswith("LAST FAILURES … and 20 more") for line in small), small
    assert "… and 36 more" in small, "late jobs that were not read are counted too"
    assert "NO WORKER POLLS" in small[0]
    assert screen(snapshot, 80, 24, "the database is away")[2] == "the database is away"
    assert sum(line.endswith("cdn.dead.test:8443") for line in large) == 31
    assert any(line.startswith("READY TO SEEN") and line.endswith("(since counting began)") for line in large)


def screen(snapshot: Snapshot, width: int, height: int, error: str | None = None) -> list[str]:
    """Return the lines of a snapshot on a terminal of this size."""
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(render(snapshot, width, height, error))
    return console.export_text().splitlines()


def count(connection: Connection, *, answers: int = 0, delays: int = 0) -> None:
    """Add to the counters as a worker does."""
    tally = Tally()
    for _ in range(answers):
        tally.add(ANSWERS, "processing", account="default")
    for _ in range(delays):
        tally.delay("default", "image", 1.2)
        tally.polled("default", "image", 4)
    tally.write(connection)


def test_rates_are_computed_between_snapshots(database: Engine) -> None:
    at = [0.0]
    reader = SnapshotReader(database, load(), clock=lambda: at[0])
    with database.begin() as connection:
        add_process(connection)
        count(connection, answers=1_000, delays=5)
        planted.add_receiving_job(connection, "1", attempts=2, received_bytes=1_000)

    first = reader.read()
    with database.begin() as connection:
        count(connection, answers=30, delays=2)
        connection.exec_driver_sql("UPDATE fetch_outputs SET received_bytes = 41000")
    at[0] = 4.0
    second = reader.read()
    at[0] = 200.0
    third = reader.read()

    assert first.accounts[0].used is None, "Redis is not reachable, and there is no earlier snapshot"
    assert (first.kinds[0].jobs, first.kinds_seconds) == (5, None)
    assert first.transfers[0].bytes_per_second is None, "the attempt may have continued a partial file"
    assert second.accounts[0].used == 7.5
    assert (second.kinds[0].jobs, second.kinds[0].polls_per_job, second.kinds_seconds) == (2, 4.0, 4.0)
    assert 1.0 < (second.kinds[0].delay_p50 or 0) <= 1.5
    assert second.transfers[0].bytes_per_second == 10_000
    assert (third.kinds[0].jobs, third.kinds_seconds) == (7, None), "no sample is kept for that long"


def test_the_first_snapshot_reads_used_and_free_requests_from_redis(
    database: Engine, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    redis_client(redis_url, seconds=2).flushall()  # a server of these tests: remove the requests of the previous test
    limiter = RateLimiter(redis_url)
    with database.begin() as connection:
        add_process(connection)

    account = SnapshotReader(database, load()).read().accounts[0]
    limiter.take("default", 5, rate=10.0)
    limiter.count_accepted("default", 4)

    assert (account.left, account.used, account.rps) == (2, 0.0, 10.0)
    # requests are counted once their second has passed
    wait_until(
        lambda: SnapshotReader(database, load()).read().accounts[0].used == 4.0, "four requests are shown as used"
    )


def test_without_redis_the_snapshot_says_so(database: Engine, top: Top) -> None:
    assert "Redis is not reachable" in top("--once")
    with database.begin() as connection:
        add_process(connection)
    assert json.loads(top("--json"))["accounts"][0]["left"] is None


@pytest.mark.parametrize("arguments", [("--every", "0"), ("--every", "soon"), ("7",)])
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", *arguments])
    assert ended.value.code == 2


@pytest.mark.parametrize("key", [b"q", b"\x03", b"x\x1b[Aq"], ids=["q", "Ctrl-C", "after other keys"])
def test_it_refreshes_until_a_key_quits_it(key: bytes, tmp_path: Path) -> None:
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "REDIS_URL": NO_REDIS, "TERM": "xterm"}
    command = [sys.executable, "-c", "import sys; from worker.cli import main; main(sys.argv[1:])"]
    assert subprocess.run([*command, "migrate"], cwd=ROOT, env=environment, check=False).returncode == 0
    keyboard, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)

    with subprocess.Popen(
        [sys.executable, "-c", LIVE],
        cwd=ROOT,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        printed = b""
        try:
            while printed.count(b"fetch-worker") < 3:
                printed += _read(keyboard)
            os.write(keyboard, key)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                printed += _read(keyboard, 0.1)
        finally:
            process.kill()

    after = termios.tcgetattr(terminal)
    os.close(terminal)
    os.close(keyboard)
    assert process.returncode == 0, printed[-2_000:]
    assert b"Traceback" not in printed
    assert after == before, "the terminal settings are restored"


def _read(keyboard: int, timeout: float = 60.0) -> bytes:
    ready, _, _ = select.select([keyboard], [], [], timeout)
    if not ready:
        assert timeout < 1, "nothing was printed"
        return b""
    try:
        return os.read(keyboard, 65_536)
    except OSError:
        return b""
