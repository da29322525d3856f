"""The scrubber takes keys out, however they are written."""

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
def test_given_a_key_in_any_spelling_when_scrubbed_then_it_is_gone(spelling: str, key: str) -> None:
    scrubber = Scrubber(["another key that is not there", key])
    spelled = SPELLINGS[spelling](key)

    assert scrubber.text(f"before {spelled} after") == "before [key] after"
    assert scrubber.body(f"before {spelled} after".encode()) == b"before [key] after"


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", [b"", b"u", b"us", b"use", b"user:"])
@pytest.mark.parametrize("after", [b"", b"x", b"xy"])
def test_given_a_key_within_base64_when_scrubbed_then_no_digit_is_left_that_depends_on_it(
    before: bytes, after: bytes, alphabet: Callable[[bytes], bytes]
) -> None:
    scrubbed = Scrubber([KEY]).body(b"Basic " + alphabet(before + KEY.encode() + after))

    other = KEY.translate({ord(char): chr(ord(char) ^ 3) for char in KEY}).encode()
    assert Scrubber([other.decode()]).body(b"Basic " + alphabet(before + other + after)) == scrubbed
    assert b"[key]" in scrubbed


@pytest.mark.parametrize("at", [0, 1, 65_000, 65_530, 65_536, 131_072, 200_000])
@pytest.mark.parametrize("spelling", ["plain", "code units in JSON in JSON", "in a URL, twice", "base64"])
def test_given_a_key_anywhere_in_a_long_text_when_scrubbed_then_it_is_gone_and_the_rest_is_as_it_was(
    spelling: str, at: int
) -> None:
    filling = "%41\\n&lt; "
    text = filling * 30_000
    before, after = text[:at] + " ", " " + text[at:]

    assert Scrubber([KEY]).text(before + SPELLINGS[spelling](KEY) + after) == f"{before}[key]{after}"


@pytest.mark.parametrize("size", [18, 20, 30, len(KEY) - 1])
def test_given_a_long_beginning_or_end_of_a_key_when_scrubbed_then_texts_lose_it(size: int) -> None:
    scrubber = Scrubber([KEY])

    assert scrubber.text(f"your key {KEY[:size]}... is not valid") == "your key [key]... is not valid"
    assert scrubber.text(f"key …{KEY[-size:]} is not valid") == "key …[key] is not valid"
    assert scrubber.text(f"see {quote(KEY[:size])}!") == "see [key]!"


def test_given_a_short_beginning_of_a_key_when_scrubbed_then_it_stays() -> None:
    assert Scrubber([KEY]).text(f"key {KEY[:8]}...") == f"key {KEY[:8]}..."


def test_given_a_link_that_is_signed_by_a_token_that_begins_like_the_key_when_scrubbed_then_it_still_works() -> None:
    scrubber = Scrubber([JWT_HEADER + "eyJhIjoxfQ.AAAA"])
    link = f"https://cdn.example/a.png?token={JWT_HEADER}eyJhIjoyfQ.BBBB"

    assert scrubber.link(link) == link
    assert scrubber.body(link.encode()) == link.encode()


def test_given_json_in_which_the_key_begins_with_a_quotation_mark_when_scrubbed_then_it_is_json_still() -> None:
    scrubbed = Scrubber(['"quoted" key of somebody']).body(json.dumps({"a": ['"quoted" key of somebody!']}).encode())

    assert json.loads(scrubbed) == {"a": ["[key]!"]}


def test_given_no_keys_when_scrubbed_then_the_text_stays() -> None:
    assert Scrubber([]).text("anything") == "anything"
    assert Scrubber(["", KEY]).text("anything") == "anything"


@pytest.mark.parametrize("key", ["k", "abc", "abcdefg", "a%2Fb", "\\", "/", "aaaaaaaaaaaaaaaaaaaaaaaa"])
def test_given_an_odd_key_when_scrubbed_then_it_is_gone_where_it_stands(key: str) -> None:
    scrubbed = Scrubber([key]).text(f"?? {key} ??")

    assert scrubbed in ("?? [key] ??", f"?? {key} ??" if key == "\\" else "?? [key] ??")


def test_given_a_text_with_lone_surrogates_when_scrubbed_then_they_stay() -> None:
    assert Scrubber([KEY]).text(f"\ud83d {KEY} \udc00") == "\ud83d [key] \udc00"


def test_given_two_keys_of_which_one_begins_like_the_other_when_scrubbed_then_both_are_gone() -> None:
    assert Scrubber(["abcd", "abcdefgh"]).text("abcdefgh abcd") == "[key] [key]"


def test_given_keys_that_are_added_by_many_threads_when_scrubbed_then_all_are_known() -> None:
    scrubber = Scrubber([KEY])
    keys = [f"{number:032x}" for number in range(40)]
    threads = [threading.Thread(target=scrubber.add, args=([key],)) for key in keys]
    for thread in threads:
        thread.start()
        assert scrubber.text(KEY) == "[key]"
    for thread in threads:
        thread.join()

    assert scrubber.text(" ".join([KEY, *keys])) == " ".join(["[key]"] * 41)


def test_given_a_traceback_with_the_key_when_logged_then_the_log_has_none_of_it() -> None:
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


def test_given_a_record_that_others_have_formatted_when_logged_then_its_traceback_and_stack_have_no_key() -> None:
    record = logging.makeLogRecord({"msg": "x", "exc_text": f"Error: {KEY}", "stack_info": f"at {KEY}"})

    RedactingFilter(Scrubber([KEY])).filter(record)

    assert (record.exc_text, record.stack_info) == ("Error: [key]", "at [key]")


def test_given_arguments_that_do_not_fit_when_logged_then_the_line_is_there_without_the_key(
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


def test_given_a_scrubber_when_shown_then_it_says_nothing_of_its_keys() -> None:
    assert KEY not in repr(Scrubber([KEY]))
