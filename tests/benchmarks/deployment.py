"""Deployment for the benchmarks: workers started with the Procfile's commands, a database, a Redis and a fake API."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import trustme

from tests.servers import postgres, redis_server

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60.0
ROWS = """
INSERT INTO fetch_jobs (account, remote_id, kind, fetch_url, fetch_base, fetch_host, status, submitted_at, tracked_at,
                        deadline_at, deadline_seconds, due_at, ready_at, completed_at)
SELECT 'default', %(prefix)s || n, 'image', %(base)s || '/' || %(prefix)s || n, %(base)s, %(host)s, %(status)s, now(),
       now(), now() + interval '9 hours', 32400, now() + %(first)s * interval '1 second', %(over)s, %(over)s
FROM generate_series(1, %(count)s) AS n
"""


@dataclass
class ApiServer:
    """The fake API of the benchmarks, in a separate process."""

    process: "subprocess.Popen[str]"
    port: int
    count_port: int
    certificate: Path | None

    @property
    def base(self) -> str:
        """The value for `SD_API_URL`."""
        return f"{'https' if self.certificate else 'http'}://localhost:{self.port}/api/v3"

    def count(self) -> int:
        """Return the number of requests so far."""
        address = f"http://127.0.0.1:{self.count_port}/count"
        with urllib.request.urlopen(address, timeout=10) as answer:  # a local server
            return int(json.load(answer)["requests"])


@contextmanager
def api_server(latency: float = 0.0, certificate: Path | None = None) -> Iterator[ApiServer]:
    """Run the fake API. It answers after `latency` seconds."""
    program = [sys.executable, "-m", "tests.benchmarks.server", "--latency", str(latency)]
    program += ["--certificate", str(certificate)] if certificate else []
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        try:
            yield ApiServer(process, ports["port"], ports["count_port"], certificate)
        finally:
            process.terminate()


def make_certificate(folder: Path) -> Path:
    """Create a file with a certificate for localhost, its key and the certificate of its authority."""
    authority, path = trustme.CA(), folder / "certificate.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    authority.cert_pem.write_to_path(path, append=True)
    return path


@dataclass
class BenchmarkDeployment:
    """A database, a Redis server, and the processes that use them."""

    folder: Path
    database_url: str
    redis_url: str
    settings: dict[str, str]
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The complete environment of the processes."""
        return {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "FETCH_WORKER_DOTENV": "off",
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "SD_API_KEY": "sk-benchmark-0123456789abcdef",
            "SD_API_RPS": "1000000",
            "POLL_POLICY": "fixed",
            "POLL_MIN": "3000",  # each job is polled once
            **self.settings,
        }

    def run(self, *command: str) -> str:
        """Run a program to its end. Return its output."""
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-2000:]}")
        return result.stdout

    def insert_jobs(self, base: str, count: int, *, prefix: str, first: float = -1.0, status: str = "pending") -> None:
        """Insert pending jobs that are due in `first` seconds, or completed jobs."""
        values = {"prefix": prefix, "base": f"{base}/fetch", "host": base.split("/")[2], "count": count}
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            completed_at = "2026-01-01T00:00:00Z" if status == "completed" else None
            statement = ROWS.replace("now() + %(first)s * interval '1 second'", "NULL") if completed_at else ROWS
            connection.execute(statement, {**values, "first": first, "status": status, "over": completed_at})

    def database_cpu_seconds(self) -> float:
        """Return the processor time of the PostgreSQL processes that serve this database."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            query = (
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
            return cpu_seconds([row[0] for row in connection.execute(query)])

    def settle(self) -> None:
        """Vacuum and checkpoint the database, so that it is idle during the measurement."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE fetch_jobs")
            connection.execute("CHECKPOINT")

    def start(self, *command: str, log: str) -> int:
        """Start a Celery worker and wait until it is ready. Return its process id."""
        path = self.folder / log
        with path.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        deadline = time.monotonic() + START_SECONDS
        while b" ready." not in path.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker did not start: {path.read_text()[-2000:]}")
            time.sleep(0.1)
        return process.pid

    def start_worker(self, number: int = 1, name: str = "worker", concurrency: int | None = None) -> int:
        """Start a worker with the Procfile's command of this name, with `concurrency` threads if given."""
        lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
        arguments = lines[name].replace(f"{name}@%h", f"{name}{number}@%h").split()
        if concurrency is not None:
            arguments[arguments.index("--concurrency") + 1] = str(concurrency)
        return self.start(str(BIN / arguments[0]), *arguments[1:], log=f"{name}{number}.log")

    def stop(self) -> None:
        """Stop the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


@contextmanager
def deploy(folder: Path, **settings: str) -> Iterator[BenchmarkDeployment]:
    """Start a database with the product's tables and a Redis server. Stop everything at the end."""
    folder.mkdir(parents=True)
    with ExitStack() as servers:
        database = servers.enter_context(postgres(folder / "postgres")).replace("postgresql+psycopg", "postgresql")
        redis_url = servers.enter_context(redis_server(folder / "redis"))
        deployment = BenchmarkDeployment(folder, database, redis_url, settings)
        servers.callback(deployment.stop)
        deployment.run(str(BIN / "fetch-worker"), "migrate")
        yield deployment


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the user and system time of these processes and all their descendants, in seconds."""
    parents = dict[int, int]()
    used = dict[int, float]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        used[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    tree = set(pids)
    for _ in range(4):
        tree |= {pid for pid, parent in parents.items() if parent in tree}
    return sum(used.get(pid, 0.0) for pid in tree)


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) / 1024
