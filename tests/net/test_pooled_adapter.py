"""The pooled adapter with real keep-alive servers: it works like `requests`, and opens few connections."""

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import trustme
from pydantic import SecretStr
from requests.adapters import HTTPAdapter

from tests.web import page, sends, web_server
from worker.core.reply import ApiDown, Processing, Reply
from worker.net import deadlines, pooled_adapter
from worker.net.deadlines import TimeLimit, look_up, tls_context
from worker.net.pooled_adapter import PooledAdapter
from worker.polling.api_client import ApiClient
from worker.system.redaction import Scrubber
from worker.vendor.fetch_url import AllowedApi, fetch_address

pytestmark = pytest.mark.every_python

KEY = "canary-key-1c0de"
PROCESSING = b'{"status": "processing"}'
NAME = "localhost"


@dataclass
class KeepAliveServer:
    """A server that keeps connections open. It counts connections and records all requests."""

    port: int = 0
    scheme: str = "http"
    connections: int = 0
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    hangs_up: bool = False  # after each answer, without notice
    forgets: bool = False  # connections that had an answer: later requests on them get no answer
    says_close: bool = False
    seconds: float = 0.0

    @property
    def origin(self) -> str:
        """The server's origin."""
        return f"{self.scheme}://{NAME}:{self.port}"

    @property
    def allowed(self) -> AllowedApi:
        """The allowed API at this server."""
        return AllowedApi(f"{self.origin}/api/v3", frozenset({f"{NAME}:{self.port}"}))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65_536  # an answer is sent in one piece
    site: ClassVar[KeepAliveServer]

    def setup(self) -> None:
        super().setup()
        self.site.connections += 1
        self.answered = False

    def do_POST(self) -> None:
        """Answer that the job is not ready."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.site.forgets and self.answered:
            self.close_connection = True
            return
        self.answered = True
        self.site.requests.append((self.command, self.path, body))
        time.sleep(self.site.seconds)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PROCESSING)))
        if self.site.says_close:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(PROCESSING)
        self.wfile.flush()
        if self.site.hangs_up:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Do nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up."""


@contextmanager
def keep_alive_server(context: ssl.SSLContext | None = None) -> Iterator[KeepAliveServer]:
    """Run a server on a free port."""
    site = KeepAliveServer(scheme="https" if context else "http")
    server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"site": site}))
    site.port = server.server_address[1]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site() -> Iterator[KeepAliveServer]:
    """A server without TLS."""
    with keep_alive_server() as running:
        yield running


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority that only these tests trust."""
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    """A CA bundle with this authority."""
    path = tmp_path / "bundle.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[KeepAliveServer]:
    """A server with a certificate for its name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(NAME).configure_cert(context)
    with keep_alive_server(context) as running:
        yield running


class ClientFactory:
    """Creates API clients, and closes their connections in the end."""

    def __init__(self) -> None:
        self.made: list[ApiClient] = []

    def __call__(self, site: KeepAliveServer, **options: Any) -> ApiClient:
        """Create a client for a server."""
        self.made.append(ApiClient(site.allowed, Scrubber([KEY]), **({"timeout": 5.0, "connections": 4} | options)))
        return self.made[-1]


@pytest.fixture
def make_client() -> Iterator[ClientFactory]:
    """Creates API clients."""
    apis = ClientFactory()
    yield apis
    for api in apis.made:
        api.session.close()


def _ask(api: ApiClient, site: KeepAliveServer, remote_id: str = "1") -> Reply:
    return api.ask(fetch_address(None, remote_id, site.allowed), remote_id, SecretStr(KEY)).reply


def test_given_consecutive_requests_to_a_keep_alive_server_then_one_connection_serves_all(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    api = make_client(site)

    assert [_ask(api, site, str(number)) for number in range(20)] == [Processing()] * 20

    assert site.connections == 1
    assert [path for _, path, _ in site.requests] == [f"/api/v3/fetch/{number}" for number in range(20)]
    assert {body for _, _, body in site.requests} == {json.dumps({"key": KEY}).encode()}


def test_given_many_threads_then_each_has_a_connection_and_gets_its_own_answers(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    site.seconds = 0.05
    api = make_client(site, connections=8)

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda number: _ask(api, site, str(number)), range(64)))

    assert replies == [Processing()] * 64
    assert sorted(int(path.rpartition("/")[2]) for _, path, _ in site.requests) == list(range(64))
    assert site.connections <= 8


