"""Describes why a connection or request failed, for operators. Only this module knows the libraries' errors."""

import errno
import http.client
import socket
import ssl
from collections.abc import Iterator

import requests
from urllib3 import exceptions as urllib3_errors

from worker.net.deadlines import LookUpTimeout

MAX_CAUSES = 32

# The codes of OpenSSL's X509_verify_cert_error_string, with texts of this project.
_CERTIFICATES = {
    2: "the authority that issued its certificate is unknown",
    9: "its certificate is not yet valid: check the clocks",
    10: "its certificate has expired",
    18: "its certificate is self-signed",
    19: "its certificate chain ends in a self-signed certificate that is not trusted",
    20: "the authority that issued its certificate is unknown",
    21: "the authority that issued its certificate is unknown",
    23: "its certificate is revoked",
    62: "its certificate is for another name",
    64: "its certificate is for another address",
}

# Parts of OpenSSL's reason codes, most specific first.
_TLS_REASONS = (
    ("UNRECOGNIZED_NAME", "it does not know the name that was asked for"),
    ("CERTIFICATE_REQUIRED", "it wants a client certificate"),
    ("HANDSHAKE_FAILURE", "it refuses the handshake: no common protocol version or cipher"),
    ("PROTOCOL_VERSION", "no common TLS protocol version"),
    ("UNSUPPORTED_PROTOCOL", "no common TLS protocol version"),
    ("NO_PROTOCOLS", "no common TLS protocol version"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS on this port"),
    ("HTTP_REQUEST", "it does not speak TLS on this port"),
    ("RECORD_LAYER_FAILURE", "it does not speak TLS on this port"),
    ("PACKET_LENGTH", "it does not speak TLS on this port"),
    ("KEY_TOO_SMALL", "its key is too short for this system"),
    ("MD_TOO_WEAK", "its certificate has a signature that is too weak for this system"),
    ("ALERT_UNKNOWN_CA", "it does not trust our client certificate"),
    ("UNEXPECTED_EOF", "the connection was cut"),
    ("EOF", "the connection was cut"),
)
_SYSTEM = {
    errno.ECONNREFUSED: "connection refused",
    errno.ECONNRESET: "the connection was reset",
    errno.ECONNABORTED: "the connection was aborted",
    errno.EPIPE: "the connection was closed while we were sending",
    errno.ESHUTDOWN: "the connection was closed",
    errno.ENOTCONN: "the connection was closed",
    errno.EHOSTUNREACH: "no route to the host",
    errno.EHOSTDOWN: "the host is down",
    errno.ENETUNREACH: "no route to its network",
    errno.ENETDOWN: "the network is down",
    errno.EADDRNOTAVAIL: "no address to connect to or from",
    errno.EAFNOSUPPORT: "this system lacks the address's family (IPv6, say)",
    errno.EACCES: "this system forbids the connection",
    errno.EPERM: "this system forbids the connection",
    errno.EMFILE: "this process has too many open files",
    errno.ENFILE: "this system has too many open files",
    errno.ETIMEDOUT: "time-out while connecting",
}


def describe(error: BaseException) -> str:
    """Return why a request failed, in a few words, without addresses, keys, or text from a server.

    >>> describe(ConnectionRefusedError(111, "Connection refused"))
    'connection refused'
    """
    causes = list(_causes(error))
    text = next(filter(None, (_describe_system_error(causes, cause) for cause in reversed(causes))), None)
    if text is None:
        text = next(filter(None, map(_describe_library_error, causes)), f"an unexpected error ({_name(error)})")
    if any(isinstance(cause, (urllib3_errors.ProxyError, requests.exceptions.ProxyError)) for cause in causes):
        return f"the proxy: {text}"
    return text


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it wraps, the innermost last. Libraries store them in four places."""
    visited: set[int] = set()
    pending = [error]
    while pending and len(visited) < MAX_CAUSES:
        cause = pending.pop(0)
        if id(cause) in visited:
            continue
        visited.add(id(cause))
        yield cause
        wrapped = [cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)]
        wrapped += [getattr(cause, name, None) for name in ("reason", "original_error")]
        wrapped.append(getattr(cause, "kwargs", {}).get("error"))  # botocore's
        pending += [item for item in (*wrapped, *cause.args) if isinstance(item, BaseException)]


def _describe_system_error(causes: list[BaseException], cause: BaseException) -> str | None:
    """Describe an error of the system or of TLS itself, or return None."""
    match cause:
        case ssl.SSLCertVerificationError():
            return f"TLS: {_certificate(cause)}"
        case ssl.SSLError():
            return f"TLS: {_tls(cause)}"
        case LookUpTimeout():
            return "time-out while looking up its name"
        case socket.gaierror():
            return _look_up(cause)
        case TimeoutError():
            return _time_out(causes)
        case http.client.RemoteDisconnected():
            return "the connection was closed without an answer"
        case OSError() if cause.errno in _SYSTEM:
            return _SYSTEM[cause.errno]
        case OSError() if str(cause).startswith("Tunnel connection failed: "):
            return f"it refuses the tunnel ({str(cause).removeprefix('Tunnel connection failed: ')[:3]})"
        case http.client.IncompleteRead():
            return "the answer was cut off"
        case http.client.HTTPException():
            return "what was answered is no HTTP"
        case _:
            return None


def _describe_library_error(cause: BaseException) -> str | None:
    """Describe a library's own error, for which no cause is known, or return None."""
    match cause:
        case requests.exceptions.InvalidSchema() if "SOCKS" in str(cause):
            return "a SOCKS proxy needs an extension: pip install 'requests[socks]'"
        case urllib3_errors.NameResolutionError():
            return "its name is not known"
        case urllib3_errors.NewConnectionError():  # a subclass of the time-out error, for old callers
            return "no connection"
        case urllib3_errors.ConnectTimeoutError() | requests.exceptions.ConnectTimeout():
            return "time-out while connecting"
        case urllib3_errors.TimeoutError() | requests.exceptions.Timeout():
            return "time-out while waiting for the answer"
        case urllib3_errors.SSLError() | requests.exceptions.SSLError():
            return "TLS: the handshake failed"
        case urllib3_errors.IncompleteRead() | requests.exceptions.ChunkedEncodingError():
            return "the answer was cut off"
        case urllib3_errors.DecodeError() | requests.exceptions.ContentDecodingError():
            return "the answer is not packed as it says"
        case urllib3_errors.InvalidHeader() | requests.exceptions.InvalidHeader():
            return "a header is malformed"
        case urllib3_errors.LocationValueError() | requests.exceptions.InvalidURL() | UnicodeError():
            return "the address is malformed"
        case urllib3_errors.ProtocolError():
            return "the connection broke"
        case _:
            return None


def _certificate(error: ssl.SSLCertVerificationError) -> str:
    code = getattr(error, "verify_code", None)
    message = str(getattr(error, "verify_message", "") or "")
    text = _CERTIFICATES.get(code or 0)
    if text is None and "missing" in message.lower():  # Python 3.13 enforces RFC 5280 strictly
        return f"its certificate lacks an extension ({message[:60]})"
    if text is None:
        return f"its certificate is not valid ({message[:60] or 'no reason given'})"
    return text


def _tls(error: ssl.SSLError) -> str:
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "the connection was cut"
    reason = (error.reason or str(error)).upper().replace(" ", "_")
    text = next((meaning for part, meaning in _TLS_REASONS if part in reason), None)
    return text or f"the handshake failed ({reason[:60].lower().replace('_', ' ')})"


def _look_up(error: socket.gaierror) -> str:
    if error.errno == socket.EAI_AGAIN:
        return "its name can't be looked up for now"
    return "its name is not known"


def _time_out(causes: list[BaseException]) -> str:
    if any(
        isinstance(cause, (urllib3_errors.ConnectTimeoutError, requests.exceptions.ConnectTimeout)) for cause in causes
    ):
        return "time-out while connecting"
    return "time-out while waiting for the answer"


def _name(error: BaseException) -> str:
    return type(error).__name__
