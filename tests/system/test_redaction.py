"""The scrubber removes keys in all spellings."""

import base64
import io
import json
import logging
import threading
from collections.abc import Callable
from urllib.parse import quote

import pytest

from tests.spellings import SPELLINGS
from worker.system.redaction import RedactingFilter, Scrubber

KEY = 'Kq3vZ8/mT1x"Rw5y+Lb7n&Pd0c=Gh2s Jf6a'
JWT_HEADER = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."


@pytest.mark.parametrize(
    "key", [KEY, "d41d8cd98f00b204e9800998ecf8427e", JWT_HEADER + "eyJhIjoxfQ.A-B_c", "sé\U0001f511" * 4]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_is_removed_in_every_spelling(spelling: str, key: str) -> None:
    scrubber = Scrubber(["another key that is not there", key])
    spelled = SPELLINGS[spelling](key)

    assert scrubber.text(f"before {spelled} after") == "before [key] after"
    assert scrubber.body(f"before {spelled} after".encode()) == b"before [key] after"


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", [b"", b"u", b"us", b"use", b"user:"])
@pytest.mark.parametrize("after", [b"", b"x", b"xy"])
def test_a_key_inside_base64_leaves_no_character_that_depends_on_it(
    before: bytes, after: bytes, alphabet: Callable[[bytes], bytes]
) -> None:
    scrubbed = Scrubber([KEY]).body(b"Basic " + alphabet(before + KEY.encode() + after))

    other = KEY.translate({ord(char): chr(ord(char) ^ 3) for char in KEY}).encode()
    assert Scrubber([other.decode()]).body(b"Basic " + alphabet(before + other + after)) == scrubbed
    assert b"[key]" in scrubbed


@pytest.mark.parametrize("at", [0, 1, 65_000, 65_530, 65_536, 131_072, 200_000])
@pytest.mark.parametrize("spelling", ["plain", "code units in JSON in JSON", "in a URL, twice", "base64"])
def test_a_key_is_removed_at_any_place_of_a_long_text_and_the_rest_is_unchanged(spelling: str, at: int) -> None:
    filling = "%41\\n&lt; "
    text = filling * 30_000
    before, after = text[:at] + " ", " " + text[at:]

    assert Scrubber([KEY]).text(before + SPELLINGS[spelling](KEY) + after) == f"{before}[key]{after}"


@pytest.mark.parametrize("size", [18, 20, 30, len(KEY) - 1])
def test_a_long_fragment_of_a_key_is_removed_from_texts(size: int) -> None:
    scrubber = Scrubber([KEY])

    assert scrubber.text(f"your key {KEY[:size]}... is not valid") == "your key [key]... is not valid"
    assert scrubber.text(f"key …{KEY[-size:]} is not valid") == "key …[key] is not valid"
    assert scrubber.text(f"see {quote(KEY[:size])}!") == "see [key]!"


def test_a_short_fragment_of_a_key_stays() -> None:
    assert Scrubber([KEY]).text(f"key {KEY[:8]}...") == f"key {KEY[:8]}..."


def test_a_signed_link_that_begins_like_the_key_is_not_changed() -> None:
    scrubber = Scrubber([JWT_HEADER + "eyJhIjoxfQ.AAAA"])
    link = f"https://cdn.example/a.png?token={JWT_HEADER}eyJhIjoyfQ.BBBB"

    assert scrubber.link(link) == link
    assert scrubber.body(link.encode()) == link.encode()


def test_json_stays_valid_if_the_key_begins_with_a_quotation_mark() -> None:
    scrubbed = Scrubber(['"quoted" key of an app']).body(json.dumps({"a": ['"quoted" key of an app!']}).encode())

    assert json.loads(scrubbed) == {"a": ["[key]!"]}


def test_without_keys_a_text_is_not_changed() -> None:
    assert Scrubber([]).text("anything") == "anything"
    assert Scrubber(["", KEY]).text("anything") == "anything"


@pytest.mark.parametrize("key", ["k", "abc", "abcdefg", "a%2Fb", "\\", "/", "aaaaaaaaaaaaaaaaaaaaaaaa"])
def test_unusual_keys_are_removed(key: str) -> None:
    scrubbed = Scrubber([key]).text(f"?? {key} ??")

    assert scrubbed in ("?? [key] ??", f"?? {key} ??" if key == "\\" else "?? [key] ??")


def test_lone_surrogates_stay() -> None:
    assert Scrubber([KEY]).text(f"\ud83d {KEY} \udc00") == "\ud83d [key] \udc00"


def test_a_key_that_is_a_prefix_of_another_key_is_removed_too() -> None:
    assert Scrubber(["abcd", "abcdefgh"]).text("abcdefgh abcd") == "[key] [key]"


def test_keys_can_be_added_by_many_threads() -> None:
    scrubber = Scrubber([KEY])
    keys = [f"{number:032x}" for number in range(40)]
    threads = [threading.Thread(target=scrubber.add, args=([key],)) for key in keys]
    for thread in threads:
        thread.start()
        assert scrubber.text(KEY) == "[key]"
    for thread in threads:
        thread.join()

    assert scrubber.text(" ".join([KEY, *keys])) == " ".join(["[key]"] * 41)


def test_a_logged_traceback_does_not_contain_the_key() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(message)s %(extra)s"))
    handler.addFilter(RedactingFilter(Scrubber([KEY])))
    logger = logging.Logger("scrubbed")
    logger.addHandler(handler)

    try:
        try:
            raise KeyError(KEY)
        except KeyError as cause:
            error = ValueError(f"trouble with {KEY}")
            error.add_note(f"note: {KEY}")
            raise error from cause
    except ValueError:
        logger.exception("no luck with %s", KEY, extra={"extra": {"args": [f"<{KEY}>"]}}, stack_info=True)

    assert KEY not in out.getvalue()
    assert KEY.replace('"', '\\"') not in out.getvalue()
    assert "no luck with [key]" in out.getvalue()
    assert "{'args': ['<[key]>']}" in out.getvalue()
    assert "ValueError: trouble with [key]\nnote: [key]" in out.getvalue()


def test_a_record_that_was_formatted_before_is_redacted_in_traceback_and_stack() -> None:
    record = logging.makeLogRecord({"msg": "x", "exc_text": f"Error: {KEY}", "stack_info": f"at {KEY}"})

    RedactingFilter(Scrubber([KEY])).filter(record)

    assert (record.exc_text, record.stack_info) == ("Error: [key]", "at [key]")


def test_a_line_with_wrong_arguments_is_logged_without_the_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(RedactingFilter(Scrubber([KEY])))
    logger = logging.Logger("scrubbed")
    logger.addHandler(handler)

    logger.error("two %s of %d", KEY)

    written = capsys.readouterr().err
    assert "two %s of %d" in written
    assert "[key]" in written
    assert KEY not in written


def test_the_representation_of_a_scrubber_does_not_contain_its_keys() -> None:
    assert KEY not in repr(Scrubber([KEY]))
