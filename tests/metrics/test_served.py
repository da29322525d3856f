"""How metrics are served: shared, never stale, never a traceback, on this machine alone; and the command itself."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from tests.metrics.exposed import open_metrics, parsed
from tests.rows import add_job
from tests.servers import free_port
from tests.waiting import wait_until
from worker.cli import main
from worker.errors import Unavailable
from worker.metrics import reading, server
from worker.metrics.families import registry
from worker.metrics.reading import Reading, SharedReading, read
from worker.metrics.server import MetricsServer
from worker.settings import Settings
from worker.store.engine import make_engine

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@contextmanager
def serving(shared: SharedReading, host: str = "127.0.0.1") -> Iterator[MetricsServer]:
    """A server in this process, on a port of its own."""
    with MetricsServer(host, 0, registry(shared.get)) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


def get(address: str, path: str = "/metrics", accept: str = OPEN_METRICS) -> str:
    """What it answers."""
    asked = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(asked, timeout=20) as answer:  # noqa: S310  # http, as is written above
        return str(answer.read().decode())


class Readings:
    """Reads a database, and notes how often; each can be made to wait, or to meet trouble."""

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        self.trouble: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self._engine = engine

    def __call__(self) -> Reading:
        self.count += 1
        assert self.go_on.wait(20)
        if self.trouble is not None:
            raise self.trouble
        return read(self._engine, Settings())


@pytest.fixture
def engine(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Engine]:
    """On SQLite; the figures have tests on each database of their own."""
    shutil.copy(migrated_sqlite, tmp_path / "test.db")
    made = make_engine(make_url(f"sqlite:///{tmp_path}/test.db"))
    yield made
    made.dispose()


@pytest.fixture
def readings(engine: Engine) -> Readings:
    return Readings(engine)


def test_scrapes_at_once_share_one_reading(readings: Readings) -> None:
    readings.go_on.clear()
    arrived: list[int] = []

    class Counted(SharedReading):
        def get(self) -> Reading | None:
            arrived.append(1)
            return super().get()

    with serving(Counted(readings)) as made, ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(get, made.address) for _ in range(8)]
        wait_until(lambda: len(arrived) == 8, "all scrapes have arrived")
        readings.go_on.set()
        said = [parsed(answer.result()) for answer in answers]

    assert readings.count == 1
    assert [one.value("up") for one in said] == [1.0] * 8


def test_what_is_older_than_a_second_is_read_anew(
    readings: Readings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shared = SharedReading(readings)
    seen = []
    for later in (0.0, 0.9, 1.1):
        now = 100.0 + later
        found = shared.get()
        assert found is not None
        seen.append(found.standing.jobs["pending"])
        if not later:
            with engine.begin() as connection:
                add_job(connection)

    assert seen == [0, 0, 1]


@pytest.mark.parametrize(
    "trouble", [Unavailable("away"), OperationalError("SELECT 1", None, Exception("gone away"))], ids=["ours", "theirs"]
)
def test_without_a_database_nothing_is_said_but_that(
    trouble: Exception, readings: Readings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither old figures nor zeros; and all is there again once it is back."""
    monkeypatch.setattr(reading, "SHARED_SECONDS", -1.0)
    with serving(SharedReading(readings)) as made:
        before = parsed(get(made.address))
        readings.trouble = trouble
        away = [parsed(get(made.address)) for _ in range(3)][-1]
        readings.trouble = None
        again = parsed(get(made.address))

    assert [one.value("up") for one in (before, away, again)] == [1.0, 0.0, 1.0]
    assert set(away.samples) == {f"fetch_worker_{name}" for name in ("up", "build_info", "scrape_duration_seconds")}
    assert set(again.samples) == set(before.samples)
    assert len([line for line in caplog.records if line.message.startswith("no figures")]) == 1


def test_who_would_wait_too_long_is_told_that_it_is_not_there(readings: Readings) -> None:
    """A database that swallows everything: one reads, the others do not pile up behind it."""
    readings.go_on.clear()
    shared = SharedReading(readings, patience=0.05)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(shared.get)
        wait_until(lambda: readings.count, "the first one reads")
        second = shared.get()
        readings.go_on.set()

        assert second is None
        assert first.result() is not None


