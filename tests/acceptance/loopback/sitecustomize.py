"""Blocks connections that leave this machine. Python imports this file at start if its folder is on the path."""

import ipaddress
import os
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

_RECORD = Path(os.environ["ACCEPTANCE_CONNECTION_RECORD"])
_OWN_NAMES = {"localhost", socket.gethostname()}
_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_sendto = socket.socket.sendto
_getaddrinfo = socket.getaddrinfo


def _is_local(host: object) -> bool:
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text in _OWN_NAMES
    return address.is_loopback or address.is_unspecified


def _record(operation: str, target: object) -> None:
    with _RECORD.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {operation} {target!r}\n")


def _refuse_foreign(operation: str, sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
        _record(operation, address)
        raise OSError(101, "refused: this address is not on this machine")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    _refuse_foreign("connect", self, address)
    _connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    _refuse_foreign("connect", self, address)
    return _connect_ex(self, address)


def _guarded_sendto(self: socket.socket, *arguments: Any) -> int:
    _refuse_foreign("sendto", self, arguments[-1])
    return _sendto(self, *arguments)


def _is_number(host: object) -> bool:
    """Return whether the system reads `host` as an IP address, without a name server. 2130706433 is one too."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    for parse in (socket.inet_aton, partial(socket.inet_pton, socket.AF_INET6)):
        with suppress(OSError, ValueError):
            parse(text.partition("%")[0])
            return True
    return False


def _guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
    if host is not None and not _is_local(host) and not _is_number(host):
        _record("resolve", host)
        raise socket.gaierror(socket.EAI_NONAME, "refused: names are not resolved in this test")
    return _getaddrinfo(host, *args, **kwargs)


for _name, _guarded in (
    ("connect", _guarded_connect),
    ("connect_ex", _guarded_connect_ex),
    ("sendto", _guarded_sendto),
):
    setattr(socket.socket, _name, _guarded)
socket.getaddrinfo = _guarded_getaddrinfo
