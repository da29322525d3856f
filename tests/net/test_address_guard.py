"""The address guard: no socket is ever connected to a refused address, in any spelling."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from tests.networks import Net
from tests.web import page, web_server
from worker.net.address_guard import Guard, RefusedTarget, guarded_adapter, is_public
from worker.net.deadlines import TimedHTTPConnection, TimeLimit, lean_session

PUBLIC = "93.184.215.14"
LOOPBACK = [ipaddress.ip_network("127.0.0.0/8")]

# Both registries of IANA, line by line, and addresses that are not in them.
SPECIAL = [
    "0.0.0.0/8",
    "0.0.0.0/32",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.0.0/29",
    "192.0.0.8/32",
    "192.0.0.9/32",
    "192.0.0.10/32",
    "192.0.0.170/32",
    "192.0.0.171/32",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.88.99.2/32",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/23",
    "2001::/32",
    "2001:1::1/128",
    "2001:1::2/128",
    "2001:1::3/128",
    "2001:2::/48",
    "2001:3::/32",
    "2001:4:112::/48",
    "2001:10::/28",
    "2001:20::/28",
    "2001:30::/28",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
]
UNLISTED = [
    "224.0.0.0/4",  # multicast
    "ff00::/8",
    "::/96",  # IPv4-compatible
    "::ffff:0:0:0/96",  # IPv4-translated
    "fec0::/10",  # site-local
    "::/3",  # everything that is not assigned to hosts of the public internet
    "4000::/2",
    "8000::/1",
]
METADATA = ["169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"]


def _samples(network: str) -> list[str]:
    """Return the first, the last and a middle address."""
    block = ipaddress.ip_network(network)
    return [str(block[place]) for place in sorted({0, block.num_addresses // 2, block.num_addresses - 1})]


REFUSED = list(dict.fromkeys([*METADATA, *(one for network in SPECIAL + UNLISTED for one in _samples(network))]))
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
    "2620:4f:7fff:ffff::1",
    "2620:4f:8001::1",
    "2001:200::1",
    "2001:db7:ffff::1",
    "2001:db9::1",
    "3ffe:ffff::1",
    "3fff:1000::1",
]


@pytest.mark.parametrize("address", REFUSED)
def test_a_special_purpose_address_is_not_public(address: str) -> None:
    """The registries of IANA, metadata services of clouds, multicast, and everything outside the public internet."""
    assert not is_public(ipaddress.ip_address(address))
    assert not Guard([]).permits(ipaddress.ip_address(address), scheme="https", port=443)


def test_the_registries_are_refused_with_any_list_of_the_standard_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The list of the standard library differs between releases of Python."""
    monkeypatch.setattr(ipaddress.IPv4Address, "is_global", True)
    monkeypatch.setattr(ipaddress.IPv6Address, "is_global", True)
    assert [address for address in REFUSED if is_public(ipaddress.ip_address(address))] == []


@pytest.mark.parametrize("address", PERMITTED)
def test_a_public_address_is_permitted_only_by_https_on_port_443(address: str) -> None:
    """Also next to the special ranges."""
    plain = ipaddress.ip_address(address)
    guard = Guard(LOOPBACK)
    assert is_public(plain)
    assert guard.permits(plain, scheme="https", port=443)
    assert not guard.permits(plain, scheme="http", port=80)
    assert not guard.permits(plain, scheme="http", port=443)
    assert not guard.permits(plain, scheme="https", port=8443)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::ffff:127.0.0.1"])
