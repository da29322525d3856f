"""URLs are not changed, except for invalid characters, which are percent-encoded."""

import pytest

from worker.core.urls import percent_encoded, redirect_target, split


@pytest.mark.parametrize(
    "url",
    [
        "https://h//key//of/two.png",
        "https://h/a%2Fb%2fc%20d%7e%41.png",
        "https://h/a/../b/./c.png",
        "https://h/a?X-Amz-Signature=ab%2Fcd&b=2&a=1&empty=&flag&&a=1",
        "https://h?",
        "https://h/a?",
        "https://h/100%.png",
        "https://h/a+b;c=d,e@f:g!$&'()*~[x].png",
        "https://h/a\\b",
        "https://h/a\nb\x00\x7f\t",
    ],
)
def test_a_valid_url_is_not_changed(url: str) -> None:
    """Signatures cover the exact characters. What the address guard refuses is not changed either."""
    assert percent_encoded(url) == url


@pytest.mark.parametrize(
    ("url", "out"),
    [
        ("https://h/a b.png?c d", "https://h/a%20b.png?c%20d"),
        ("https://h/é.png?ü=日", "https://h/%C3%A9.png?%C3%BC=%E6%97%A5"),
        ("https://h/a#fragment", "https://h/a"),
        ('https://h/{a}|"<b>^`', "https://h/%7Ba%7D%7C%22%3Cb%3E%5E%60"),
        ("https://h h/a b", "https://h h/a%20b"),
    ],
)
def test_invalid_characters_after_the_host_are_percent_encoded(url: str, out: str) -> None:
    """As UTF-8, like browsers. A blank in the host is not changed, and is refused later."""
    assert percent_encoded(url) == out


def test_a_request_target_starts_with_a_slash() -> None:
    """It contains everything after the host."""
    assert split("https://h:8443//a?b=") == ("https://h:8443", "//a?b=")
    assert split("https://h?b") == ("https://h", "/?b")
    assert split("https://h") == ("https://h", "/")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://o/x//y/../z?&a=", "https://o/x//y/../z?&a="),
        ("//o/x", "http://o/x"),
        ("/x//y/../z", "http://h/x//y/../z"),
        ("x y", "http://h/a/x y"),
        ("../x//y", "http://h/x//y"),
        ("../../../x", "http://h/x"),
        ("./", "http://h/a/"),
        ("..", "http://h/"),
        ("?d=e", "http://h/a/b?d=e"),
        ("#top", "http://h/a/b?c"),
        (" /x ", "http://h/x"),
        ("/ü".encode().decode("latin-1"), "http://h/ü"),
        ("/\xfc", "http://h/ü"),
    ],
)
def test_redirect_targets_are_resolved(location: str, target: str) -> None:
    """Relative ones are resolved; nothing else changes."""
    assert redirect_target("http://h/a/b?c", location) == target


def test_an_invalid_redirect_raises_an_error() -> None:
    """This is a mistake of the server, not an attack."""
    with pytest.raises(ValueError, match="IPv6"):
        redirect_target("http://h/a", "http://[bad")
