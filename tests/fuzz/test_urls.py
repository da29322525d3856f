"""URLs made to be misread: the key is sent only to fetch paths, and no download reaches an internal address."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from tests.download_stand import Stand
from tests.fuzz.effort import EFFORTS, with_effort
from tests.fuzz.urls import fetch_urls, urls
from tests.networks import Net
from tests.web import page, sends, web_server
from worker.core.identity import FetchAddress
from worker.core.reply import Processing
from worker.errors import RefusedAddress
from worker.net.address_guard import Guard, RefusedTarget, guarded_adapter
from worker.net.deadlines import lean_session
from worker.polling.api_client import ApiClient
from worker.system.redaction import Scrubber
from worker.vendor.answer_links import collect_links
from worker.vendor.fetch_url import AllowedApi, fetch_address

ID = "12202888"
HOSTS = frozenset({"good.test", "api.test:8443", "127.0.0.1:7001", "[::1]:7001"})
SITES = (
    "https://good.test",
    "https://GOOD.test:443",
    "https://api.test:8443",
    "http://127.0.0.1:7001",
    "http://[::1]:7001",
)
FETCH_PATH = re.compile(r"/api/v[0-9]+/([A-Za-z0-9_-]+/)*fetch(/12202888)?|/api/v3/fine_tune_status/12202888")

# ── where the key may go ──────────────────────────────────────────────────────────────────────────────────────────────


def check_rules(url: str, hosts: frozenset[str]) -> None:
    """Check every rule of the contract for a fetch URL with another URL parser."""
    parts = urlsplit(url)
    assert parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    assert parts.username is None
    assert parts.password is None
    assert (parts.query, parts.fragment) == ("", "")
    assert not set("?#%@\\;") & set(url)
    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    assert FETCH_PATH.fullmatch(parts.path)
    assert not {".", ".."} & set(unquote(parts.path).split("/"))
    host = parts.netloc.lower().removesuffix(":443" if parts.scheme == "https" else ":80")
    assert host in hosts


def is_loopback(host: str) -> bool:
    """Return whether a host is in 127.0.0.0/8, ::1 or localhost."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@EFFORTS
def test_accepted_fetch_urls_keep_every_rule_for_every_url_parser(examples: int) -> None:
    api = AllowedApi("https://good.test/api/v3", HOSTS)
    accepted = list[str]()

    @with_effort(examples)
    @given(url=fetch_urls(SITES))
    def check(url: str) -> None:
        try:
            address = fetch_address(url, ID, api)
        except RefusedAddress:
            return

        accepted.append(url)
        check_rules(url, HOSTS)
        check_rules(address.url, HOSTS)
        assert address.url == address.base or address.url == f"{address.base}/{ID}"
        prepared = requests.Request("POST", address.url).prepare()
        assert prepared.url == address.url
        assert parse_url(address.url).url == address.url
        assert prepared.path_url == urlsplit(url).path == urlsplit(address.url).path
        assert urlsplit(address.url).hostname == urlsplit(url).hostname
        assert fetch_address(address.url, ID, api) == address  # it is checked again before each call

    check()

    assert len(set(accepted)) >= 10  # otherwise the test checks nothing


