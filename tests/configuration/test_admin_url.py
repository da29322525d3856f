"""ADMIN_URL: which addresses are accepted, and which headers name the page."""

import pytest

from worker.configuration.admin_url import AdminUrl, parse_admin_url
from worker.errors import SettingsError
from worker.settings import load

PAGE = parse_admin_url("https://ops.example.com/fetch")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://ops.example.com/fetch", AdminUrl("https", "ops.example.com", "/fetch")),
        ("https://Ops.Example.com:443/a/b/", AdminUrl("https", "ops.example.com", "/a/b")),
        ("https://ops.example.com", AdminUrl("https", "ops.example.com", "")),
        ("http://10.0.0.5:8080/", AdminUrl("http", "10.0.0.5:8080", "")),
        ("https://[fd00::1]:8443/fetch", AdminUrl("https", "[fd00::1]:8443", "/fetch")),
        ("https://xn--bcher-kva.example/", AdminUrl("https", "xn--bcher-kva.example", "")),
    ],
)
def test_an_address_is_split_into_its_parts(text: str, url: AdminUrl) -> None:
    assert parse_admin_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        *("ops.example.com", "ftp://ops.example.com/", "https://", "https:///fetch", "//ops.example.com/"),
        *("https://bücher.example/", "https://ops.example.com:99999/", "https://[fd00::1/", "https://a b/"),
        *("https://ann:secret@ops.example.com/", "https://@ops.example.com/", "https://ops.example.com/?a=1"),
        *("https://ops.example.com/#top", "https://ops.example.com/a//b", "https://ops.example.com/a/../b"),
        *("https://ops.example.com/a%2fb", "https://ops.example.com/a b"),
    ],
)
def test_a_wrong_address_stops_the_page_with_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes ignore it."""
    monkeypatch.setenv("ADMIN_URL", text)

    with pytest.raises(SettingsError) as refused:
        load("admin")

    assert str(refused.value).startswith("ADMIN_URL must ")
    assert "secret" not in str(refused.value)
    assert load().admin_page is None


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        *(("ops.example.com", True), ("OPS.example.com:443", True), ("ops.example.com:80", False)),
        *(("ops.example.com:8443", False), ("ops.example.com.", False), ("ops.example.com.evil.test", False)),
        *(("evil.test", False), ("127.0.0.1", False), ("localhost", False), ("", False), ("[", False)),
        *(("ops.example.com/evil", False), ("ops.example.com?", False), ("ops.example.com#", False)),
        *(("ann@ops.example.com", False), ("ops.example.com@evil.test", False), ("ops.example.com:x", False)),
    ],
)
def test_only_its_host_is_accepted(host: str, accepted: bool) -> None:
    assert PAGE.accepts_host(host) is accepted


@pytest.mark.parametrize(
    ("origin", "accepted"),
    [
        *(("https://ops.example.com", True), ("https://ops.example.com/fetch/jobs/?a=b", True)),
        *(("https://ops.example.com:443/", True), ("http://ops.example.com", False), ("null", False), ("", False)),
        *(("https://ops.example.com.evil.test", False), ("https://evil.test/ops.example.com", False)),
        *(("https://ops.example.com@evil.test/", False), ("https://[", False), ("ops.example.com", False)),
    ],
)
def test_only_its_origin_is_accepted(origin: str, accepted: bool) -> None:
    assert PAGE.accepts_origin(origin) is accepted


def test_a_page_on_another_port_is_named_with_its_port() -> None:
    page = parse_admin_url("http://ops.example.com:8080/")

    assert [page.accepts_host(host) for host in ("ops.example.com:8080", "ops.example.com")] == [True, False]
    assert page.accepts_origin("http://ops.example.com:8080")
    assert not page.secure
