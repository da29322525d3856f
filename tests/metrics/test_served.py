"""The metrics server: scrapes share a read, are never stale and never show a traceback; and the command."""

import os
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
from sqlalchemy.exc import OperationalError

from tests.metrics.exposition import open_metrics, parse
from tests.rows import add_job
from tests.servers import free_port
from tests.waiting import wait_until
from worker.cli import main
from worker.errors import Unavailable
from worker.metrics import figures, server
from worker.metrics.definitions import registry
from worker.metrics.figures import Figures, SharedFigures, read_figures
from worker.metrics.server import MetricsServer
from worker.settings import Settings

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@contextmanager
def serving(shared: SharedFigures, host: str = "127.0.0.1") -> Iterator[MetricsServer]:
    """Run a server in this process, on a free port."""
    with MetricsServer(host, 0, registry(shared.get)) as metrics_server:
        thread = threading.Thread(target=metrics_server.serve_forever)
        thread.start()
        try:
            yield metrics_server
        finally:
            metrics_server.shutdown()
            thread.join()


def get(address: str, path: str = "/metrics", accept: str = OPEN_METRICS) -> str:
    """Return the body of a response."""
    request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310  # always http, see above
        return str(response.read().decode())


class CountingReader:
    """Reads figures and counts the reads. A test can block a read or make it fail."""

    def __init__(self, engine: Engine) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.may_read = threading.Event()
        self.may_read.set()
        self._engine = engine

    def __call__(self) -> Figures:
        self.count += 1
        assert self.may_read.wait(20)
        if self.error is not None:
            raise self.error
        return read_figures(self._engine, Settings())


@pytest.fixture
def engine(sqlite_engine: Engine) -> Engine:
    """SQLite only: the values are tested on every database elsewhere."""
    return sqlite_engine


@pytest.fixture
def reader(engine: Engine) -> CountingReader:
    return CountingReader(engine)


def test_concurrent_scrapes_share_one_read(reader: CountingReader) -> None:
    reader.may_read.clear()
    arrived: list[int] = []

    class CountingFigures(SharedFigures):
        def get(self) -> Figures | None:
            arrived.append(1)
            return super().get()

    with serving(CountingFigures(reader)) as metrics_server, ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(get, metrics_server.address) for _ in range(8)]
        wait_until(lambda: len(arrived) == 8, "all scrapes wait")
        reader.may_read.set()
        metrics = [parse(answer.result()) for answer in answers]

    assert reader.count == 1
    assert [scrape.value("up") for scrape in metrics] == [1.0] * 8


