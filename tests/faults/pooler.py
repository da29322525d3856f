"""Connection poolers in transaction mode: pgbouncer, and a pooler in Python for machines without pgbouncer.

The Python pooler gives a server connection to the next client as soon as a transaction ends. It never resets the
session, so session state that one client leaves behind is visible to the next.
"""

import os
import queue
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

from tests.servers import START_SECONDS, free_port, missing

SAMPLE = Path(__file__).parents[2] / "worker" / "deploy" / "pgbouncer.ini"
SERVERS = 4
ADMIN = "fetch_worker_test_admin"
SSL, GSS, CANCEL = 80_877_103, 80_877_104, 80_877_102
PARAMETERS = ("server_version", "server_encoding", "client_encoding", "DateStyle", "TimeZone", "integer_datetimes")


@dataclass(frozen=True, slots=True)
class Pooled:
    """A running pooler: the database URL through it, a function that counts its clients, and its process id."""

    url: str
    clients: Callable[[], int]
    pid: int


class _FairPool:
    """Free server connections, last in first out. The client that waits longest is served first, as in pgbouncer.

    With a plain queue, a client that runs one transaction after another could block other clients for minutes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[socket.socket] = []
        self._waiting: deque[queue.SimpleQueue[socket.socket]] = deque()

    def take(self) -> socket.socket:
        """Wait for a free connection and return it."""
        with self._lock:
            if self._free:
                return self._free.pop()
            handover: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
            self._waiting.append(handover)
        return handover.get()

    def put(self, server: socket.socket) -> None:
        """Give a connection back."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(server)
            else:
                self._free.append(server)


class Pooler:
    """A pooler in transaction mode in front of one database, in threads of this process."""

    def __init__(self, url: str) -> None:
        self.clients = 0
        self._url = url
        self._lock = threading.Lock()
        self._free = _FairPool()
        self._servers: list[socket.socket] = []
        self._welcome = b""
        for _ in range(SERVERS):
            self._free.put(self._connect())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop the pooler and close its server connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for server in self._servers:
            _close(server)

    def _connect(self) -> socket.socket:
        """Return a server connection after the login: from here on both sides send plain protocol messages."""
        with psycopg.connect(self._url, autocommit=True, sslmode="disable", gssencmode="disable") as login:
            parameters = ((name, login.info.parameter_status(name) or "") for name in PARAMETERS)
            status = b"".join(_message(b"S", f"{name}\0{value}\0".encode()) for name, value in parameters)
            ready = _message(b"K", struct.pack("!II", 1, 1)) + _message(b"Z", b"I")
            self._welcome = _message(b"R", struct.pack("!I", 0)) + status + ready
            server = socket.socket(fileno=os.dup(login.fileno()))
            devnull = os.open(os.devnull, os.O_RDWR)
            os.dup2(devnull, login.fileno())  # so that closing `login` does not close the session
            os.close(devnull)
        server.settimeout(None)
        self._servers.append(server)
        return server

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self.clients += 1
        with suppress(OSError), client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            if _wants_session(client):
                client.sendall(self._welcome)
                while (first := _read(client))[:1] != b"X":
                    self._transaction(client, first)
        with self._lock:
            self.clients -= 1

    def _transaction(self, client: socket.socket, message: bytes) -> None:
        server = self._free.take()
        try:
            _forward(client, server, message)
        except OSError:  # in the middle of a transaction: closing the connection rolls it back
            _close(server)
            self._servers.remove(server)
            server = self._connect()
            raise
        finally:
            self._free.put(server)


