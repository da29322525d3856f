"""Outputs in every form that the API uses."""
# ruff: noqa: E501  # a table has one line per case

import base64
import hashlib

import pytest
from hypothesis import given, settings

from tests.vendor.test_replies import ANY_JSON
from worker.core.reply import MAX_URL, Link
from worker.vendor.answer_links import MAX_LINKS, collect_links, listed_outputs

A, B, C = "https://h/a.png", "https://h/b.png", "https://h/c.png"
P, Q = "https://cdn2/a.png", "https://cdn2/b.png"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(60)
INLINE = base64.b64encode(PICTURE).decode()
SPEECH = "so we went down to the river and then it was time to go home again because of the rain"
SUM = hashlib.sha256(PICTURE).hexdigest()

# fmt: off
SHAPES: list[tuple[str, object, object, tuple[Link, ...]]] = [
    ("text", A, None, (Link(A),)),
    ("text with blanks around", f" {A}\n", None, (Link(A),)),
    ("list", [A, B], None, (Link(A), Link(B))),
    ("the order stays, duplicates are removed", [B, A, B], None, (Link(B), Link(A))),
    ("nested lists", [[A], [[B]]], None, (Link(A), Link(B))),
    ("object", {"1": A, "0": B}, None, (Link(A), Link(B))),
    ("object of lists", {"images": [A, B], "seed": 5, "nsfw": [False]}, None, (Link(A), Link(B))),
    ("empty values", ["", None, 0, [], {}, " "], None, ()),
    ("null", None, None, ()),
    ("numbers", 5, None, ()),
    ("too deep", [[[[[[[[[A]]]]]]]]], None, ()),
    ("words are not URLs", [{"text": "A sentence.", "words": [{"word": "A", "start": 0.1}]}], None, ()),
    ("a sentence is no address", "Good morning and welcome.", None, ()),
    ("an output inside the output", {"status": "success", "output": [A], "proxy_links": [P]}, None, (Link(A, (P,)),)),
    ("proxies inside a list of objects", [{"url": A, "proxy_links": [P]}, {"url": B, "proxy_links": [Q]}], None, (Link(A, (P,)), Link(B, (Q,)))),
    ("an object's picture, not what it was made from", {"image": A, "init_image": B, "thumbnail": C}, None, (Link(A),)),
    ("texts beside an object's link", {"url": A, "seed": "5", "model": "sdxl", "name": "a.png"}, None, (Link(A),)),
    ("subtitles named by what they are", {"srt": A, "text": B}, None, (Link(A), Link(B))),
    ("base64 in an object", {"image": INLINE}, None, (Link(f"data:;sha256={SUM}", (), PICTURE),)),
    ("promises inside are no outputs", {"future_links": [A]}, None, ()),
    ("proxies in an object", [A], {"0": P}, (Link(A, (P,)),)),
    ("other schemes are outputs, too", ["ftp://h/a", "file:///etc/passwd", "a.png"], None, (Link("ftp://h/a"), Link("file:///etc/passwd"), Link("a.png"))),
    ("proxies by place", [A, B], [P, Q], (Link(A, (P,)), Link(B, (Q,)))),
    ("proxy as text beside one output", [A], P, (Link(A, (P,)),)),
    ("proxy as text beside two outputs", [A, B], P, (Link(A), Link(B))),
    ("too few proxies are not used", [A, B, C], [P, Q], (Link(A), Link(B), Link(C))),
    ("proxies with a gap are not used", [A, B], ["", Q], (Link(A), Link(B))),
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
    *((f"a word is not a URL: {word!r}", word, None, ()) for word in (
        "abcd", "OK", "Hello", "done", "Done.", "nsfw", "0", "0.5", "-", "...", "[]", "{}", " [ ] ", "{broken", "success", "12:30", "v1.5", "n/a")),
    *((f"words in a list are not URLs: {words}", words, None, ()) for words in (["success"], [["OK"], "-"], {"0": "OK"}, ["[]"])),
    *((f"a name of a file gets its row: {text!r}", text, None, (Link(text),)) for text in (
        "a.png", "out/1", "/tmp/a", "ftp://h/a", "s3:bucket", "file:///etc/passwd", "a.3gp", "mesh.glb")),
    *((f"speech without a mark is no file: {text[:20]!r}", output, None, ()) for text in (SPEECH, SPEECH.replace(" ", "\t"), SPEECH + "\n" + SPEECH)
      for output in (text, [text], [{"text": text}], {"text": text}, {"0": text})),
    ("characters that no database takes", "https://h/\x00\ud800.png", None, (Link("https://h/\\x00?.png"),)),
]
# fmt: on


@pytest.mark.parametrize(("output", "proxies", "links"), [pytest.param(*case, id=name) for name, *case in SHAPES])
def test_every_form_of_outputs_becomes_links(output: object, proxies: object, links: tuple[Link, ...]) -> None:
    assert collect_links(output, proxies).links == links


def test_two_broken_data_uris_are_two_outputs() -> None:
    """Each is listed, so each gets a row, although neither can be decoded."""
    links = collect_links(["data:image/png;base64,!!", "data:image/png;base64,??"]).links

    assert len(links) == 2
    assert all(link.body is not None for link in links)


def test_very_long_links_and_lists_are_cut() -> None:
    assert len(collect_links("https://h/" + "a" * 100_000).links[0].url) == MAX_URL + 1
    assert len(collect_links([f"https://h/{i}" for i in range(MAX_LINKS + 5)]).links) == MAX_LINKS


@pytest.mark.parametrize(
    ("answer", "links"),
    [
        ({"output": [A], "links": [B], "proxy_links": [P]}, (Link(A, (P,)),)),
        ({"output": [], "links": [B], "proxy_links": [P]}, (Link(P),)),
        ({"links": [B]}, (Link(B),)),
        ({"future_links": [B]}, ()),
        ({"output": [], "output_url": A, "future_links": [B]}, (Link(A),)),
        ({"output": "", "assets": [{"href": A}]}, (Link(A),)),
        ({"result": "a transcript", "images": ["not-an-address"]}, ()),
        ({"result": SPEECH}, ()),
        ({"output": {"text": SPEECH}}, ()),
        ({"output": "OK", "links": [B]}, (Link(B),)),
        ({"output": "[]", "links": [B]}, (Link(B),)),
        ({"message": A, "tip": A, "meta": {"init_image": A}, "fetch_result": A}, ()),
        ({}, ()),
    ],
)
def test_outputs_are_read_from_the_first_field_that_has_any(answer: dict[str, object], links: tuple[Link, ...]) -> None:
    assert listed_outputs(answer).links == links


@settings(max_examples=60, deadline=None)
@given(ANY_JSON, ANY_JSON)
def test_listed_links_are_unique_and_can_be_stored(output: object, proxies: object) -> None:
    links = collect_links(output, proxies).links

    assert len({link.url for link in links}) == len(links)
    for text in [text for link in links for text in (link.url, *link.proxies)]:
        assert text.encode()
        assert "\x00" not in text
