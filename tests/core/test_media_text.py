"""Text outputs: when text is promised, and which bytes are accepted as that text."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.media.signatures import Media
from worker.core.media.text import (
    JSON,
    PARSED_CHARACTERS,
    PLAIN,
    SRT,
    VTT,
    NotPromisedText,
    Promise,
    promised_text,
    text_media,
)

CUES = b"1\n00:00:00,000 --> 00:00:02,500\nHello.\n\n2\n00:00:02,500 --> 00:00:04,000\nBye.\n"
CAPTIONS = b"WEBVTT\n\n00:00.000 --> 00:02.500\n<v Ann>Hello.\n"
WORDS = json.dumps({"text": "Hello.", "words": [{"word": "Hello.", "start": 0.1}]}).encode()


def sniffed(promise: Promise, body: bytes, step: int = 1_000_000) -> Media | str:
    """Return the media type of bytes in chunks of `step`, or the error code."""
    try:
        return text_media(promise, (body[at : at + step] for at in range(0, len(body), step)))
    except NotPromisedText as reason:
        return "truncated" if reason.is_truncated else "not_media"


@pytest.mark.parametrize(
    ("address", "declared", "promise"),
    [
        ("https://h/a.txt", "", "text"),
        ("https://h/a.txt", "image/png", "text"),
        ("https://h/A.TXT", "", "text"),
        ("https://h/a.text", "", "text"),
        ("https://h/a.txt?name=b.png&sig=x.mp4#c.png", "", "text"),
        ("https://h/a%2Etxt", "", "text"),
        ("https://h/a.png.txt", "", "text"),
        ("https://h/a.json", "text/plain", "json"),
        ("https://h/a.json.gz", "", "json"),
        ("https://h/a.srt", "", "subtitles"),
        ("https://h/a.vtt", "application/octet-stream", "subtitles"),
        ("https://h/a", "text/plain", "text"),
        ("https://h/a", "Text/Plain ; charset=UTF-8", "text"),
        ("https://h/v1.2", "application/json", "json"),
        ("https://h/download?file=a.png", "text/vtt", "subtitles"),
        ("https://h/", "application/x-subrip", "subtitles"),
        ("https://h/a", "text/html", ""),
        ("https://h/a", "application/problem+json", ""),
        ("https://h/a", "application/xml", ""),
        ("https://h/a", "", ""),
        ("https://h/a.png", "text/plain", ""),
        ("https://h/a.JPG?x=.txt", "application/json", ""),
        ("https://h/a.txt.mp4", "text/plain", ""),
        ("https://h/a.html", "text/plain", ""),
        ("https://h/a.svg", "text/plain", ""),
        ("https://h.txt", "", ""),
        ("https://h.txt/a", "", ""),
        ("https://h/a.txt/b", "", ""),
        ("https://h/.txt", "", ""),
        ("https://[h/a.txt", "", ""),
    ],
)
def test_the_promise_depends_on_extension_and_declared_type(address: str, declared: str, promise: str) -> None:
    assert promised_text([address], declared) == promise


def test_the_link_decides_before_its_redirect_target() -> None:
    assert promised_text(["https://h/a.txt", "https://cdn/b.png"], "image/png") == "text"
    assert promised_text(["https://h/a.png", "https://cdn/b.txt"], "text/plain") == ""
    assert promised_text(["https://h/go", "https://cdn/b.json"], "text/plain") == "json"
    assert promised_text(["https://h/go", "https://cdn/b.png"], "text/plain") == ""


@pytest.mark.parametrize(
    ("promise", "body", "media"),
    [
        ("text", b"A", PLAIN),
        ("text", "Grüße, 你好 🙂\r\n\tEnde".encode(), PLAIN),
        ("text", b"\xef\xbb\xbfHello.", PLAIN),
        ("text", "Hello.".encode("utf-16"), PLAIN),
        ("text", "\ufeff你好".encode("utf-16-be"), PLAIN),
        ("text", WORDS, PLAIN),
        ("text", b'{"error": "is what he said", "text": "..."}', PLAIN),
        ("text", b"{unfinished thoughts", PLAIN),
        ("text", CUES, PLAIN),
        ("text", b"a < b, and <b>bold</b> is HTML", PLAIN),
        ("text", b"<unk> hello", PLAIN),
        ("text", b"<|en|> hello", PLAIN),
        ("text", b"Here is a page: <!doctype html><html></html>", PLAIN),
        ("text", b"https://h/" + b"x" * 500, PLAIN),
        ("json", WORDS, JSON),
        ("json", b"\xef\xbb\xbf \n[1, 2.5e3]\n", JSON),
        ("json", '{"a": "ü"}'.encode("utf-16"), JSON),
        ("json", b'"words"', JSON),
        ("json", b"[" + b"9" * 10_000 + b"]", JSON),
        ("json", b'{"choices": [{"message": {"content": "<html>"}}], "error": null}', JSON),
        ("json", b'{"message": "Hello."}', JSON),
        ("json", b'{"status": "success", "message": "Hello."}', JSON),
        ("json", b'{"message": "The key was not found, said Ann. %s"}' % (b"And so on. " * 30), JSON),
        ("json", b'{"code": 7, "type": "a"}', JSON),
        ("json", b'{"text": "no such thing", "status": 404}', JSON),
        ("json", b"{}", JSON),
        ("json", b"[]", JSON),
        ("subtitles", CAPTIONS, VTT),
        ("subtitles", b"WEBVTT", VTT),
        ("subtitles", b"\xef\xbb\xbfWEBVTT - Title\r\n\r\n", VTT),
        ("subtitles", CUES, SRT),
        ("subtitles", b"\xef\xbb\xbf\r\n" + CUES.replace(b"\n", b"\r\n"), SRT),
        ("subtitles", b"00:00:00.000 --> 00:00:02.500\nHello.", SRT),
    ],
)
def test_promised_text_is_accepted_in_any_chunks(promise: Promise, body: bytes, media: Media) -> None:
    assert [sniffed(promise, body, step) for step in (1, 2, 3, 7, 1_000)] == [media] * 5


@pytest.mark.parametrize("promise", ["text", "json", "subtitles"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n\t",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"<!doctype html><p>Sign in",
        b" \n<!-- -->\n<HTML><body>",
        b"\xef\xbb\xbf<html>",
        "<html></html>".encode("utf-16"),
        b"<p>Not found</p>",
        b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
        b"<Error><Code>NoSuchKey</Code>",
        b"<ListBucketResult xmlns='http://x/'><Name>b</Name></ListBucketResult>\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"<script>alert(1)</script>",
        b'{"error": "expired"}',
        b'{"statusCode": "404", "error": "not_found", "message": "Object not found"}',
        b'{"Code": "NoSuchKey", "Message": "gone", "RequestId": "1"}',
        b'{"error": {"code": 404, "message": "No such object", "errors": [{"reason": "notFound"}]}}',
        b'{"status": "error", "messege": "Invalid Api Key", "tip": "..."}',
        b'{"errors": ["gone"]}',
        b'{"success": false, "errors": [{"code": 10000}], "messages": [], "result": null}',
        b'{"code": "not_found", "message": "no file", "status": 404}',
        b'{"type": "about:blank", "title": "Not Found", "status": 404}',
        b'{"detail": "Not Found"}',
        b'{"message": "Access Denied"}',
        b'{"message": "", "exception": "NotFoundHttpException", "file": "a.php", "line": 3, "trace": []}',
        b'<node a="1"/>',
        b"Hello\0there",
        b"Hello\x07there",
        b"Hello\x1b[0m",
        b"\x7fELF",
        b"Gr\xfc\xdfe",
        b"\xff\xfeH",
        b"\x80abc",
    ],
)
def test_pages_errors_and_other_bytes_are_refused(promise: Promise, body: bytes) -> None:
    refused = {"not_media", "truncated"} if body == b"\xff\xfeH" else {"not_media"}
    assert {sniffed(promise, body, step) for step in (1, 2, 5, 1_000)} <= refused


@pytest.mark.parametrize(
    ("promise", "body", "code"),
    [
        ("json", b"Hello.", "not_media"),
        ("json", b"{unquoted: 1}", "not_media"),
        ("json", b'{"a": 1} {"a": 2}', "not_media"),
        ("json", CUES, "not_media"),
        ("json", b"[" * 100_000 + b"]" * 100_000, "not_media"),
        ("json", WORDS[:-1], "truncated"),
        ("json", WORDS[:12], "truncated"),
        ("json", b"[1, 2,", "truncated"),
        ("text", "Grü".encode()[:-1], "truncated"),
        ("text", "Hello.".encode("utf-16")[:-1], "truncated"),
        ("subtitles", b"Hello.", "not_media"),
        ("subtitles", WORDS, "not_media"),
        ("subtitles", b"WEBVTTX", "not_media"),
        ("subtitles", b"1\nHello --> you", "not_media"),
        ("text", b"QUJD" * 100, "not_media"),
        ("text", b"data:image/svg+xml;base64,PHN2Zy8+", "not_media"),
        ("text", (b"QUJD" * 19 + b"\r\n") * 3, "not_media"),
    ],
)
def test_another_text_format_is_refused(promise: Promise, body: bytes, code: str) -> None:
    assert [sniffed(promise, body, step) for step in (1, 2, 5, 100_000)] == [code] * 4


def test_very_long_json_is_checked_by_its_first_and_last_characters() -> None:
    long = b'{"text": "' + b"word " * (PARSED_CHARACTERS // 5) + b'"}\n'

    assert sniffed("json", long) == JSON
    assert sniffed("json", long[:-3]) == "not_media"
    assert sniffed("json", b"word " + long) == "not_media"


def test_json_with_too_many_values_needs_little_memory() -> None:
    document = b'{"words": [' + b"[]," * 1_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        media = sniffed("json", document)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert media == JSON
    assert sniffed("json", document[:-1]) == "not_media"
    assert peak < 40_000_000


@given(st.sampled_from(["text", "json", "subtitles"]), st.binary(max_size=60), st.integers(1, 9))
def test_the_result_is_the_same_for_any_chunks(promise: Promise, body: bytes, step: int) -> None:
    assert sniffed(promise, body, step) == sniffed(promise, body)
