"""The guard of downloads: no socket is ever connected to an address that is not allowed, however it is written."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from tests.web import page, web_server
from worker import timed_http
from worker.addresses import Guard, RefusedTarget, guarded_adapter, is_public
from worker.timed_http import TimedHTTPConnection, TimeLimit, lean_session

PUBLIC = "93.184.215.14"
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]

REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.0.192",
    "192.0.2.1",
    "192.31.196.1",
    "192.52.193.1",
    "192.88.99.1",
    "192.168.0.1",
    "192.168.255.255",
    "192.175.48.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "233.252.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.254",
    "255.255.255.255",
    "::",
    "::1",
    "::2",
    "::127.0.0.1",
    "::10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:93.184.215.14",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::5db8:d70e",
    "64:ff9b:1::1",
    "100::1",
    "100:0:0:1::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:30::1",
    "2001:db8::1",
    "2001:1::1",
    "2002:7f00:1::",
    "2002:a00:1::",
    "2002:5db8:d70e::",
    "2620:4f:8000::1",
    "3fff::1",
    "3fff:fff::1",
    "5f00::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd12:3456:789a::1",
    "fe80::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "ffff::1",
]
PERMITTED = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.215.14",
    "100.63.255.255",
    "100.128.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "168.63.129.15",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.1",
    "191.255.255.255",
    "192.0.1.1",
    "192.167.255.255",
    "192.169.0.1",
    "198.17.255.255",
    "198.20.0.1",
    "223.255.255.254",
    "2606:4700:4700::1111",
    "2001:4860:4860::8888",
    "2a00:1450:4001:81b::200e",
    "2400:cb00:2048:1::c629:d7a2",
    "2003::1",
    "2620:4f:8001::1",
]


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_of_special_purpose_is_not_public(address: str) -> None:
    """The registries of IANA, metadata services of clouds, and every way to wrap an IPv4 address into IPv6."""
    assert not is_public(ipaddress.ip_address(address))
    assert not Guard([]).permits(ipaddress.ip_address(address), scheme="https", port=443)


@pytest.mark.parametrize("address", PERMITTED)
def test_an_address_of_the_public_internet_is_permitted_by_https_on_port_443_only(address: str) -> None:
    """Also right beside the special ranges."""
    plain = ipaddress.ip_address(address)
    guard = Guard(LOOPBACK)
    assert is_public(plain)
    assert guard.permits(plain, scheme="https", port=443)
    assert not guard.permits(plain, scheme="http", port=80)
    assert not guard.permits(plain, scheme="http", port=443)
    assert not guard.permits(plain, scheme="https", port=8443)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::ffff:127.0.0.1"])
def test_an_allowed_network_is_permitted_by_any_scheme_and_port(address: str) -> None:
    """And nothing beside it."""
    guard = Guard(LOOPBACK)
    assert guard.permits(ipaddress.ip_address(address), scheme="http", port=8_080)
    assert not guard.permits(ipaddress.ip_address("10.0.0.1"), scheme="https", port=443)
    assert not guard.permits(ipaddress.ip_address("::1"), scheme="https", port=443)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/a.png",
        "file:///etc/passwd",
        "gopher://h/a",
        "javascript:alert(1)",
        "a.png",
        "",
        "//h/a.png",
        "https:///a.png",
        "https://",
        "https://user@h/a.png",
        "https://user:word@h/a.png",
        "https://@h/a.png",
        "https://h:99999/a.png",
        "https://h:x/a.png",
        "https://[::1/a.png",
        "https://h/a b.png",
        "https://h/a\r\nHost: evil",
        "https://h\\@evil/a.png",
        "https://h/\x00",
        "https://h/\x7f",
        "http://h/a.png",
        "https://h:8443/a.png",
    ],
)
def test_a_url_that_can_never_be_allowed_is_refused_before_any_look_up(url: str) -> None:
    """Whatever its host's address is."""
    with pytest.raises(RefusedTarget):
        Guard([]).check_url(url)


@pytest.mark.parametrize("url", ["https://h/a.png", "HTTPS://h:443/a.png?x=%20#y", "https://[2606:4700::1]/a"])
def test_an_ordinary_url_passes(url: str) -> None:
    """Addresses are looked at when the socket is connected."""
    Guard([]).check_url(url)


