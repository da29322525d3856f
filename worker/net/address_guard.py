"""Decides which addresses downloads and webhooks may connect to. The address of the actual connection is checked.

A name is resolved once per connection, every address is checked, and the socket connects to a checked address. So a
name that changes its address between check and connection gains nothing.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from urllib3.util import parse_url

from worker.net.deadlines import TimedHTTPConnection, TimedHTTPSConnection, connect_first
from worker.net.pooled_adapter import PooledAdapter

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The special-purpose address registries of IANA, as of October 2025:
#   https://www.iana.org/assignments/iana-ipv4-special-registry
#   https://www.iana.org/assignments/iana-ipv6-special-registry
# Blocks inside of larger ones are left out. Some blocks in 192.0.0.0/24 and 2001::/23, the AS112 and AMT blocks and
# 64:ff9b::/96 are reachable from the internet. They are listed all the same: no output is stored there, and they lead
# to other addresses or to nothing.
_SPECIAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",  # with the metadata service 100.100.100.200
        "127.0.0.0/8",
        "169.254.0.0/16",  # with the metadata service 169.254.169.254
        "172.16.0.0/12",
        "192.0.0.0/24",  # with the metadata service 192.0.0.192
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "240.0.0.0/4",
        "::/128",
        "::1/128",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "100:0:0:1::/64",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",  # with the metadata service fd00:ec2::254
        "fe80::/10",
        # Not in the registries: multicast, and a metadata service at a public address.
        "224.0.0.0/4",
        "168.63.129.16/32",
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all addresses assigned to hosts of the public internet
_PORTS = {"http": 80, "https": 443}
# The end of an IPv4 address in any spelling. No host name ends like this.
_NUMERIC_ENDING = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.*$", re.IGNORECASE)


class RefusedTarget(ValueError):
    """The address may not be connected to. A ValueError, since urllib3 would wrap an OSError and retry."""


class Guard:
    """Permits public addresses by https on port 443, and addresses of the allowed networks by any scheme and port."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = tuple(allowed)

    def check_url(self, url: str) -> None:
        """Raise RefusedTarget for a URL that can't be allowed, whatever its host resolves to."""
        if any(ord(char) <= 32 or ord(char) == 127 for char in url) or "\\" in url:
            raise RefusedTarget("the address has blanks, control characters or backslashes")
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parse_url(url).host or "").strip("[]")  # as urllib3 will resolve it
        except ValueError:
            raise RefusedTarget("the address is malformed") from None
        if parts.scheme not in ("http", "https"):
            raise RefusedTarget(f"the scheme {parts.scheme[:20]!r} is not https")
        if not host or not parts.hostname:
            raise RefusedTarget("the address names no host")
        if parts.username is not None or parts.password is not None:
            raise RefusedTarget("the address carries a user name")
        if (parts.scheme == "http" or port not in (None, 443)) and not self._allowed:
            raise RefusedTarget("only https on port 443 is allowed")
        address, port = written_address(host), port or _PORTS[parts.scheme]
        if "%" in host or (address is None and _NUMERIC_ENDING.search(host)):
            raise RefusedTarget("the host is malformed")  # percent-encoded, with a zone, or a malformed address
        if address is not None and not self.permits(address, scheme=parts.scheme, port=port):
            raise RefusedTarget(_refusal(host, address, parts.scheme, port))

    def permits(self, address: Address, *, scheme: str, port: int) -> bool:
        """Return whether a socket may be connected to `address`."""
        mapped = getattr(address, "ipv4_mapped", None)
        plain_address = mapped or address
        if any(plain_address in network for network in self._allowed if network.version == plain_address.version):
            return True
        if scheme != "https" or port != 443:
            return False
        return is_public(address)

    def connect(self, connection: TimedHTTPConnection | TimedHTTPSConnection, *, scheme: str) -> socket.socket:
        """Return a socket that is connected to a checked address of the connection's host.

        Raises RefusedTarget if any address of the host is not allowed, and urllib3's errors if none answers.
        """
        host, port = connection.host, connection.port
        targets = connection.addresses()
        for _, answer in targets:
            if not self.permits(ipaddress.ip_address(str(answer[0]).split("%")[0]), scheme=scheme, port=port):
                raise RefusedTarget(_refusal(host, answer[0], scheme, port))
        return connect_first(connection, targets)


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet and has no special purpose."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6:
        return False  # mapped, translated, local and unassigned addresses are outside of it
    return address.is_global and not any(
        address in network for network in _SPECIAL if network.version == address.version
    )


def written_address(host: str) -> Address | None:
    """Return the address that a host is written as, in any spelling that a system accepts, or None for a name.

    >>> written_address("0x7f.1"), written_address("::1"), written_address("h.example")
    (IPv4Address('127.0.0.1'), IPv6Address('::1'), None)
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # decimal, octal, hexadecimal, also with missing parts
    return None


def _refusal(host: str, address: object, scheme: str, port: int) -> str:
    return f"{host} is at {address}, which may not be reached by {scheme} on port {port}"


def guarded_adapter(guard: Guard, *, connections: int) -> PooledAdapter:
    """Return an adapter that checks the address of every new connection with the guard."""

    class Plain(TimedHTTPConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="http")

    class Tls(TimedHTTPSConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="https")

    return PooledAdapter(connections=connections, plain=Plain, tls=Tls)
