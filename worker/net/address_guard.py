"""The guard of downloads: which addresses may be connected to, checked on the very address that is connected to.

Names are resolved once per connection, every answer is checked, and the socket goes to the address that was checked,
so a name that changes its answer between check and connect gains nothing.
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
# Blocks inside of larger ones are left out. Some of those in 192.0.0.0/24 and 2001::/23, the AS112 and AMT blocks and
# 64:ff9b::/96 may be reached from anywhere; no output lies there, and they lead to other addresses or to nobody.
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
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # everything that is assigned to hosts of the public internet
_PORTS = {"http": 80, "https": 443}
_NUMBER = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.*$", re.IGNORECASE)  # how no name ends


class RefusedTarget(ValueError):
    """The address may not be connected to. A ValueError, since urllib3 would wrap an OSError and try again."""


class Guard:
    """Decides by the rules of downloads: public addresses by https on port 443, allowed networks by any."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = tuple(allowed)

    def check_url(self, url: str) -> None:
        """Raises RefusedTarget for a URL that can't be allowed, whatever the name in it stands for."""
        if any(ord(char) <= 32 or ord(char) == 127 for char in url) or "\\" in url:
            raise RefusedTarget("the address has blanks, control characters or backslashes")
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parse_url(url).host or "").strip("[]")  # as it will be looked up; the library has the last word
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
        if "%" in host or (address is None and _NUMBER.search(host)):
            raise RefusedTarget("the host is malformed")  # still encoded, with a zone, or nearly an address
        if address is not None and not self.permits(address, scheme=parts.scheme, port=port):
            raise RefusedTarget(_refusal(host, address, parts.scheme, port))

    def permits(self, address: Address, *, scheme: str, port: int) -> bool:
        """Whether a socket may be connected to `address`."""
        inner = getattr(address, "ipv4_mapped", None)
        plain = inner or address
        if any(plain in network for network in self._allowed if network.version == plain.version):
            return True
        if scheme != "https" or port != 443:
            return False
        return is_public(address)

    def connect(self, connection: TimedHTTPConnection | TimedHTTPSConnection, *, scheme: str) -> socket.socket:
        """A socket to the host of `connection`, connected to an address that was checked.

        Raises RefusedTarget where any of its addresses is not allowed, and urllib3's errors where none answers.
        """
        host, port = connection.host, connection.port
        targets = connection.addresses()
        for _, answer in targets:
            if not self.permits(ipaddress.ip_address(str(answer[0]).split("%")[0]), scheme=scheme, port=port):
                raise RefusedTarget(_refusal(host, answer[0], scheme, port))
        return connect_first(connection, targets)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and of no special purpose."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6:
        return False  # mapped, translated, local and unassigned addresses are all outside
    return address.is_global and not any(
        address in network for network in _SPECIAL if network.version == address.version
    )


def written_address(host: str) -> Address | None:
    """The address that a host is written as, in any way that some system reads; None for a name.

    >>> written_address("0x7f.1"), written_address("::1"), written_address("h.example")
    (IPv4Address('127.0.0.1'), IPv6Address('::1'), None)
    """
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))  # decimal, octal, hexadecimal, and with parts left out
    return None


def _refusal(host: str, address: object, scheme: str, port: int) -> str:
    return f"{host} is at {address}, which may not be reached by {scheme} on port {port}"


def guarded_adapter(guard: Guard, *, connections: int) -> PooledAdapter:
    """An adapter whose every new connection passes the guard."""

    class Plain(TimedHTTPConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="http")

    class Tls(TimedHTTPSConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="https")

    return PooledAdapter(connections=connections, plain=Plain, tls=Tls)