# ── the socket ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Net:
    """Stands where the guard reaches for the network: answers look-ups, notes connections and refuses them all."""

    def __init__(self) -> None:
        self.connected: list[tuple[Any, ...]] = []
        self.looked_up: list[str] = []
        self.timeouts: list[float] = []
        self.answers: Callable[[str], Sequence[str] | None] | None = None
        self.error: type[OSError] = ConnectionRefusedError

    def getaddrinfo(self, host: str, port: int, **options: Any) -> list[Any]:
        """Literals as the system reads them; names as the test says."""
        self.looked_up.append(host)
        found = self.answers(host) if self.answers else None
        if found is None:
            return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)
        return [
            (socket.AF_INET6, 1, 6, "", (one, port, 0, 0)) if ":" in one else (socket.AF_INET, 1, 6, "", (one, port))
            for one in found
        ]

    def socket(self, *_: Any) -> "Net":
        """A socket of this network."""
        return self

    def settimeout(self, seconds: float) -> None:
        """Notes it."""
        self.timeouts.append(seconds)

    def setsockopt(self, *_: Any) -> None:
        """Takes any option."""

    def connect(self, answer: tuple[Any, ...]) -> None:
        """Notes where to, and goes nowhere."""
        self.connected.append(answer)
        raise self.error

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A network that nothing leaves."""
    made = Net()
    module = SimpleNamespace(
        getaddrinfo=made.getaddrinfo,
        socket=made.socket,
        SOCK_STREAM=socket.SOCK_STREAM,
        IPPROTO_TCP=socket.IPPROTO_TCP,
        TCP_NODELAY=socket.TCP_NODELAY,
        gaierror=socket.gaierror,
    )
    monkeypatch.setattr(timed_http, "socket", module)
    return made


def _connect(host: str, *, port: int = 443, scheme: str = "https", allowed: Sequence[Any] = ()) -> None:
    Guard(allowed).connect(TimedHTTPConnection(host, port, timeout=3.0), scheme=scheme)


ODD_SPELLINGS = [
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "127.1",
    "127.0.1",
    "0",
    "0x0",
    "169.16689662",
    "0xa9fea9fe",
    "2852039166",
    "[::1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[fe80::1%1]",
    "[64:ff9b::a9fe:a9fe]",
]


@pytest.mark.parametrize("host", [*ODD_SPELLINGS, *REFUSED])
def test_no_socket_goes_to_a_refused_address_however_it_is_spelt(host: str, net: Net) -> None:
    """What the system makes of the spelling is what is checked."""
    with pytest.raises(RefusedTarget):
        _connect(host)
    assert net.connected == []


def test_a_socket_goes_to_the_address_that_was_checked(net: Net) -> None:
    """One look-up for check and connection: there is nothing in between for a name to change."""
    turns = iter([[PUBLIC], ["127.0.0.1"]])
    net.answers = lambda host: next(turns)
    with pytest.raises(NewConnectionError):
        _connect("rebinds.test")
    assert net.connected == [(PUBLIC, 443)]
    assert net.looked_up == ["rebinds.test"]
    with pytest.raises(RefusedTarget, match=r"127\.0\.0\.1"):
        _connect("rebinds.test")
    assert net.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize("bad", ["10.0.0.1", "::1", "169.254.169.254"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_name_with_one_refused_address_among_several_is_refused(bad: str, place: int, net: Net) -> None:
    """Wherever in the list it stands."""
    found = [PUBLIC, "2606:4700::1"]
    found.insert(place, bad)
    net.answers = lambda host: found
    with pytest.raises(RefusedTarget):
        _connect("mixed.test")
    assert net.connected == []


def test_all_addresses_of_a_name_are_tried_within_the_time_of_the_call(net: Net) -> None:
    """A name may have any number of addresses that never answer."""
    net.answers = lambda host: [PUBLIC, "2606:4700::1", "8.8.8.8"]
    net.error = TimeoutError
    with TimeLimit(1.0), pytest.raises(ConnectTimeoutError):
        _connect("silent.test")
    assert [answer[0] for answer in net.connected] == [PUBLIC, "2606:4700::1", "8.8.8.8"]
    assert all(seconds <= 1.0 for seconds in net.timeouts)


def test_a_name_that_is_not_known_is_trouble_of_the_way_not_a_refusal(net: Net) -> None:
    """So it is tried again; also for a name that can't be written."""

    def unknown(host: str) -> Sequence[str]:
        raise socket.gaierror

    net.answers = unknown
    for host in ("nowhere.test", "x" * 64 + ".test"):
        with pytest.raises(NewConnectionError):
            _connect(host)


def test_requests_of_a_guarded_session_never_leave_it(net: Net) -> None:
    """The guard's refusal comes through requests as what it is, for http and https, with and without a proxy set."""
    session = lean_session(guarded_adapter(Guard([]), connections=2))
    for url in ("https://127.0.0.1/a.png", "http://169.254.169.254/latest", "https://[::1]/", "http://localhost:80/"):
        net.answers = lambda host: ["127.0.0.1"] if host == "localhost" else None
        with pytest.raises((RefusedTarget, requests.RequestException)):
            session.get(url, timeout=1)
    assert net.connected == []


def test_an_open_connection_is_to_an_address_that_was_checked() -> None:
    """Loopback with a server of ours: the only place where these tests really connect."""
    with web_server() as web:
        web.serves("/a", page(200, b"hello"))
        session = lean_session(guarded_adapter(Guard(LOOPBACK), connections=2))
        assert session.get(web.url + "/a", timeout=5).content == b"hello"
        strict = lean_session(guarded_adapter(Guard([]), connections=2))
        with pytest.raises(RefusedTarget):
            strict.get(web.url + "/a", timeout=5)
    assert len(web.asked) == 1
    assert web.connections == 1
