"""Network errors are described by their cause: without bare class names, addresses, or text of a server."""

import errno
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests
import trustme
from urllib3.exceptions import ConnectTimeoutError, DecodeError, NewConnectionError, ProxyError, ReadTimeoutError

from tests.web import Web, drips, sends
from worker.net.deadlines import LookUpTimeout, TimeLimit
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter

NAME = "localhost"
TODAY = datetime.now(UTC)


@contextmanager
def tls_server(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """Run a listener that passes each connection to `serve`. Yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client, suppress(OSError):
                    serve(client)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def _failure(url: str, bundle: Path | None = None) -> str:
    adapter = PooledAdapter(connections=1, ca_bundle=None if bundle is None else str(bundle))
    with (
        TimeLimit(5.0),
        pytest.raises(Exception) as failure,  # noqa: PT011  # whatever it is, it is described
        adapter.exchange("GET", url, {}, (2.0, 1.0)),
    ):
        pass
    return describe(failure.value)


def _during_handshake(
    certificate: trustme.LeafCert, version: ssl.TLSVersion | None = None
) -> Callable[[socket.socket], object]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)

    def serve(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True):
            pass

    return serve


def _alerts(client: socket.socket, number: int) -> None:
    """Answer a handshake with a fatal alert."""
    client.recv(10_000)
    client.sendall(b"\x15\x03\x03\x00\x02\x02" + bytes([number]))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """A certificate authority."""
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    """A CA bundle with this authority."""
    path = tmp_path / "bundle.pem"
    authority.cert_pem.write_to_path(path)
    return path


def test_each_certificate_error_is_described(authority: trustme.CA, bundle: Path) -> None:
    """Not only that there is a TLS error."""
    day = timedelta(days=1)
    cases = {
        "TLS: its certificate has expired": authority.issue_cert(
            NAME, not_before=TODAY - 9 * day, not_after=TODAY - day
        ),
        "TLS: its certificate is not yet valid": authority.issue_cert(
            NAME, not_before=TODAY + day, not_after=TODAY + 9 * day
        ),
        "TLS: its certificate is for another name": authority.issue_cert("elsewhere.test"),
        "TLS: the authority that issued its certificate is unknown": trustme.CA().issue_cert(NAME),
    }
    for cause, certificate in cases.items():
        with tls_server(_during_handshake(certificate)) as port:
            assert _failure(f"https://{NAME}:{port}/", bundle).startswith(cause)


def test_each_handshake_error_is_described(authority: trustme.CA, bundle: Path) -> None:
    """A server without TLS, one that hangs up, and one that refuses."""
    with tls_server(lambda client: client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert _failure(f"https://{NAME}:{port}/", bundle) == "TLS: it does not speak TLS on this port"
    with tls_server(lambda client: client.recv(10_000)) as port:
        assert _failure(f"https://{NAME}:{port}/", bundle) in (
            "TLS: the connection was cut",
            "the connection was reset",
        )
    with tls_server(lambda client: _alerts(client, 70)) as port:  # protocol_version
        assert _failure(f"https://{NAME}:{port}/", bundle) == "TLS: no common TLS protocol version"
    with tls_server(lambda client: _alerts(client, 112)) as port:  # unrecognized_name
        assert "does not know the name" in _failure(f"https://{NAME}:{port}/", bundle)


def test_each_transfer_error_is_described(web: Web) -> None:
    """By plain HTTP."""
    web.serves("/closed", sends())
    web.serves("/garbage", sends(b"garbage\r\n\r\n"))
    web.serves("/silent", drips(b"", b"", every=1.5, seconds=1.5))
    assert _failure(f"{web.url}/closed") == "the connection was closed without an answer"
    assert _failure(f"{web.url}/garbage") == "what was answered is no HTTP"
    assert _failure(f"{web.url}/silent") == "time-out while waiting for the answer"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert _failure(f"http://127.0.0.1:{port}/") == "connection refused"


def _verification(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, message
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ECONNRESET, "x"), "the connection was reset"),
        (OSError(errno.EHOSTUNREACH, "x"), "no route to the host"),
        (OSError(errno.ENETUNREACH, "x"), "no route to its network"),
        (OSError(errno.EMFILE, "x"), "this process has too many open files"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "its name is not known"),
        (socket.gaierror(socket.EAI_AGAIN, "x"), "its name can't be looked up for now"),
        (LookUpTimeout("x"), "time-out while looking up its name"),
        (http.client.IncompleteRead(b""), "the answer was cut off"),
        (ConnectTimeoutError("x"), "time-out while connecting"),
        (ReadTimeoutError(None, "http://h", "x"), "time-out while waiting for the answer"),  # type: ignore[arg-type]
        (requests.ConnectionError(NewConnectionError(None, "x")), "no connection"),  # type: ignore[arg-type]
        (requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support."), "a SOCKS proxy needs"),
        (ProxyError("x", OSError("Tunnel connection failed: 407 Auth")), "the proxy: it refuses the tunnel (407)"),
        (ProxyError("x", ConnectionRefusedError(errno.ECONNREFUSED, "x")), "the proxy: connection refused"),
        (_verification(18, "self-signed certificate"), "TLS: its certificate is self-signed"),
        (_verification(85, "Missing Authority Key Identifier"), "TLS: its certificate lacks an extension (Missing"),
        (_verification(92, "something new"), "TLS: its certificate is not valid (something new)"),
        (DecodeError("x"), "the answer is not packed as it says"),
    ],
)
def test_errors_of_libraries_are_described(error: Exception, cause: str) -> None:
    """Whichever library wrapped it."""
    assert describe(error).startswith(cause)
    outer = requests.ConnectionError("https://h/?signature=secret")
    outer.__cause__ = error
    assert describe(outer).startswith(cause)
    assert "secret" not in describe(outer)
