"""Heartbeats by systemd's protocol: from the programs to `up`, and from `up` to systemd."""

import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from worker.system.watchdog import MICROSECONDS, NAMES, SOCKET, notify, watched_seconds

MESSAGE_BYTES = 65_536
PER_LIMIT = 4  # heartbeats to systemd per watchdog interval
START_SECONDS = 180.0  # as in the systemd units; a worker reports its own limit as soon as it starts


class Heartbeat:
    """The heartbeats of one program, with their socket."""

    def __init__(self, address: Path) -> None:
        self.limit: float | None = None  # seconds allowed without a heartbeat; None until the program reports its limit
        self.last_at = 0.0
        self.triggered = False  # the program itself reported a stall
        self._address = str(address)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        try:
            self.socket.bind(self._address)
        except OSError:
            self.socket.close()
            raise

    def begin(self, now: float) -> None:
        """Reset the state for a new process."""
        self.read(now)
        self.limit, self.last_at, self.triggered = None, now, False

    def read(self, now: float) -> None:
        """Read all messages that have arrived."""
        with suppress(BlockingIOError):
            while True:
                for line in self.socket.recv(MESSAGE_BYTES).decode("utf-8", "replace").splitlines():
                    name, _, value = line.partition("=")
                    if name == "WATCHDOG":
                        self.last_at, self.triggered = now, self.triggered or value == "trigger"
                    elif name == MICROSECONDS and value.isascii() and value.isdigit() and len(value) < 16:
                        self.last_at, self.limit = now, int(value) / 1e6

    def overdue(self, now: float) -> bool:
        """Return whether the heartbeat is late, or the program itself reported a stall."""
        return self.triggered or (self.limit is not None and now - self.last_at > self.limit)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that tell the program where to send its heartbeats."""
        return {SOCKET: self._address, MICROSECONDS: str(int(START_SECONDS * 1e6))}


def environment_with(heartbeat: Heartbeat | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a program's environment with its heartbeat socket. Systemd's own variables are for this process only."""
    variables = {name: value for name, value in environment.items() if name not in NAMES}
    return variables | ({} if heartbeat is None else heartbeat.variables)


class HeartbeatSockets:
    """The heartbeat sockets of all programs, in a private folder."""

    def __init__(self) -> None:
        self._cleanup = ExitStack()
        self._folder: Path | None = None

    def new(self, name: str) -> Heartbeat:
        """Return a new socket for a program. Raises OSError."""
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="fetch-worker-up-")  # 0700
            self._folder = Path(self._cleanup.enter_context(folder))
        heartbeat = Heartbeat(self._folder / name)
        self._cleanup.callback(heartbeat.socket.close)
        return heartbeat

    def close(self) -> None:
        """Close the sockets and delete their folder."""
        self._cleanup.close()


class OwnHeartbeat:
    """The heartbeat of this process, if systemd watches it."""

    def __init__(self, now: float) -> None:
        self._interval = (watched_seconds() or 0.0) / PER_LIMIT
        self._next_at = now

    def send_if_due(self, now: float) -> None:
        """Send a heartbeat unless the last one is recent."""
        if self._interval and now >= self._next_at:
            self._next_at = now + self._interval
            notify("WATCHDOG=1")