def test_given_a_pooled_connection_that_the_server_closed_then_a_new_one_is_opened(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    site.hangs_up = True
    api = make_client(site)

    for number in range(5):
        assert _ask(api, site) == Processing()
        time.sleep(0.05)  # a hang-up takes a moment to arrive
        assert site.connections == number + 1


def test_given_connections_that_a_balancer_dropped_then_no_request_fails_and_none_of_them_is_used(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    site.seconds = 0.1
    api = make_client(site, connections=8)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: _ask(api, site, str(number)), range(8)))
    opened, site.seconds = site.connections, 0.0
    site.forgets = True

    assert _ask(api, site, "again") == Processing()
    assert _ask(api, site, "and-again") == Processing()

    assert opened == 8
    assert site.connections == opened + 2


def test_given_a_connection_that_was_idle_for_long_then_a_new_one_is_opened(
    site: KeepAliveServer, make_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_client(site)
    _ask(api, site)
    monkeypatch.setattr(pooled_adapter, "IDLE_SECONDS", -1.0)

    assert _ask(api, site) == Processing()

    assert site.connections == 2


def test_given_a_dropped_connection_when_the_time_is_up_then_the_request_is_not_repeated(
    site: KeepAliveServer, make_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_client(site)
    _ask(api, site)
    site.forgets = True
    monkeypatch.setattr(pooled_adapter, "MIN_RETRY_SECONDS", 60.0)

    assert isinstance(_ask(api, site), ApiDown)

    assert site.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n",  # ends within its headers
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + PROCESSING,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + PROCESSING,
        b"HTTP/1.1 200 OK\r\nContent-Length: 4, 5\r\n\r\n" + PROCESSING,
        b"SMTP ready\r\n\r\n",
    ],
)
def test_given_a_truncated_or_missing_answer_then_it_is_a_connection_error(
    answer: bytes, make_client: ClientFactory
) -> None:
    with web_server() as web:
        site = KeepAliveServer(port=web.port)
        web.serves("/api/v3/fetch/1", sends(answer))

        assert isinstance(_ask(make_client(site), site), ApiDown)


def test_given_an_empty_answer_that_claims_to_be_chunked_then_no_chunk_is_awaited(make_client: ClientFactory) -> None:
    with web_server() as web:
        site = KeepAliveServer(port=web.port)
        web.serves("/api/v3/fetch/1", sends(b"HTTP/1.1 204 None\r\nTransfer-Encoding: chunked\r\n\r\n"))
        began = time.monotonic()

        assert not isinstance(_ask(make_client(site), site), ApiDown)

        assert time.monotonic() - began < 2.0


def test_given_connection_close_then_the_connection_is_not_used_again(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    site.says_close = True
    api = make_client(site)

    assert [_ask(api, site) for _ in range(10)] == [Processing()] * 10

    assert site.connections == 10


def test_given_an_answer_without_a_length_then_its_connection_is_not_pooled() -> None:
    with web_server() as web:  # hangs up after each answer, which marks its end
        web.serves("/api/v3/fetch/1", sends(b"HTTP/1.1 200 OK\r\n\r\n" + PROCESSING))
        adapter = PooledAdapter(limit=1_000, connections=4)

        assert adapter.post(f"{web.url}/api/v3/fetch/1", {}, b"{}", (1.0, 1.0)).body == PROCESSING

        assert not any(adapter._idle.values())


def test_given_more_connections_than_the_limit_then_the_surplus_is_closed(site: KeepAliveServer) -> None:
    site.seconds = 0.1
    adapter = PooledAdapter(limit=1_000, connections=2)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: adapter.post(f"{site.origin}/x", {"Content-Length": "2"}, b"{}", (1, 1)), range(6)))

    assert [len(lines) for lines in adapter._idle.values()] == [2]
    adapter.close()
    assert not any(adapter._idle.values())