@EFFORTS
def test_the_key_is_sent_only_to_the_accepted_url(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server() as web:
        net = Net(loopback=True).install(monkeypatch)
        net.answers = lambda host: ["127.0.0.1"] if host == "localhost" else None
        hosts = frozenset({f"127.0.0.1:{web.port}", f"localhost:{web.port}", "good.test"})
        allowed = AllowedApi(f"{web.url}/api/v3", hosts)
        api = ApiClient(allowed, Scrubber(["key"]), timeout=5.0, connections=2)

        @with_effort(examples, of=5)
        @given(url=fetch_urls((web.url, f"http://localhost:{web.port}")))
        def check(url: str) -> None:
            web.requests.clear()
            net.connected.clear()
            stored_address = FetchAddress(url, url.removesuffix(f"/{ID}"), "whatever")  # an old row may contain it
            if api.permits(stored_address, ID) is not None or urlsplit(url).scheme != "http":
                return
            web.serves(urlsplit(url).path, page(200, b'{"status": "processing"}'))

            assert api.ask(stored_address, ID, SecretStr("key")).reply == Processing()

            assert set(net.connected) == {("127.0.0.1", web.port)}
            [request] = web.requests
            assert request.path == urlsplit(url).path
            assert request.headers["host"] == urlsplit(url).netloc
            assert FETCH_PATH.fullmatch(request.path)

        check()
        api.session.close()


# ── where downloads may go ────────────────────────────────────────────────────────────────────────────────────────────

PUBLIC = ["93.184.215.14", "1.1.1.1", "2606:4700:4700::1111"]
INNER = [
    "127.0.0.1",
    "10.0.0.1",
    "169.254.169.254",
    "::1",
    "fe80::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
]
KNOWN: dict[str, list[str]] = {
    "good.test": PUBLIC[:1],
    "mixed.test": [PUBLIC[0], INNER[0]],
    "inner.test": INNER[1:2],
    "outer.test": PUBLIC,
    "six.test": [INNER[5]],
}


def names() -> Callable[[str], Sequence[str] | None]:
    """Return a name resolver. One name changes its address with each call, unknown names have internal addresses."""
    turns: Iterator[int] = iter(range(10**9))

    def answer(host: str) -> Sequence[str] | None:
        if re.fullmatch(r"[0-9a-fA-Fx.:%]+", host):
            return None  # literals are resolved by the system
        if host == "rebound.test":
            return [[*PUBLIC, *INNER][next(turns) % (len(PUBLIC) + len(INNER))]]
        return KNOWN.get(host.lower().rstrip("."), INNER[:1])

    return answer


def is_open(host: str) -> bool:
    """Return whether an address is public."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        assigned = address in ipaddress.ip_network("2000::/3")
        return assigned and address.is_global and not address.sixtofour and not address.teredo
    return address.is_global and not address.is_multicast and host != "168.63.129.16"


@EFFORTS
def test_no_output_url_opens_a_socket_to_an_internal_address_or_another_port(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net().install(monkeypatch)
    net.answers = names()
    guard = Guard(())
    adapter = guarded_adapter(guard, connections=2)
    session = lean_session(adapter)
    reached = set[str]()

    @with_effort(examples)
    @given(url=urls())
    def check(url: str) -> None:
        net.connected.clear()
        [link] = collect_links([url]).links or collect_links(["https://good.test/x"]).links

        with suppress(RefusedTarget, requests.RequestException, HTTPError, ValueError, OSError):
            guard.check_url(link.url)
            session.get(link.url, timeout=1.0, allow_redirects=False, stream=True)

        for host, port in net.connected:
            reached.add(host)
            assert is_open(host)
            assert port == 443
            assert urlsplit(link.url).scheme == "https"

    check()

    assert len(reached) >= 3  # otherwise the test checks nothing


@EFFORTS
def test_no_redirect_opens_a_socket_to_a_forbidden_address(
    stand: Stand, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "127.7.7.7"
    stand.allowed = (ipaddress.ip_network(f"{own}/32"),)
    with web_server(own) as web:
        net = Net(loopback=True).install(monkeypatch)
        net.answers, net.only = names(), (own, web.port)  # other servers on this machine are not contacted
        downloader = stand.downloader()
        turns = iter(range(10**9))

        @with_effort(examples, of=5)
        @given(location=urls(), status=st.sampled_from([301, 302, 303, 307, 308]))
        @example("http://good.test/a.png", 302)
        @example("https://good.test:8443/a.png", 301)
        @example("https://inner.test/a.png", 307)
        @example("//127.0.0.1:5432/", 308)
        @example("https://rebound.test/a.png", 303)
        def check(location: str, status: int) -> None:
            net.connected.clear()
            written = location.encode("utf-8", "replace").replace(b"\r", b"").replace(b"\n", b"")
            web.serves(
                "/start", sends(b"HTTP/1.1 %d x\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, written))
            )

            downloader.run(stand.add(f"{web.url}/start?{next(turns)}"))

            assert net.connected[0] == (own, web.port)
            for host, port in net.connected:
                assert host == own or (is_open(host) and port == 443)

        check()