def test_an_allowed_network_is_permitted_by_any_scheme_and_port(address: str) -> None:
    """Addresses next to it are not permitted."""
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
        "https:h/a.png",
        "https:/h/a.png",
        "https:////h/a.png",
        "https:?h",
        "https:#h",
        "https:\\\\h\\a.png",
        "\\\\h\\a.png",
        "https://h\t/a.png",
        "https://h\n/a.png",
        "https:/\t/h/a.png",
        " https://h/a.png",
        "\u3000https://h/a.png",
        "\ufeffhttps://h/a.png",
        "http\u017f://h/a.png",
        "httpsx://h/a.png",
        "blob:https://h/a.png",
        "https://:@h/a.png",
        "https://@@h/a.png",
        "https://good.test:443@h/a.png",
        "https://good.test%2f@h/a.png",
        "https://h:443:80/a.png",
        "https://h:65536/a.png",
        "https://h:-1/a.png",
        "https://h:+443/a.png",
        "https://h:4_43/a.png",
        "https://h:\uff14\uff14\uff13/a.png",
        "https://h:0/a.png",
        "https://h:" + "9" * 5_000 + "/a.png",
        "https://[]/a.png",
        "https://[h]/a.png",
        "https://[127.0.0.1]/a.png",
        "https://[v1.127.0.0.1]/a.png",
        "https://[::1].h/a.png",
        "https://h[::1]/a.png",
        "https://[::1]]/a.png",
        "https://[[::1]]/a.png",
        "https://::1/a.png",
        "https://%/a.png",
        "https://h%00/a.png",
        "https://h%0d%0aHost:evil/a.png",
        "https://good.test%40h/a.png",
        "https://%5b::1%5d/a.png",
        "https://good.test\uff20h/a.png",
        "https://good.test\uff0fh/a.png",
        "https://h\u2100/a.png",
        "https://h\u3000/a.png",
        "https://h\u00ad/a.png",
        "https://\u202eh/a.png",
        "https://\ud800/a.png",
        "https://" + "\u00fc" * 64 + "/a.png",
        "https://" + "\u0660" * 8_000 + "/a.png",
        "https://1.2.3.4.5/a.png",
        "https://256.0.0.1/a.png",
        "https://4294967296/a.png",
        "https://0x100000000/a.png",
        "https://0x/a.png",
        "https://08.0.0.1/a.png",
        "https://.127.0.0.1/a.png",
        "https://127.0.0.1.evil.0x1/a.png",
        "https://" + "0" * 8_000 + "1/a.png",
        "http://h/a.png",
        "https://h:8443/a.png",
    ],
)
def test_a_malformed_or_forbidden_url_is_refused_before_any_look_up(url: str) -> None:
    """Whatever address its host has."""
    with pytest.raises(RefusedTarget):
        Guard([]).check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/a.png",
        "HTTPS://h:443/a.png?x=%20#y",
        "https://h:/a.png",
        "https://h./a.png",
        "https://[2606:4700::1]/a",
        "https://93.184.215.14/a",
        "https://b\u00fccher.test/\u00fc.png",
        "https://1.2.3.4.test/a",
        "https://0x7f.h1/a",
        "https://h/@127.0.0.1/a?b=@c#@d",
        "https://h?@127.0.0.1",
        "https://h#@127.0.0.1",
        "https://h/\ud800",
    ],
)
def test_an_ordinary_url_is_accepted(url: str) -> None:
    """Addresses are checked when the socket is connected."""
    Guard([]).check_url(url)


# ── sockets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A network without real connections."""
    return Net().install(monkeypatch)


def _connect(host: str, *, port: int = 443, scheme: str = "https", allowed: Sequence[Any] = ()) -> None:
    Guard(allowed).connect(TimedHTTPConnection(host, port, timeout=3.0), scheme=scheme)


def _digits(text: str, zero: str) -> str:
    """Return the text with digits of another script."""
    return text.translate({ord("0") + value: chr(ord(zero) + value) for value in range(10)})


def _circled(text: str) -> str:
    return text.translate({ord("0"): "\u24ea"} | {ord("0") + value: chr(0x245F + value) for value in range(1, 10)})


def _parts(text: str, form: str) -> str:
    return ".".join(format(int(part), form) for part in text.split("."))


def _hex(number: int) -> str:
    """Return eight hexadecimal digits as two groups of an IPv6 address."""
    return f"{number >> 16:x}:{number & 0xFFFF:x}"