def test_given_a_custom_adapter_when_mounted_then_it_sends_every_request(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    sent: list[str | None] = []

    class Own(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
            sent.append(request.url)
            return super().send(request, *arguments, **options)

    api = make_client(site)
    api.session.mount(site.origin, Own())

    assert _ask(api, site) == Processing()

    assert sent == [f"{site.origin}/api/v3/fetch/1"]


def test_given_a_plain_proxy_when_configured_then_requests_go_through_it_only(
    site: KeepAliveServer, make_client: ClientFactory
) -> None:
    with web_server() as proxy:
        proxy.serves(f"{site.origin}/api/v3/fetch/1", page(200, PROCESSING))
        api = make_client(site, proxy=f"http://user:word@127.0.0.1:{proxy.port}")

        assert _ask(api, site) == Processing()

    [request] = proxy.requests
    assert request.path == f"{site.origin}/api/v3/fetch/1"
    assert request.headers["proxy-authorization"].startswith("Basic ")
    assert site.connections == 0


def test_given_a_proxy_and_an_https_api_then_a_tunnel_is_used_and_the_proxy_never_sees_the_key(
    secure: KeepAliveServer, bundle: Path, make_client: ClientFactory
) -> None:
    with tunnel_proxy() as (port, forwarded):
        api = make_client(secure, proxy=f"http://127.0.0.1:{port}", ca_bundle=str(bundle))

        assert [_ask(api, secure) for _ in range(3)] == [Processing()] * 3

    assert secure.connections == 1
    assert bytes(forwarded).startswith(f"CONNECT {NAME}:{secure.port}".encode())
    assert KEY.encode() not in forwarded


def test_given_a_proxy_that_never_opens_its_tunnel_then_the_request_ends_in_time(
    secure: KeepAliveServer, bundle: Path, make_client: ClientFactory
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        api = make_client(secure, proxy=proxy, ca_bundle=str(bundle), timeout=0.5)
        started = time.monotonic()

        assert isinstance(_ask(api, secure), ApiDown)

        assert time.monotonic() - started < 5.0


@contextmanager
def tunnel_proxy() -> Iterator[tuple[int, bytearray]]:
    """A proxy that opens tunnels. Yield its port and the bytes that it forwarded."""
    forwarded = bytearray()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65_536):
                forwarded.extend(block)
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        with client:
            dig(client)

    def dig(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65_536)
        forwarded.extend(head)
        host, _, port = head.split()[1].decode().partition(":")
        with socket.create_connection((host, int(port))) as target_socket:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            backward = threading.Thread(target=pump, args=(target_socket, client), daemon=True)
            backward.start()
            pump(client, target_socket)
            backward.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], forwarded
        listener.shutdown(socket.SHUT_RDWR)


def test_given_a_ca_bundle_then_one_tls_context_serves_every_connection(
    secure: KeepAliveServer, bundle: Path, monkeypatch: pytest.MonkeyPatch, make_client: ClientFactory
) -> None:
    loaded: list[str | None] = []

    def load(ca_bundle: str | None) -> ssl.SSLContext:
        loaded.append(ca_bundle)
        return tls_context(ca_bundle)

    monkeypatch.setattr(deadlines, "tls_context", load)
    secure.says_close = True
    api = make_client(secure, ca_bundle=str(bundle))

    assert [_ask(api, secure) for _ in range(5)] == [Processing()] * 5

    assert secure.connections == 5
    assert loaded == [str(bundle)]


def test_given_a_folder_of_certificates_as_the_bundle_then_it_is_used(tmp_path: Path) -> None:
    assert tls_context(str(tmp_path)).cert_store_stats()["x509_ca"] == 0  # loaded when needed


def test_given_an_untrusted_certificate_then_it_is_a_tls_error_and_nothing_is_sent(
    secure: KeepAliveServer, make_client: ClientFactory
) -> None:
    reply = _ask(make_client(secure), secure)

    assert isinstance(reply, ApiDown)
    assert "TLS" in reply.message
    assert secure.requests == []


def test_given_a_certificate_for_another_name_then_it_is_refused(
    authority: trustme.CA, bundle: Path, make_client: ClientFactory
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("elsewhere.test").configure_cert(context)
    with keep_alive_server(context) as other_server:
        reply = _ask(make_client(other_server, ca_bundle=str(bundle)), other_server)

        assert isinstance(reply, ApiDown)
        assert "TLS" in reply.message
        assert other_server.requests == []


def test_given_a_very_slow_handshake_then_the_request_ends_in_time(bundle: Path, make_client: ClientFactory) -> None:
    def drip(client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                time.sleep(0.1)
                client.sendall(b"\x16\x03\x03\x40\x00"[:1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: drip(listener.accept()[0]), daemon=True).start()
        silent = KeepAliveServer(port=listener.getsockname()[1], scheme="https")
        started = time.monotonic()

        reply = _ask(make_client(silent, ca_bundle=str(bundle), timeout=0.5), silent)

    assert isinstance(reply, ApiDown)
    assert time.monotonic() - started < 5.0


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_a_hanging_name_server_then_the_request_ends_in_time_and_the_look_up_is_not_repeated(
    site: KeepAliveServer, monkeypatch: pytest.MonkeyPatch, make_client: ClientFactory
) -> None:
    release, looked_up = threading.Event(), list[str]()
    real = socket.getaddrinfo

    def hangs(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(str(host))
        release.wait(10)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    api = make_client(site, timeout=0.4)
    started = time.monotonic()
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda _: _ask(api, site), range(6)))
    seconds = time.monotonic() - started
    release.set()

    assert all(isinstance(reply, ApiDown) for reply in replies)
    assert seconds < 2.2
    assert looked_up == [NAME]


def test_given_a_failed_look_up_when_repeated_then_the_name_server_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [socket.gaierror("no such name"), [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))]]

    def answer(*_: Any, **__: Any) -> Any:
        result = answers.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(socket, "getaddrinfo", answer)

    with pytest.raises(OSError, match="no such name"):
        look_up("somewhere.test", 80, 2.0)
    assert look_up("somewhere.test", 80, 2.0) == [(socket.AF_INET, ("127.0.0.1", 80))]


def test_given_an_invalid_name_when_looked_up_then_it_is_an_ordinary_error() -> None:
    with pytest.raises(OSError, match="label"):
        look_up("a" * 70 + ".test", 80, 2.0)


def test_given_an_address_literal_when_looked_up_then_no_thread_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Thread", None)

    assert look_up("127.0.0.1", 80, 1.0) == [(socket.AF_INET, ("127.0.0.1", 80))]
    assert look_up("::1", 80, 1.0)[0][0] == socket.AF_INET6


def test_given_several_silent_addresses_when_connecting_then_all_together_take_at_most_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        port = full.getsockname()[1]
        fillers = []
        for _ in range(8):  # fills the queue of the listener, which then answers no more
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        monkeypatch.setattr(deadlines, "look_up", lambda *_: [(socket.AF_INET, ("127.0.0.1", port))] * 20)
        adapter = PooledAdapter(limit=1_000, connections=2)
        started = time.monotonic()

        with TimeLimit(0.6), pytest.raises(requests.RequestException):
            adapter.post(f"http://{NAME}:{port}/x", {"Content-Length": "2"}, b"{}", (5.0, 5.0))

        assert time.monotonic() - started < 5.0
        for filler in fillers:
            filler.close()


def test_given_a_deadline_that_is_removed_then_the_deadline_of_the_next_call_stays() -> None:
    """The next call may take a connection before the last one has removed its deadline."""
    own, peer = socket.socketpair()
    handle, watchdog = deadlines.SocketHandle(own), deadlines.DeadlineWatchdog()
    watchdog.watch(handle, time.monotonic() + 60.0)
    first = next(iter(watchdog._deadlines))[1]
    watchdog.watch(handle, time.monotonic() + 0.2)

    watchdog.forget(handle, first)

    peer.settimeout(10.0)
    assert peer.recv(1) == b"", "the connection is shut down at the second deadline"
    own.close()
    peer.close()


def test_given_a_call_that_ended_when_its_connection_is_closed_then_the_server_notices() -> None:
    """The watchdog's thread keeps no connection open."""
    own, peer = socket.socketpair()
    handle, watchdog = deadlines.SocketHandle(own), deadlines.DeadlineWatchdog()
    until = time.monotonic() + 60.0
    watchdog.watch(handle, until)
    time.sleep(3 * deadlines.CHECK_SECONDS)

    watchdog.forget(handle, until)
    del handle
    own.close()

    peer.settimeout(10.0)
    assert peer.recv(1) == b""
    peer.close()


def test_given_more_hosts_than_the_limit_then_the_number_of_open_connections_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pooled_adapter, "MAX_ORIGINS", 3)
    adapter = PooledAdapter(connections=2, limit=10_000)
    with ExitStack() as servers:
        for _ in range(6):
            site = servers.enter_context(keep_alive_server())
            with TimeLimit(5.0):
                adapter.post(f"http://127.0.0.1:{site.port}/fetch/1", {"Content-Length": "2"}, b"{}", (2, 2))
        assert len(adapter._idle) == 3
        adapter.close()