def test_figures_older_than_a_second_are_read_again(
    reader: CountingReader, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shared = SharedFigures(reader)
    pending = []
    for later in (0.0, 0.9, 1.1):
        now = 100.0 + later
        result = shared.get()
        assert result is not None
        pending.append(result.stats.jobs["pending"])
        if not later:
            with engine.begin() as connection:
                add_job(connection)

    assert pending == [0, 0, 1]


@pytest.mark.parametrize(
    "error", [Unavailable("away"), OperationalError("SELECT 1", None, Exception("gone away"))], ids=["own", "driver"]
)
def test_without_a_database_only_up_is_reported(
    error: Exception, reader: CountingReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither old figures nor zeros. All metrics return once the database works again."""
    monkeypatch.setattr(figures, "SHARED_SECONDS", -1.0)
    with serving(SharedFigures(reader)) as metrics_server:
        before = parse(get(metrics_server.address))
        reader.error = error
        away = [parse(get(metrics_server.address)) for _ in range(3)][-1]
        reader.error = None
        again = parse(get(metrics_server.address))

    assert [scrape.value("up") for scrape in (before, away, again)] == [1.0, 0.0, 1.0]
    assert set(away.samples) == {f"fetch_worker_{name}" for name in ("up", "build_info", "scrape_duration_seconds")}
    assert set(again.samples) == set(before.samples)
    assert len([line for line in caplog.records if line.message.startswith("no figures")]) == 1


def test_a_scrape_that_would_wait_too_long_gets_no_figures(reader: CountingReader) -> None:
    """If the database does not answer, scrapes do not queue up behind the one that reads."""
    reader.may_read.clear()
    shared = SharedFigures(reader, wait_seconds=0.05)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(shared.get)
        wait_until(lambda: reader.count, "the first one reads")
        second = shared.get()
        reader.may_read.set()

        assert second is None
        assert first.result() is not None


def test_the_number_of_concurrent_scrapes_is_limited(reader: CountingReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """/healthz still answers."""
    monkeypatch.setattr(server, "MAX_SCRAPES", 1)
    reader.may_read.clear()
    with serving(SharedFigures(reader)) as metrics_server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(get, metrics_server.address)
        wait_until(lambda: reader.count, "the first one reads")
        with pytest.raises(HTTPError, match="503"):
            get(metrics_server.address)
        assert get(metrics_server.address, "/healthz") == "ok\n"
        reader.may_read.set()

        assert parse(first.result()).value("up") == 1.0


def test_an_internal_error_is_a_500_without_a_partial_body(
    reader: CountingReader, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Prometheus then sees the target as down; the log has the reason."""
    reader.error = ValueError("a bug")
    with serving(SharedFigures(reader)) as metrics_server:
        with pytest.raises(HTTPError, match="500") as response:
            get(metrics_server.address)
        body = response.value.read().decode()

    assert "Traceback" not in body
    assert "a bug" in caplog.text
    assert capfd.readouterr().err == ""


def test_other_paths_answer_404(reader: CountingReader) -> None:
    with serving(SharedFigures(reader)) as metrics_server:
        for path in ("/", "/metrics/../etc", "/metricsx"):
            with pytest.raises(HTTPError, match="404"):
                get(metrics_server.address, path)
        assert "fetch_worker_up 1.0" in get(metrics_server.address, "/metrics?x=1", accept="text/plain")
        assert get(metrics_server.address, "/healthz") == "ok\n"

    assert reader.count == 1


def test_it_listens_on_ipv6_too(reader: CountingReader) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return  # this machine has no IPv6
    with serving(SharedFigures(reader), "::1") as metrics_server:
        assert metrics_server.address.startswith("[::1]:")
        assert get(metrics_server.address, "/healthz") == "ok\n"


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that DATABASE_URL names; no API key is set."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["metrics", *arguments])
    return int(ended.value.code or 0)


def test_the_command_prints_the_metrics(database: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    with database.begin() as connection:
        add_job(connection)

    assert _run() == 0

    assert 'fetch_worker_jobs{status="pending"} 1.0' in capsys.readouterr().out


def test_the_command_reports_an_unreachable_database(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also by its exit code, and without the password."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:secret-1@127.0.0.1:{free_port()}/x")

    assert _run() == 1

    printed = capfd.readouterr()
    assert "fetch_worker_up 0.0" in printed.out
    assert "DATABASE_URL" in caplog.text
    assert "secret" not in printed.out + printed.err + caplog.text
    assert "Traceback" not in printed.err + caplog.text


@pytest.mark.parametrize("address", ["x", "99999", "localhost:", "1.2.3.4:x", "-1"])
@pytest.mark.usefixtures("database")
def test_an_invalid_address_is_a_usage_error(address: str) -> None:
    assert _run("--listen", address) == 2


@pytest.mark.usefixtures("database")
def test_a_used_port_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert _run("--listen", str(port)) == 1

    assert capsys.readouterr().err == f"fetch-worker: can't listen on 127.0.0.1, port {port}: Address already in use\n"


@pytest.mark.usefixtures("database")
def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("prometheus_client", "worker.metrics"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delattr("worker.metrics", raising=False)

    assert _run() == 2

    assert "pip install 'fetch-worker[metrics]'" in capsys.readouterr().err


def test_the_process_serves_until_sigterm(database: Engine, tmp_path: Path) -> None:
    """By default on 127.0.0.1. SIGTERM ends it normally."""
    port = free_port()
    log = tmp_path / "metrics.log"
    env = os.environ | {"METRICS_PORT": str(port)}
    with log.open("wb") as out:
        command = [str(Path(sys.executable).parent / "fetch-worker"), "metrics", "--listen"]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=tmp_path)
    try:
        wait_until(
            lambda: process.poll() is not None or "serving metrics" in log.read_text(), "it serves", seen=log.read_text
        )
        assert process.poll() is None, log.read_text()
        metrics = parse(get(f"127.0.0.1:{port}"))
        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert metrics.value("up") == 1.0
    assert log.read_text() == f"serving metrics on http://127.0.0.1:{port}/metrics\n"


def test_a_registry_reads_nothing_before_a_scrape(reader: CountingReader) -> None:
    metrics = registry(SharedFigures(reader).get)

    assert reader.count == 0
    assert parse(open_metrics(metrics)).value("up") == 1.0
