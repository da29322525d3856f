"""The scrubber takes keys out, however they are written."""

import base64
import io
import logging
from urllib.parse import quote

import pytest

from worker.scrubber import ScrubbedLogs, Scrubber

KEY = 'se"cret/key+with:marks'


@pytest.mark.parametrize(
    "written",
    [KEY, quote(KEY, safe=""), KEY.replace('"', '\\"'), base64.b64encode(KEY.encode()).decode().rstrip("=")],
    ids=["plain", "in a URL", "in JSON", "as base64"],
)
def test_given_a_key_in_any_writing_when_scrubbed_then_it_is_gone(written: str) -> None:
    scrubber = Scrubber([KEY])

    assert scrubber.text(f"before {written} after") == "before [key] after"
    assert scrubber.body(f"before {written} after".encode()) == b"before [key] after"


@pytest.mark.parametrize(
    "written",
    [
        quote(KEY).lower(),
        "".join(f"%{byte:02X}" for byte in KEY.encode()),
        "".join(f"\\u{ord(char):04x}" for char in KEY),
        KEY.replace('"', "\\u0022").replace("/", "\\/").replace("+", "\\u002B").replace(":", "%3a"),
        "sé\U0001f511",
        "s%C3%A9%f0%9f%94%91",
        "s\\u00e9\\ud83d\\uDD11",
    ],
)
def test_given_a_key_of_which_any_characters_are_escaped_when_scrubbed_then_it_is_gone(written: str) -> None:
    scrubber = Scrubber([KEY, "sé\U0001f511"])

    assert scrubber.text(f"before {written} after") == "before [key] after"
    assert scrubber.body(f"before {written} after".encode()) == b"before [key] after"


def test_given_no_keys_when_scrubbed_then_the_text_stays() -> None:
    assert Scrubber([]).text("anything") == "anything"


def test_given_two_keys_of_which_one_begins_like_the_other_when_scrubbed_then_both_are_gone() -> None:
    assert Scrubber(["abcd", "abcdefgh"]).text("abcdefgh abcd") == "[key] [key]"


def test_given_a_traceback_with_the_key_when_logged_then_the_log_has_none_of_it() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.addFilter(ScrubbedLogs(Scrubber([KEY])))
    logger = logging.Logger("scrubbed")
    logger.addHandler(handler)

    try:
        raise ValueError(f"trouble with {KEY}")
    except ValueError:
        logger.exception("no luck with %s", KEY)

    assert KEY not in out.getvalue()
    assert "no luck with [key]" in out.getvalue()
    assert "ValueError: trouble with [key]" in out.getvalue()


def test_given_a_scrubber_when_shown_then_it_says_nothing_of_its_keys() -> None:
    assert KEY not in repr(Scrubber([KEY]))
