"""Outputs in every shape the API writes them in."""
# ruff: noqa: E501  # a table has one line per case

import base64
import hashlib

import pytest
from hypothesis import given, settings

from tests.core.test_reply import ANY_JSON
from worker.core.links import MAX_LINKS, MAX_URL, Link, links, listed

A, B, C = "https://h/a.png", "https://h/b.png", "https://h/c.png"
P, Q = "https://cdn2/a.png", "https://cdn2/b.png"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(60)
INLINE = base64.b64encode(PICTURE).decode()
SUM = hashlib.sha256(PICTURE).hexdigest()

# fmt: off
SHAPES: list[tuple[str, object, object, tuple[Link, ...]]] = [
    ("text", A, None, (Link(A),)),
    ("text with blanks around", f" {A}\n", None, (Link(A),)),
    ("list", [A, B], None, (Link(A), Link(B))),
    ("order is kept, the second of two is dropped", [B, A, B], None, (Link(B), Link(A))),
    ("nested lists", [[A], [[B]]], None, (Link(A), Link(B))),
    ("object", {"1": A, "0": B}, None, (Link(A), Link(B))),
    ("object of lists", {"images": [A, B], "seed": 5, "nsfw": [False]}, None, (Link(A), Link(B))),
    ("nothing in it", ["", None, 0, [], {}, " "], None, ()),
    ("nothing at all", None, None, ()),
    ("numbers", 5, None, ()),
    ("too deep", [[[[[[[[[A]]]]]]]]], None, ()),
    ("other schemes get their row, too", ["ftp://h/a", "file:///etc/passwd", "a.png"], None, (Link("ftp://h/a"), Link("file:///etc/passwd"), Link("a.png"))),
    ("proxies by place", [A, B], [P, Q], (Link(A, (P,)), Link(B, (Q,)))),
    ("proxy as text beside one output", [A], P, (Link(A, (P,)),)),
    ("proxy as text beside two outputs", [A, B], P, (Link(A), Link(B))),
    ("too few proxies pair with nobody", [A, B, C], [P, Q], (Link(A), Link(B), Link(C))),
    ("proxies with a hole pair with nobody", [A, B], ["", Q], (Link(A), Link(B))),
    ("a proxy that is the link", [A], [A], (Link(A),)),
    ("proxies of another scheme", [A], ["javascript:x"], (Link(A),)),
    ("a proxy too long to be one keeps its place", [A, B], ["https://h/" + "x" * MAX_URL, Q], (Link(A), Link(B, (Q,)))),
    ("proxies of no shape", [A], {"x": 5}, (Link(A),)),
    ("the proxies of one that is listed twice", [A, A], [P, Q], (Link(A, (P,)),)),
    ("data URI", f"data:image/png;base64,{INLINE}", None, (Link(f"data:image/png;sha256={SUM}", (), PICTURE),)),
    ("data URI in capitals", f"DATA:image/png;BASE64,{INLINE}", None, (Link(f"data:image/png;sha256={SUM}", (), PICTURE),)),
    ("data URI without padding", f"data:image/png;base64,{INLINE.rstrip('=')}", None, (Link(f"data:image/png;sha256={SUM}", (), PICTURE),)),
    ("data URI with percent signs", "data:,%89PNG", None, (Link(f"data:;sha256={hashlib.sha256(bytes([0x89]) + b'PNG').hexdigest()}", (), b"\x89PNG"),)),
    ("bare base64", INLINE, None, (Link(f"data:;sha256={SUM}", (), PICTURE),)),
    ("bare base64 in lines", "\n".join(INLINE[i:i + 20] for i in range(0, len(INLINE), 20)), None, (Link(f"data:;sha256={SUM}", (), PICTURE),)),
    ("the same bytes twice", [INLINE, INLINE], None, (Link(f"data:;sha256={SUM}", (), PICTURE),)),
    ("short words are no base64", "abcd", None, (Link("abcd"),)),
    ("characters that no database takes", "https://h/\x00\ud800.png", None, (Link("https://h/\\x00?.png"),)),
]
# fmt: on


@pytest.mark.parametrize(("output", "proxies", "found"), [pytest.param(*case, id=name) for name, *case in SHAPES])
def test_every_shape_of_output_becomes_links(output: object, proxies: object, found: tuple[Link, ...]) -> None:
    assert links(output, proxies) == found


def test_two_broken_data_uris_are_two_outputs() -> None:
    """Each is listed, so each gets its row, though neither can be decoded."""
    found = links(["data:image/png;base64,!!", "data:image/png;base64,??"])

    assert len(found) == 2
    assert all(link.body is not None for link in found)


def test_an_endless_link_and_an_endless_list_are_cut() -> None:
    assert len(links("https://h/" + "a" * 100_000)[0].url) == MAX_URL + 1
    assert len(links([f"https://h/{i}" for i in range(MAX_LINKS + 5)])) == MAX_LINKS


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"output": [A], "links": [B], "proxy_links": [P]}, (Link(A, (P,)),)),
        ({"output": [], "links": [B], "proxy_links": [P]}, (Link(P),)),
        ({"links": [B]}, (Link(B),)),
        ({"future_links": [B]}, ()),
        ({}, ()),
    ],
)
def test_an_answer_lists_its_output_or_else_its_proxies_or_links(
    answer: dict[str, object], found: tuple[Link, ...]
) -> None:
    assert listed(answer) == found


@settings(max_examples=60, deadline=None)
@given(ANY_JSON, ANY_JSON)
def test_whatever_is_listed_is_stored_once_and_can_be_written_down(output: object, proxies: object) -> None:
    found = links(output, proxies)

    assert len({link.url for link in found}) == len(found)
    for text in [text for link in found for text in (link.url, *link.proxies)]:
        assert text.encode()
        assert "\x00" not in text