# Spellings of an IPv4 address. Each function takes the address as text and as a number.
SPELLINGS: dict[str, Callable[[str, int], str]] = {
    "plain": lambda text, number: text,
    "decimal": lambda text, number: str(number),
    "octal": lambda text, number: f"0{number:o}",
    "octal, padded": lambda text, number: f"0000{number:o}",
    "hexadecimal": lambda text, number: f"0x{number:x}",
    "hexadecimal, capitals": lambda text, number: f"0X{number:X}",
    "octal parts": lambda text, number: ".".join(f"0{int(part):o}" for part in text.split(".")),
    "octal parts, padded": lambda text, number: ".".join(f"000{int(part):o}" for part in text.split(".")),
    "hexadecimal parts": lambda text, number: _parts(text, "#x"),
    "mixed parts": lambda text, number: f"{number >> 24:#x}.0{number >> 16 & 255:o}.{number & 0xFFFF}",
    "two parts": lambda text, number: f"{number >> 24}.{number & 0xFFFFFF}",
    "three parts": lambda text, number: f"{number >> 24}.{number >> 16 & 255}.{number & 0xFFFF}",
    "a dot at the end": lambda text, number: text + ".",
    "two dots at the end": lambda text, number: text + "..",
    "decimal and a dot": lambda text, number: f"{number}.",
    "hexadecimal and a dot": lambda text, number: f"0x{number:x}.",
    "full-width digits": lambda text, number: _digits(text, "\uff10"),
    "full-width dots": lambda text, number: text.replace(".", "\uff0e"),
    "full-width both": lambda text, number: _digits(text, "\uff10").replace(".", "\uff0e"),
    "ideographic dots": lambda text, number: text.replace(".", "\u3002"),
    "half-width ideographic dots": lambda text, number: text.replace(".", "\uff61"),
    "full-width decimal": lambda text, number: _digits(str(number), "\uff10"),
    "circled digits": lambda text, number: _circled(text),
    "bold digits": lambda text, number: _digits(text, "\U0001d7ce"),
    "arabic digits": lambda text, number: _digits(text, "\u0660"),
    "a soft hyphen": lambda text, number: text.replace(".", ".\u00ad"),
    "a blank of no width": lambda text, number: text + "\u200b",
    "encoded digits": lambda text, number: "".join(f"%{ord(char):02x}" if char != "." else char for char in text),
    "encoded dots": lambda text, number: text.replace(".", "%2E"),
    "encoded twice": lambda text, number: text.replace(".", "%252e"),
    "encoded full-width dots": lambda text, number: text.replace(".", "%EF%BC%8E"),
    "an encoded zero byte": lambda text, number: text + "%00",
    "mapped": lambda text, number: f"[::ffff:{text}]",
    "mapped, hexadecimal": lambda text, number: f"[::FFFF:{_hex(number)}]",
    "mapped, in full": lambda text, number: f"[0:0:0:0:0:ffff:{text}]",
    "mapped, padded": lambda text, number: f"[0000:0000:0000:0000:0000:ffff:{number >> 16:04x}:{number & 0xFFFF:04x}]",
    "mapped, with a zone": lambda text, number: f"[::ffff:{text}%25lo]",
    "compatible": lambda text, number: f"[::{text}]",
    "compatible, hexadecimal": lambda text, number: f"[::{_hex(number)}]",
    "translated": lambda text, number: f"[::ffff:0:{text}]",
    "translated, hexadecimal": lambda text, number: f"[::ffff:0:{_hex(number)}]",
    "6to4": lambda text, number: f"[2002:{_hex(number)}::]",
    "6to4, a host": lambda text, number: f"[2002:{_hex(number)}:1::1]",
    "Teredo server": lambda text, number: f"[2001:0:{_hex(number)}::]",
    "Teredo client": lambda text, number: f"[2001:0:4136:e378:8000:63bf:{_hex(number ^ 0xFFFFFFFF)}]",
    "NAT64": lambda text, number: f"[64:ff9b::{text}]",
    "NAT64, hexadecimal": lambda text, number: f"[64:ff9b::{_hex(number)}]",
    "local NAT64": lambda text, number: f"[64:ff9b:1::{text}]",
    "with a port": lambda text, number: f"{text}:443",
    "with a padded port": lambda text, number: f"{text}:00443",
    "with an empty port": lambda text, number: f"{text}:",
    "behind a user": lambda text, number: f"good.test@{text}",
    "behind a user and a port": lambda text, number: f"good.test:443@{text}",
    "behind an encoded user": lambda text, number: f"good.test%40{text}",
    "behind a backslash": lambda text, number: f"good.test\\@{text}",
    "before a backslash": lambda text, number: f"{text}\\@good.test",
    "behind two users": lambda text, number: f"a@good.test@{text}",
    "behind a full-width at": lambda text, number: f"good.test\uff20{text}",
    "with a blank": lambda text, number: f"{text} ",
    "behind a tab": lambda text, number: f"\t{text}",
    "with a line break": lambda text, number: f"{text}\r\n",
    "before a fragment": lambda text, number: f"{text}#@good.test",
    "before a query": lambda text, number: f"{text}?@good.test",
}
SPELT = ["127.0.0.1", "0.0.0.0", "10.0.0.1", "255.255.255.255", *METADATA[:-1]]


@pytest.fixture(scope="module")
def session() -> requests.Session:
    """A session of downloads, without allowed networks."""
    return lean_session(guarded_adapter(Guard([]), connections=1))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_address_is_refused_in_every_spelling(spelling: str, net: Net) -> None:
    """In a URL, before any look-up, and also if other networks (and so other ports and plain http) are allowed."""
    for text in SPELT:
        host = SPELLINGS[spelling](text, int(ipaddress.IPv4Address(text)))
        for scheme in ("https", "HTTP"):
            url = f"{scheme}://{host}/a.png"
            for guard in (Guard([]), Guard([ipaddress.ip_network("192.168.77.0/24")])):
                with pytest.raises(RefusedTarget):
                    guard.check_url(url)
    assert net.looked_up == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_socket_is_connected_to_a_refused_address_in_any_spelling(
    spelling: str, net: Net, session: requests.Session
) -> None:
    """Even if the URL was not checked before: the address that the system makes of the spelling is checked."""
    for text in SPELT:
        host = SPELLINGS[spelling](text, int(ipaddress.IPv4Address(text)))
        with pytest.raises((RefusedTarget, requests.RequestException)):
            session.get(f"https://{host}/a.png", timeout=1)
    assert net.connected == []