class _Messages:
    """Splits the byte stream of one side into protocol messages."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> list[bytes]:
        """Add received bytes and return the messages that are complete now."""
        self._rest += data
        messages = []
        while len(self._rest) >= 5 and len(self._rest) >= (size := 1 + struct.unpack("!I", self._rest[1:5])[0]):
            messages.append(self._rest[:size])
            self._rest = self._rest[size:]
        return messages


def _forward(client: socket.socket, server: socket.socket, first: bytes) -> None:
    """Forward data in both directions until the transaction has ended. Raise OSError if either side closes.

    Data is forwarded as it arrives, also parts of messages: PostgreSQL sends results in pieces of 8 KiB, and may hold
    back the rest of a message until it has received the client's Sync.
    """
    requests, answers = _Messages(), _Messages()
    unanswered, unfinished = 0, False

    def forward(data: bytes) -> None:
        nonlocal unanswered, unfinished
        for message in requests.add(data):
            if message[:1] == b"X":
                raise ConnectionResetError
            unfinished = message[:1] not in (b"Q", b"S")
            unanswered += not unfinished
        server.sendall(data)

    forward(first)
    while True:
        readable, _, _ = select.select((client, server), (), ())
        if server in readable:
            data = _read_some(server)
            client.sendall(data)
            for answer in answers.add(data):
                if answer[:1] == b"Z":
                    unanswered -= 1
                    if not unanswered and not unfinished and answer[-1:] == b"I":
                        return
        elif client in readable:
            forward(_read_some(client))


def _read_some(source: socket.socket) -> bytes:
    data = source.recv(65_536)
    if not data:
        raise ConnectionResetError
    return data


def _wants_session(client: socket.socket) -> bool:
    """Read the start of a client connection. Return whether the client wants a session."""
    while True:
        length, code = struct.unpack("!II", _read_exactly(client, 8))
        _read_exactly(client, length - 8)
        if code not in (SSL, GSS):
            return bool(code != CANCEL)
        client.sendall(b"N")


def _read(source: socket.socket) -> bytes:
    header = _read_exactly(source, 5)
    return header + _read_exactly(source, struct.unpack("!I", header[1:])[0] - 4)


def _read_exactly(source: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = source.recv(count - len(received))
        if not piece:
            raise ConnectionResetError
        received += piece
    return received


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def own_pooler(url: str) -> Iterator[Pooled]:
    """Run the Python pooler in front of a database."""
    pooler = Pooler(url)
    try:
        yield Pooled(_pooled_url(url, pooler.port), lambda: pooler.clients, os.getpid())
    finally:
        pooler.close()


@contextmanager
def pgbouncer(url: str, folder: Path, sample: Path | None = None) -> Iterator[Pooled]:
    """Run pgbouncer in front of a database, with the settings of a sample file or with few connections."""
    program = shutil.which("pgbouncer") or missing("pgbouncer")
    server, port = make_url(url), free_port()
    folder.mkdir()
    settings, log = folder / "pgbouncer.ini", folder / "pgbouncer.log"
    password = f" password={server.password}" if server.password else ""
    target = f"host={server.host or '127.0.0.1'} port={server.port or 5_432} user={server.username}{password}"
    default = f"[pgbouncer]\npool_mode = transaction\ndefault_pool_size = {SERVERS}\n"
    text = default if sample is None else sample.read_text(encoding="utf-8")
    settings.write_text(  # of two values in a section, the last one applies
        f"[databases]\n{server.database} = {target}\n{text[text.index('[pgbouncer]') :]}"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\nadmin_users = {ADMIN}\n"
    )

    def clients() -> int:
        admin_url = f"postgresql://{ADMIN}@127.0.0.1:{port}/pgbouncer"
        with psycopg.connect(admin_url, autocommit=True, cursor_factory=psycopg.ClientCursor) as admin:
            return len([row for row in admin.execute(b"SHOW CLIENTS") if server.database in row])

    user = ("--user", "nobody") if os.geteuid() == 0 else ()
    with log.open("wb") as out:
        process = subprocess.Popen([program, *user, settings], stdout=out, stderr=out)
    try:
        _wait_for_port(port, process, log)
        yield Pooled(_pooled_url(url, port), clients, process.pid)
    finally:
        process.terminate()
        process.wait(10)


def _pooled_url(url: str, port: int) -> str:
    return make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
