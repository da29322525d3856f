"""What is measured: worker processes by the Procfile's line, on a database and a Redis of their own."""

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
class Api:
    """The server of the benchmarks, in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int
    count_port: int
    certificate: Path | None

    @property
    def base(self) -> str:
        """What `SD_API_URL` is set to."""
        return f"{'https' if self.certificate else 'http'}://localhost:{self.port}/api/v3"

    def count(self) -> int:
        """How many calls it got."""
        address = f"http://127.0.0.1:{self.count_port}/count"
        with urllib.request.urlopen(address, timeout=10) as answer:  # our own
            return int(json.load(answer)["requests"])


@contextmanager
def api(latency: float = 0.0, certificate: Path | None = None) -> Iterator[Api]:
    """A server that answers after `latency` seconds."""
    program = [sys.executable, "-m", "tests.benchmarks.server", "--latency", str(latency)]
    program += ["--certificate", str(certificate)] if certificate else []
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ports = json.loads(process.stdout.readline())
        try:
            yield Api(process, ports["port"], ports["count_port"], certificate)
        finally:
            process.terminate()


def make_certificate(folder: Path) -> Path:
    """One file with a certificate for localhost, its key, and the certificate of whoever signed it."""
    authority, path = trustme.CA(), folder / "certificate.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    authority.cert_pem.write_to_path(path, append=True)
    return path


@dataclass
class Stand:
    """A database, a Redis, and the processes on them."""

    folder: Path
    database_url: str
    redis_url: str
    settings: dict[str, str]
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of its processes."""
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
            "POLL_MIN": "3000",  # a row is asked about once
            **self.settings,
        }

    def run(self, *words: str) -> str:
        """Runs a program to its end; what it printed."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
        return done.stdout

    def put_rows(self, base: str, count: int, *, prefix: str, first: float = -1.0, status: str = "pending") -> None:
        """Puts jobs in that are due in `first` seconds, or completed ones."""
        values = {"prefix": prefix, "base": f"{base}/fetch", "host": base.split("/")[2], "count": count}
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            over = "2026-01-01T00:00:00Z" if status == "completed" else None
            statement = ROWS.replace("now() + %(first)s * interval '1 second'", "NULL") if over else ROWS
            connection.execute(statement, {**values, "first": first, "status": status, "over": over})

    def database_cpu_seconds(self) -> float:
        """Processor time of the server's processes that serve this database."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            query = (
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
            return cpu_seconds([row[0] for row in connection.execute(query)])

    def settle(self) -> None:
        """Lets the database come to rest."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE fetch_jobs")
            connection.execute("CHECKPOINT")

    def start(self, *command: str, log: str) -> int:
        """Starts a Celery worker and waits until it is ready; its process id."""
        path = self.folder / log
        with path.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        until = time.monotonic() + START_SECONDS
        while b" ready." not in path.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no worker: {path.read_text()[-2000:]}")
            time.sleep(0.1)
        return process.pid

    def start_worker(self, number: int = 1, name: str = "worker", concurrency: int | None = None) -> int:
        """Starts a worker by the Procfile's line of this name, with another number of threads where one is given."""
        lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
        words = lines[name].replace(f"{name}@%h", f"{name}{number}@%h").split()
        if concurrency is not None:
            words[words.index("--concurrency") + 1] = str(concurrency)
        return self.start(str(BIN / words[0]), *words[1:], log=f"{name}{number}.log")

    def stop(self) -> None:
        """Ends its processes."""
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
def stand(folder: Path, **settings: str) -> Iterator[Stand]:
    """A stand with our tables."""
    folder.mkdir(parents=True)
    with ExitStack() as servers:
        database = servers.enter_context(postgres(folder / "postgres")).replace("postgresql+psycopg", "postgresql")
        redis_url = servers.enter_context(redis_server(folder / "redis"))
        made = Stand(folder, database, redis_url, settings)
        servers.callback(made.stop)
        made.run(str(BIN / "fetch-worker"), "migrate")
        yield made


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes and all their children, in seconds."""
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
    """Memory of a process that is in RAM."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) / 1024