@pytest.mark.parametrize("host", ["[::1]", "[0:0:0:0:0:0:0:1]", "[::0001]", "[fe80::1%1]", *REFUSED])
def test_no_socket_is_connected_to_a_refused_address(host: str, net: Net) -> None:
    """Neither by the address itself nor by a name that resolves to it."""
    with pytest.raises(RefusedTarget):
        _connect(host)
    with pytest.raises(RefusedTarget):
        Guard([]).check_url(f"https://{host}/" if ":" not in host or "[" in host else f"https://[{host}]/")
    net.answers = lambda _: [host.strip("[]")]
    with pytest.raises(RefusedTarget):
        _connect("name.test")
    assert net.connected == []


@pytest.mark.parametrize("host", ["localhost", "localhost.", "LOCALHOST", "localhost%2e", "\u24dbocalhost", "metadata"])
def test_a_name_is_judged_by_its_address(host: str, net: Net, session: requests.Session) -> None:
    """There is no list of names."""
    net.answers = lambda _: ["127.0.0.1"]
    with pytest.raises((RefusedTarget, requests.exceptions.InvalidURL)):
        session.get(f"https://{host}/a.png", timeout=1)
    assert net.connected == []


def test_a_socket_is_connected_to_the_checked_address(net: Net) -> None:
    """One look-up serves check and connection, so a name has no time to change in between."""
    turns = iter([[PUBLIC], ["127.0.0.1"]])
    net.answers = lambda host: next(turns)
    with pytest.raises(NewConnectionError):
        _connect("rebinds.test")
    assert net.connected == [(PUBLIC, 443)]
    assert net.looked_up == ["rebinds.test"]
    with pytest.raises(RefusedTarget, match=r"127\.0\.0\.1"):
        _connect("rebinds.test")
    assert net.connected == [(PUBLIC, 443)]


@pytest.mark.parametrize("bad", ["10.0.0.1", "::1", "::ffff:10.0.0.1", "fe80::1%1", *METADATA])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_name_with_one_refused_address_among_several_is_refused(bad: str, place: int, net: Net) -> None:
    """At any place in the list."""
    addresses = [PUBLIC, "2606:4700::1"]
    addresses.insert(place, bad)
    net.answers = lambda host: addresses
    with pytest.raises(RefusedTarget):
        _connect("mixed.test")
    assert net.connected == []


def test_all_addresses_of_a_name_share_the_time_of_the_call(net: Net) -> None:
    """A name can have any number of addresses that never answer."""
    net.answers = lambda host: [PUBLIC, "2606:4700::1", "8.8.8.8"]
    net.error = TimeoutError
    with TimeLimit(1.0), pytest.raises(ConnectTimeoutError):
        _connect("silent.test")
    assert [answer[0] for answer in net.connected] == [PUBLIC, "2606:4700::1", "8.8.8.8"]
    assert all(seconds is not None and seconds <= 1.0 for seconds in net.timeouts)


def test_an_unknown_name_is_a_network_error_and_no_refusal(net: Net) -> None:
    """So it is tried again. The same holds for an invalid name."""

    def unknown(host: str) -> Sequence[str]:
        raise socket.gaierror

    net.answers = unknown
    for host in ("nowhere.test", "x" * 64 + ".test"):
        with pytest.raises(NewConnectionError):
            _connect(host)


def test_a_guarded_session_reaches_no_refused_address(net: Net, session: requests.Session) -> None:
    """requests passes on the guard's refusal, for http and https."""
    for url in ("https://127.0.0.1/a.png", "http://169.254.169.254/latest", "https://[::1]/", "http://localhost:80/"):
        net.answers = lambda host: ["127.0.0.1"] if host == "localhost" else None
        with pytest.raises((RefusedTarget, requests.RequestException)):
            session.get(url, timeout=1)
    assert net.connected == []


def test_an_open_connection_is_to_a_checked_address() -> None:
    """Loopback, with a server of this test: the only real connections of these tests."""
    with web_server() as web:
        web.serves("/a", page(200, b"hello"))
        session = lean_session(guarded_adapter(Guard(LOOPBACK), connections=2))
        assert session.get(web.url + "/a", timeout=5).content == b"hello"
        strict = lean_session(guarded_adapter(Guard([]), connections=2))
        with pytest.raises(RefusedTarget):
            strict.get(web.url + "/a", timeout=5)
    assert len(web.requests) == 1
    assert web.connections == 1
