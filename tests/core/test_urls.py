"""Addresses go out as they were given: only what no address may hold is quoted."""

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
def test_an_address_goes_out_as_it_was_given(url: str) -> None:
    """Signatures are made over its characters; what the guard refuses stays there to be refused."""
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
def test_what_no_address_may_hold_is_quoted_after_the_host(url: str, out: str) -> None:
    """As UTF-8, as browsers do. A blank in the host stays, and is refused."""
    assert percent_encoded(url) == out


def test_the_target_of_a_request_begins_with_a_slash() -> None:
    """Whatever follows the host, and nothing of it is lost."""
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
def test_a_redirect_is_followed_to_where_it_says(location: str, target: str) -> None:
    """Relative ones are resolved, and nothing else about them changes."""
    assert redirect_target("http://h/a/b?c", location) == target


def test_a_redirect_that_can_not_be_read_is_an_error() -> None:
    """It is the server's slip, and no attack."""
    with pytest.raises(ValueError, match="IPv6"):
        redirect_target("http://h/a", "http://[bad")
