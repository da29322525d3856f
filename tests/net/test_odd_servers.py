"""Downloads from servers that slip: headers that lie, interim answers, files that come late. A slip is no attack."""

import gzip
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

import worker
from tests.download_stand import PNG, Stand, png
from tests.downloads.test_downloader import _assert_stored, _make_due
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


# ── headers that lie ──────────────────────────────────────────────────────────────────────────────────────────────────


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
def test_given_a_wrong_content_encoding_when_downloaded_then_the_picture_is_found(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """What the bytes are counts, not what they are called."""
    _assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


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
def test_given_a_wrong_length_when_downloaded_then_the_picture_is_looked_at(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """It shows its end itself."""
    _assert_stored(stand, stand.download(web.serves("/a.png", answer)), PNG)


@pytest.mark.parametrize(
    "answer",
    [
        sends(_length(LONG) + PNG[:SHORT]),
        sends(_length(SHORT) + PNG[:SHORT]),
        sends(_length(LONG, Content_Encoding="gzip") + gzip.compress(PNG)[:-2_000]),
    ],
)
def test_given_a_picture_that_is_cut_when_its_length_is_wrong_too_then_it_is_not_stored(
    stand: Stand, web: Web, answer: Answer
) -> None:
    """The picture has the last word."""
    row = stand.download(web.serves("/a.png", answer))
    assert (row.status, row.error_code, stand.files) == ("pending", "truncated", [])


# ── interim answers ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("interim", [*INTERIM, b"".join(INTERIM), INTERIM[1] * 20])
def test_given_interim_answers_when_downloaded_then_the_answer_after_them_counts(
    stand: Stand, web: Web, interim: bytes
) -> None:
    """Whatever their number, within reason."""
    _assert_stored(stand, stand.download(web.serves("/a.png", sends(interim, _length(len(PNG)) + PNG))), PNG)


def test_given_interim_answers_without_end_when_downloaded_then_it_is_trouble(stand: Stand, web: Web) -> None:
    """They are no way to hold a thread."""
    row = stand.download(web.serves("/a.png", sends(INTERIM[0] * 1_000)))
    assert (row.status, row.error_code) == ("pending", "unreachable")


# ── links as they were given ──────────────────────────────────────────────────────────────────────────────────────────

LINKS = [
    ("//signed//key.png", "//signed//key.png"),
    ("/a%2Fb%2fc%7e.png?X=%2f&&y=&z", "/a%2Fb%2fc%7e.png?X=%2f&&y=&z"),
    ("/a/../b/./c.png", "/a/../b/./c.png"),
    ("/a b.png?c d=e", "/a%20b.png?c%20d=e"),
    ("/é.png#top", "/%C3%A9.png"),
    ("?only=query", "/?only=query"),
]


@pytest.mark.parametrize(("link", "target"), LINKS)
def test_a_link_goes_out_as_it_was_given(stand: Stand, web: Web, link: str, target: str) -> None:
    """Signatures are made over its characters."""
    web.serves(target.partition("?")[0], page(200, PNG))
    assert stand.download(web.url + link).status == "stored"
    assert [asked.path for asked in web.asked] == [target]


@pytest.mark.parametrize(("link", "target"), LINKS[:4])
@pytest.mark.parametrize("form", ["{url}{link}", "{link}", "//127.0.0.1:{port}{link}"])
def test_a_redirect_goes_out_as_it_was_given(stand: Stand, web: Web, link: str, target: str, form: str) -> None:
    """Absolute, a path, or without a scheme."""
    if form == "{link}" and link.startswith("//"):
        pytest.skip("that names a host")
    web.serves(target.partition("?")[0], page(200, PNG))
    location = form.format(url=web.url, link=link, port=web.port)
    assert stand.download(web.serves("/from", page(302, b"", Location=location))).status == "stored"
    assert [asked.path for asked in web.asked] == ["/from", target]


@pytest.mark.parametrize("link", ["/a\nb.png", "/a\x00.png", "/a\tb.png", "/a\x7f.png", "/a\\b.png"])
def test_control_characters_and_backslashes_are_refused(stand: Stand, web: Web, link: str) -> None:
    """In whatever way they came here."""
    row = stand.download(web.url + link)
    assert (row.status, row.error_code, web.asked) == ("failed", "refused_address", [])


# ── a store that lags ─────────────────────────────────────────────────────────────────────────────────────────────────

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
    """Let so many seconds pass since the output was listed."""
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
def test_given_a_store_that_lags_when_the_file_comes_within_a_minute_then_it_is_stored(
    stand: Stand, web: Web, early: Answer
) -> None:
    """However often it was looked for before."""
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
    _make_due(stand.engine)
    downloader.run(output_id)
    _assert_stored(stand, read_output(stand.engine, output_id), PNG)


@pytest.mark.parametrize("early", EARLY.values(), ids=EARLY)
def test_given_a_store_that_lags_for_a_minute_then_a_fresh_link_is_asked_for_once(
    stand: Stand, web: Web, early: Answer
) -> None:
    """After it, three more attempts end an output."""
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


def test_given_an_output_of_another_kind_then_three_attempts_end_it_at_any_time(stand: Stand, web: Web) -> None:
    """A program or noise is not what a store says while it lags."""
    output_id = stand.add(web.serves("/a.png", page(200, b"\x7fELF\x02\x01\x01\x00" + bytes(500))))
    downloader = stand.downloader()
    for _ in range(3):
        _make_due(stand.engine)
        downloader.run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.error_code, row.attempts) == ("failed", "not_media", 3)


# ── a server that says when ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "asked", "least", "most"),
    [
        (429, lambda: "120", 110, 120),
        (503, lambda: "90", 80, 90),
        (503, lambda: format(datetime.now(UTC) + timedelta(seconds=100), "%a, %d %b %Y %H:%M:%S GMT"), 80, 100),
        (429, lambda: "0", 3, 5),
        (429, lambda: "soon", 3, 5),
        (429, lambda: "999999999", 3_500, 3_600),
    ],
)
def test_a_server_that_asks_for_time_gets_it(
    stand: Stand, web: Web, status: int, asked: Callable[[], str], least: float, most: float
) -> None:
    """Within an hour, and not sooner than by our own waits."""
    row = stand.download(web.serves("/a.png", page(status, b"", Retry_After=asked())))
    wait = (row.due_at.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
    assert (row.status, row.error_code) == ("pending", "http_error")
    assert least < wait <= most


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_product_says_who_it_is(stand: Stand, web: Web) -> None:
    """Hosts refuse the names that libraries go by."""
    assert Settings().user_agent == f"fetch-worker/{worker.__version__}"
    stand.download(web.serves("/a.png", page(200, PNG)))
    assert web.asked[0].headers["user-agent"].startswith("fetch-worker")


def test_whoever_wants_another_name_sets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For the API, downloads and webhooks alike."""
    settings = Settings(user_agent="shop/2.1 (+https://shop.test)", storage_url=f"file:{tmp_path}")
    monkeypatch.setattr(resources, "settings", settings)
    own = resources.ProcessResources()
    used = [own.api._headers["User-Agent"], own.downloader._headers["User-Agent"], own.webhooks._user_agent]
    assert used == ["shop/2.1 (+https://shop.test)"] * 3


def test_a_file_that_unpacks_to_more_than_is_allowed_ends_the_output(stand: Stand, web: Web) -> None:
    """Also where nobody said that it is packed."""
    bomb = gzip.compress(png()[:40] + bytes(64 * 1_048_576), 1)
    row: Any = stand.download(web.serves("/a.png", page(200, bomb)))
    assert (row.status, row.error_code) == ("failed", "too_large")
