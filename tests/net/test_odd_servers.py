"""Downloads from faulty servers: wrong headers, interim responses, late files. A fault is not an attack."""

import gzip
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

import worker
from tests.download_stand import PNG, Stand, assert_stored, make_due, png
from tests.rows import read_job, read_output
from tests.web import Answer, Web, head, page, sends
from worker.process import resources
from worker.settings import Settings
from worker.store.schema import outputs

RAW_DEFLATE = zlib.compressobj(wbits=-15)
DEFLATED = RAW_DEFLATE.compress(PNG) + RAW_DEFLATE.flush()
INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 102 Processing\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nX: y\r\n\r\n",
]


def _length(count: int, **headers: str) -> bytes:
    return head(200, Content_Length=str(count), **headers)


# ── wrong headers ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answer",
    [
        page(200, PNG, Content_Encoding="gzip"),
        page(200, PNG, Content_Encoding="deflate"),
        page(200, PNG, Content_Encoding="br"),
        page(200, PNG, Content_Encoding="zstd"),
        page(200, PNG, Content_Encoding="gzip, br"),
        page(200, PNG, Content_Encoding="utf-8"),
        page(200, PNG, Content_Encoding="identity"),
        page(200, gzip.compress(PNG), Content_Encoding="gzip"),
        page(200, gzip.compress(PNG), Content_Encoding="x-gzip"),
        page(200, gzip.compress(PNG)),
        page(200, gzip.compress(PNG), Content_Encoding="br"),
        page(200, gzip.compress(gzip.compress(PNG)), Content_Encoding="gzip"),
        page(200, gzip.compress(gzip.compress(PNG)), Content_Encoding="gzip, gzip"),
        page(200, zlib.compress(PNG), Content_Encoding="deflate"),
        page(200, DEFLATED, Content_Encoding="deflate"),
        page(200, gzip.compress(zlib.compress(PNG)), Content_Encoding="deflate, gzip"),
    ],
)
def test_given_a_wrong_content_encoding_when_downloaded_then_the_picture_is_stored(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """The content decides, not the header."""
    assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


SHORT, LONG = len(PNG) - 1_000, len(PNG) + 1_000


@pytest.mark.parametrize(
    "answer",
    [
        sends(_length(LONG) + PNG),
        sends(_length(SHORT) + PNG),
        sends(_length(SHORT) + PNG[:SHORT], PNG[SHORT:]),
        sends(_length(len(PNG), Content_Encoding="gzip") + gzip.compress(PNG)),
        sends(_length(SHORT, Content_Encoding="gzip") + gzip.compress(PNG, 0)),
        sends(_length(LONG, Content_Encoding="gzip") + PNG),
        sends(head(200, Content_Length="many") + PNG),
        sends(head(200, Content_Length="-5") + PNG),
        sends(head(200, Content_Length="5, 6") + PNG),
        sends(head(200, Transfer_Encoding="chunked") + PNG),
        sends(head(200, Transfer_Encoding="chunked") + b"%x\r\n" % len(PNG) + PNG + b"\r\n"),
        page(206, PNG),
        page(206, PNG, Content_Range=f"bytes 0-{len(PNG) - 1}/{len(PNG)}"),
        page(206, PNG, Content_Range="bytes 0-99/100"),
        page(200, PNG, Content_Range="bytes 5-99/100"),
    ],
    ids=range(15),
)
def test_given_a_wrong_length_when_downloaded_then_the_picture_itself_is_checked(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """The picture's format shows its end."""
    assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


@pytest.mark.parametrize(
    "answer",
    [
        sends(_length(LONG) + PNG[:SHORT]),
        sends(_length(SHORT) + PNG[:SHORT]),
        sends(_length(LONG, Content_Encoding="gzip") + gzip.compress(PNG)[:-2_000]),
    ],
)
def test_given_a_truncated_picture_with_a_wrong_length_then_it_is_not_stored(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """The picture's format decides."""
    row = stand.download(web.serves("/a.png", answer))
    assert (row.status, row.error_code, stand.files) == ("pending", "truncated", [])


# ── interim responses ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("interim", [*INTERIM, b"".join(INTERIM), INTERIM[1] * 20])
def test_given_interim_responses_when_downloaded_then_the_final_response_counts(
    stand: Stand, web: Web, interim: bytes
) -> None:
    """Up to a reasonable number of them."""
    assert_stored(stand, stand.download(web.serves("/a.png", sends(interim, _length(len(PNG)) + PNG))), PNG)


def test_given_endless_interim_responses_when_downloaded_then_the_attempt_fails(stand: Stand, web: Web) -> None:
    """They must not occupy a thread."""
    row = stand.download(web.serves("/a.png", sends(INTERIM[0] * 1_000)))
    assert (row.status, row.error_code) == ("pending", "unreachable")


# ── unchanged links ───────────────────────────────────────────────────────────────────────────────────────────────────

LINKS = [
    ("//signed//key.png", "//signed//key.png"),
    ("/a%2Fb%2fc%7e.png?X=%2f&&y=&z", "/a%2Fb%2fc%7e.png?X=%2f&&y=&z"),
    ("/a/../b/./c.png", "/a/../b/./c.png"),
    ("/a b.png?c d=e", "/a%20b.png?c%20d=e"),
    ("/é.png#top", "/%C3%A9.png"),
    ("?only=query", "/?only=query"),
]


@pytest.mark.parametrize(("link", "target"), LINKS)
def test_a_link_is_requested_unchanged(stand: Stand, web: Web, link: str, target: str) -> None:
    """Signatures depend on its exact characters."""
    web.serves(target.partition("?")[0], page(200, PNG))
    assert stand.download(web.url + link).status == "stored"
    assert [request.path for request in web.requests] == [target]


REDIRECTS = [
    (form, link, target)
    for form in ("{url}{link}", "{link}", "//127.0.0.1:{port}{link}")  # absolute, a path, without a scheme
    for link, target in LINKS[:4]
    if not (form == "{link}" and link.startswith("//"))  # that would name a host
]


@pytest.mark.parametrize(("form", "link", "target"), REDIRECTS)
def test_a_redirect_is_followed_unchanged(stand: Stand, web: Web, form: str, link: str, target: str) -> None:
    web.serves(target.partition("?")[0], page(200, PNG))
    location = form.format(url=web.url, link=link, port=web.port)
    assert stand.download(web.serves("/from", page(302, b"", Location=location))).status == "stored"
    assert [request.path for request in web.requests] == ["/from", target]


@pytest.mark.parametrize("link", ["/a\nb.png", "/a\x00.png", "/a\tb.png", "/a\x7f.png", "/a\\b.png"])
def test_control_characters_and_backslashes_are_refused(stand: Stand, web: Web, link: str) -> None:
    """From any source."""
    row = stand.download(web.url + link)
    assert (row.status, row.error_code, web.requests) == ("failed", "refused_address", [])


# ── a store with a delay ──────────────────────────────────────────────────────────────────────────────────────────────

EARLY = {
    "nothing": page(200, b""),
    "a page": page(200, b"<!doctype html><title>Not ready</title>", Content_Type="text/html"),
    "XML": page(200, b"<?xml version='1.0'?><Error><Code>NotReady</Code></Error>"),
    "JSON": page(200, b'{"status": "processing"}'),
    "a word": page(200, b"not ready"),
    "a part": page(200, PNG[:2_000]),
    "a cut transfer": sends(_length(len(PNG)) + PNG[:2_000]),
    "404": page(404, b""),
}


def _age(stand: Stand, output_id: int, seconds: float) -> None:
    """Make the output older by this many seconds."""
    with stand.engine.begin() as connection:
        listed_at = datetime.now(UTC) - timedelta(seconds=seconds)
        dead = connection.execute(select(outputs.c.dead_since).where(outputs.c.id == output_id)).scalar()
        values = {
            "listed_at": listed_at,
            "due_at": datetime.now(UTC),
            "dead_since": None if dead is None else listed_at,
        }
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(values))


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
def test_given_a_store_with_a_delay_when_the_file_appears_within_a_minute_then_it_is_stored(
    stand: Stand, web: Web, early: Answer
) -> None:
    """However often it was tried before."""
    output_id = stand.add(web.serves("/a.png", early))
    downloader = stand.downloader()
    for seconds in (0, 5, 10, 15, 20, 30, 40, 50):
        _age(stand, output_id, seconds)
        downloader.run(output_id)
        row = read_output(stand.engine, output_id)
        assert (row.status, row.bad_bodies) == ("pending", 0)
        wait = (row.due_at.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
        assert 3 < wait < 11
    web.serves("/a.png", page(200, PNG))
    make_due(stand.engine)
    downloader.run(output_id)
    assert_stored(stand, read_output(stand.engine, output_id), PNG)


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
def test_given_a_store_with_a_delay_of_a_minute_then_a_fresh_link_is_requested_once(
    stand: Stand, web: Web, early: Answer
) -> None:
    """After it, three more failures end the output."""
    output_id = stand.add(web.serves("/a.png", early))
    downloader = stand.downloader()
    downloader.run(output_id)
    _age(stand, output_id, 61)
    downloader.run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.renewed, row.bad_bodies) == ("pending", True, 0)
    assert read_job(stand.engine, row.job_id).due_at is not None
    codes = {row.error_code}
    for _ in range(4):
        if row.status != "pending":
            break
        _age(stand, output_id, 70)
        downloader.run(output_id)
        row = read_output(stand.engine, output_id)
        codes.add(row.error_code)
    assert (row.status, len(codes)) == ("failed", 1)


def test_given_content_that_is_no_media_then_three_attempts_end_the_output(stand: Stand, web: Web) -> None:
    """A store with a delay does not answer with a program or noise."""
    output_id = stand.add(web.serves("/a.png", page(200, b"\x7fELF\x02\x01\x01\x00" + bytes(500))))
    downloader = stand.downloader()
    for _ in range(3):
        make_due(stand.engine)
        downloader.run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.error_code, row.attempts) == ("failed", "not_media", 3)


# ── Retry-After ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "retry_after", "minimum", "maximum"),
    [
        (429, lambda: "120", 110, 120),
        (503, lambda: "90", 80, 90),
        (503, lambda: format(datetime.now(UTC) + timedelta(seconds=100), "%a, %d %b %Y %H:%M:%S GMT"), 80, 100),
        (429, lambda: "0", 3, 5),
        (429, lambda: "soon", 3, 5),
        (429, lambda: "999999999", 3_500, 3_600),
    ],
)
def test_retry_after_is_respected(
    stand: Stand, web: Web, status: int, retry_after: Callable[[], str], minimum: float, maximum: float
) -> None:
    """At most an hour, and not sooner than the worker's own delay."""
    row = stand.download(web.serves("/a.png", page(status, b"", Retry_After=retry_after())))
    wait = (row.due_at.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    assert (row.status, row.error_code) == ("pending", "http_error")
    assert minimum < wait <= maximum


# ── User-Agent ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_requests_name_the_product_as_user_agent(stand: Stand, web: Web) -> None:
    """Some hosts refuse the default names of libraries."""
    assert Settings().user_agent == f"fetch-worker/{worker.__version__}"
    stand.download(web.serves("/a.png", page(200, PNG)))
    assert web.requests[0].headers["user-agent"].startswith("fetch-worker")


def test_the_user_agent_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For the API, downloads and webhooks."""
    settings = Settings(user_agent="shop/2.1 (+https://shop.test)", storage_url=f"file:{tmp_path}")
    monkeypatch.setattr(resources, "settings", settings)
    own = resources.ProcessResources()
    used = [
        own.api._headers["User-Agent"],
        own.downloader._transfer._headers["User-Agent"],
        own.webhooks._sender._user_agent,
    ]
    assert used == ["shop/2.1 (+https://shop.test)"] * 3


def test_a_file_that_decompresses_to_more_than_the_limit_ends_the_output(stand: Stand, web: Web) -> None:
    """Also if no header says that it is compressed."""
    bomb = gzip.compress(png()[:40] + bytes(64 * 1_048_576), 1)
    row: Any = stand.download(web.serves("/a.png", page(200, bomb)))
    assert (row.status, row.error_code) == ("failed", "too_large")
