"""Poolers in transaction mode: pgbouncer where it is found, and one of our own that does the same everywhere.

Ours hands a server's connection to another client as soon as a transaction is over, and never resets it: what a client
leaves behind in a session, the next one finds.
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
TOLD = ("server_version", "server_encoding", "client_encoding", "DateStyle", "TimeZone", "integer_datetimes")


@dataclass(frozen=True, slots=True)
class Pooled:
    """The URL that leads through a pooler, how many clients it has now, and the process that it is."""

    url: str
    clients: Callable[[], int]
    pid: int


class _FairPool:
    """The server connections that are free, the last one first. Whoever waits longest gets the next, as in pgbouncer.

    With a plain queue a client whose transactions follow one another closely could keep the others waiting for minutes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[socket.socket] = []
        self._waiting: deque[queue.SimpleQueue[socket.socket]] = deque()

    def take(self) -> socket.socket:
        """Return a connection, once there is one."""
        with self._lock:
            if self._free:
                return self._free.pop()
            mine: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
            self._waiting.append(mine)
        return mine.get()

    def put(self, server: socket.socket) -> None:
        """Give a connection back."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(server)
            else:
                self._free.append(server)


class Pooler:
    """In front of one database."""

    def __init__(self, url: str) -> None:
        self.clients = 0
        self._url = url
        self._lock = threading.Lock()
        self._free = _FairPool()
        self._servers: list[socket.socket] = []
        self._welcome = b""
        for _ in range(SERVERS):
            self._free.put(self._connected())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends it, with the server's connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for server in self._servers:
            _end(server)

    def _connected(self) -> socket.socket:
        """A server's connection after the login, from where on both sides speak plain messages."""
        with psycopg.connect(self._url, autocommit=True, sslmode="disable", gssencmode="disable") as login:
            told = ((name, login.info.parameter_status(name) or "") for name in TOLD)
            status = b"".join(_message(b"S", f"{name}\0{value}\0".encode()) for name, value in told)
            ready = _message(b"K", struct.pack("!II", 1, 1)) + _message(b"Z", b"I")
            self._welcome = _message(b"R", struct.pack("!I", 0)) + status + ready
            server = socket.socket(fileno=os.dup(login.fileno()))
            devnull = os.open(os.devnull, os.O_RDWR)
            os.dup2(devnull, login.fileno())  # its farewell is not for the server
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
            if _greeted(client):
                client.sendall(self._welcome)
                while (first := _read(client))[:1] != b"X":
                    self._transaction(client, first)
        with self._lock:
            self.clients -= 1

    def _transaction(self, client: socket.socket, message: bytes) -> None:
        server = self._free.take()
        try:
            _pass_on(client, server, message)
        except OSError:  # in the middle of a transaction, which ends with its connection
            _end(server)
            self._servers.remove(server)
            server = self._connected()
            raise
        finally:
            self._free.put(server)


class _Messages:
    """Finds the messages in what one side sends, however it is cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> list[bytes]:
        """Return the messages that are whole by now."""
        self._rest += data
        messages = []
        while len(self._rest) >= 5 and len(self._rest) >= (size := 1 + struct.unpack("!I", self._rest[1:5])[0]):
            messages.append(self._rest[:size])
            self._rest = self._rest[size:]
        return messages


def _pass_on(client: socket.socket, server: socket.socket, first: bytes) -> None:
    """Pass on what both send until the server is ready, and in no transaction. Raises OSError if either goes away.

    Nothing waits for the rest of a message: PostgreSQL sends its results in pieces of 8 KiB, and may hold back the rest
    of a message until the client's Sync has come.
    """
    asked, answered = _Messages(), _Messages()
    unanswered, unfinished = 0, False

    def forward(data: bytes) -> None:
        nonlocal unanswered, unfinished
        for message in asked.add(data):
            if message[:1] == b"X":
                raise ConnectionResetError
            unfinished = message[:1] not in (b"Q", b"S")
            unanswered += not unfinished
        server.sendall(data)

    forward(first)
    while True:
        readable, _, _ = select.select((client, server), (), ())
        if server in readable:
            data = _some(server)
            client.sendall(data)
            for answer in answered.add(data):
                if answer[:1] == b"Z":
                    unanswered -= 1
                    if not unanswered and not unfinished and answer[-1:] == b"I":
                        return
        elif client in readable:
            forward(_some(client))


def _some(source: socket.socket) -> bytes:
    data = source.recv(65_536)
    if not data:
        raise ConnectionResetError
    return data


def _greeted(client: socket.socket) -> bool:
    """Hears what a client begins with; whether it wants a session."""
    while True:
        length, code = struct.unpack("!II", _exactly(client, 8))
        _exactly(client, length - 8)
        if code not in (SSL, GSS):
            return bool(code != CANCEL)
        client.sendall(b"N")


def _read(source: socket.socket) -> bytes:
    head = _exactly(source, 5)
    return head + _exactly(source, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(source: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = source.recv(count - len(received))
        if not piece:
            raise ConnectionResetError
        received += piece
    return received


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def own_pooler(url: str) -> Iterator[Pooled]:
    """Ours, in front of a database."""
    made = Pooler(url)
    try:
        yield Pooled(_through(url, made.port), lambda: made.clients, os.getpid())
    finally:
        made.close()


@contextmanager
def pgbouncer(url: str, folder: Path, sample: Path | None = None) -> Iterator[Pooled]:
    """The real one, in front of a database, as a sample says or with few connections."""
    program = shutil.which("pgbouncer") or missing("pgbouncer")
    server, port = make_url(url), free_port()
    folder.mkdir()
    settings, log = folder / "pgbouncer.ini", folder / "pgbouncer.log"
    password = f" password={server.password}" if server.password else ""
    target = f"host={server.host or '127.0.0.1'} port={server.port or 5_432} user={server.username}{password}"
    few = f"[pgbouncer]\npool_mode = transaction\ndefault_pool_size = {SERVERS}\n"
    text = few if sample is None else sample.read_text(encoding="utf-8")
    settings.write_text(  # what stands last in a section is what counts
        f"[databases]\n{server.database} = {target}\n{text[text.index('[pgbouncer]') :]}"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\nadmin_users = {ADMIN}\n"
    )

    def clients() -> int:
        admin_url = f"postgresql://{ADMIN}@127.0.0.1:{port}/pgbouncer"
        with psycopg.connect(admin_url, autocommit=True, cursor_factory=psycopg.ClientCursor) as admin:
            return len([row for row in admin.execute(b"SHOW CLIENTS") if server.database in row])

    who = ("--user", "nobody") if os.geteuid() == 0 else ()
    with log.open("wb") as out:
        process = subprocess.Popen([program, *who, settings], stdout=out, stderr=out)
    try:
        _until_listening(port, process, log)
        yield Pooled(_through(url, port), clients, process.pid)
    finally:
        process.terminate()
        process.wait(10)


def _through(url: str, port: int) -> str:
    return make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


def _until_listening(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
