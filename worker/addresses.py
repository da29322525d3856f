"""The guard of downloads: which addresses may be connected to, checked on the very address that is connected to.

Names are resolved once per connection, every answer is checked, and the socket goes to the address that was checked,
so a name that changes its answer between check and connect gains nothing.
"""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from worker.timed_http import TimedAdapter, TimedHTTPConnection, TimedHTTPSConnection, connect_first

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Beyond what the standard library calls not global: special-purpose registries of IANA, and a cloud's metadata service.
_ALSO_REFUSED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",
        "192.0.0.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.175.48.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "2620:4f:8000::/48",
        "3fff::/20",
        "5f00::/16",
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # everything that is assigned to hosts of the public internet


class RefusedTarget(ValueError):
    """The address may not be connected to. A ValueError, since urllib3 would wrap an OSError and try again."""


class Guard:
    """Decides by the rules of downloads: public addresses by https on port 443, allowed networks by any."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = tuple(allowed)

    def check_url(self, url: str) -> None:
        """Raises RefusedTarget for a URL that can't be allowed whatever its host's address is."""
        if any(ord(char) <= 32 or ord(char) == 127 for char in url) or "\\" in url:
            raise RefusedTarget("the address has blanks, control characters or backslashes")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise RefusedTarget("the address is malformed") from None
        if parts.scheme not in ("http", "https"):
            raise RefusedTarget(f"the scheme {parts.scheme[:20]!r} is not https")
        if not parts.hostname:
            raise RefusedTarget("the address names no host")
        if parts.username is not None or parts.password is not None:
            raise RefusedTarget("the address carries a user name")
        if (parts.scheme == "http" or port not in (None, 443)) and not self._allowed:
            raise RefusedTarget("only https on port 443 is allowed")

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
                raise RefusedTarget(
                    f"{host} is at {answer[0]}, which downloads may not reach by {scheme} on port {port}"
                )
        return connect_first(connection, targets)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and of no special purpose."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_V6:
        return False  # mapped, translated, local and unassigned addresses are all outside
    return address.is_global and not any(
        address in network for network in _ALSO_REFUSED if network.version == address.version
    )


def guarded_adapter(guard: Guard, *, connections: int) -> TimedAdapter:
    """An adapter whose every new connection passes the guard."""

    class Plain(TimedHTTPConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="http")

    class Tls(TimedHTTPSConnection):
        def dial(self) -> socket.socket:
            return guard.connect(self, scheme="https")

    return TimedAdapter(connections=connections, plain=Plain, tls=Tls)