def test_only_so_many_scrapes_are_answered_at_once(readings: Readings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is told all the same."""
    monkeypatch.setattr(server, "SCRAPES_MOST", 1)
    readings.go_on.clear()
    with serving(SharedReading(readings)) as made, ThreadPoolExecutor(1) as threads:
        first = threads.submit(get, made.address)
        wait_until(lambda: readings.count, "the first one reads")
        with pytest.raises(HTTPError, match="503"):
            get(made.address)
        assert get(made.address, "/healthz") == "ok\n"
        readings.go_on.set()

        assert parsed(first.result()).value("up") == 1.0


def test_a_fault_of_ours_is_an_error_and_no_half_answer(
    readings: Readings, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Prometheus then knows that the target is down; the log says why."""
    readings.trouble = ValueError("a fault of ours")
    with serving(SharedReading(readings)) as made:
        with pytest.raises(HTTPError, match="500") as answered:
            get(made.address)
        body = answered.value.read().decode()

    assert "Traceback" not in body
    assert "a fault of ours" in caplog.text
    assert capfd.readouterr().err == ""


def test_other_addresses_have_nothing(readings: Readings) -> None:
    with serving(SharedReading(readings)) as made:
        for path in ("/", "/metrics/../etc", "/metricsx"):
            with pytest.raises(HTTPError, match="404"):
                get(made.address, path)
        assert "fetch_worker_up 1.0" in get(made.address, "/metrics?x=1", accept="text/plain")
        assert get(made.address, "/healthz") == "ok\n"

    assert readings.count == 1


def test_it_listens_on_ipv6_too(readings: Readings) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return  # this machine has none
    with serving(SharedReading(readings), "::1") as made:
        assert made.address.startswith("[::1]:")
        assert get(made.address, "/healthz") == "ok\n"


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def settled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """DATABASE_URL names a database with our tables; no key is set."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["metrics", *words])
    return int(ended.value.code or 0)


def test_the_command_prints_them_once(settled: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    with settled.begin() as connection:
        add_job(connection)

    assert _run() == 0

    assert 'fetch_worker_jobs{status="pending"} 1.0' in capsys.readouterr().out


def test_the_command_says_that_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In its exit code, too; and no password is shown."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:secret-1@127.0.0.1:{free_port()}/x")

    assert _run() == 1

    said = capfd.readouterr()
    assert "fetch_worker_up 0.0" in said.out
    assert "DATABASE_URL" in caplog.text
    assert "secret" not in said.out + said.err + caplog.text
    assert "Traceback" not in said.err + caplog.text


@pytest.mark.parametrize("words", ["x", "99999", "localhost:", "1.2.3.4:x", "-1"])
@pytest.mark.usefixtures("settled")
def test_a_place_that_is_none_is_a_usage_error(words: str) -> None:
    assert _run("--listen", words) == 2


@pytest.mark.usefixtures("settled")
def test_a_port_that_is_taken_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert _run("--listen", str(port)) == 1

    assert capsys.readouterr().err == f"fetch-worker: can't listen on 127.0.0.1, port {port}: Address already in use\n"


@pytest.mark.usefixtures("settled")
def test_without_its_library_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("prometheus_client", "worker.metrics"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delattr("worker.metrics", raising=False)

    assert _run() == 2

    assert "pip install 'fetch-worker[metrics]'" in capsys.readouterr().err


def test_the_process_serves_where_it_is_told_until_it_is_stopped(settled: Engine, tmp_path: Path) -> None:
    """By itself on 127.0.0.1; SIGTERM is a good end."""
    port = free_port()
    log = tmp_path / "metrics.log"
    env = os.environ | {"METRICS_PORT": str(port)}
    with log.open("wb") as out:
        words = [str(Path(sys.executable).parent / "fetch-worker"), "metrics", "--listen"]
        process = subprocess.Popen(words, stdout=out, stderr=out, env=env, cwd=tmp_path)
    try:
        wait_until(
            lambda: process.poll() is not None or "metrics are on" in log.read_text(), "it serves", seen=log.read_text
        )
        assert process.poll() is None, log.read_text()
        said = parsed(get(f"127.0.0.1:{port}"))
        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert said.value("up") == 1.0
    assert log.read_text() == f"metrics are on http://127.0.0.1:{port}/metrics\n"


def test_a_registry_reads_nothing_before_it_is_asked(readings: Readings) -> None:
    made = registry(SharedReading(readings).get)

    assert readings.count == 0
    assert parsed(open_metrics(made)).value("up") == 1.0
