"""Received files: they are unpacked, their media type is detected, and incomplete files are refused."""

import base64
import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.download_stand import MAX_BYTES, MAX_PIXELS, PNG, Stand, assert_stored, png
from tests.downloads.bad_bodies import HTML
from tests.web import Web, page
from worker.core.lifecycle import BadBody, Unfit
from worker.core.media.signatures import Media
from worker.downloads.content import MAX_CODINGS, check_content
from worker.downloads.options import DownloadOptions
from worker.storage.partial_files import Incoming, PartialFiles, Source


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PNG),
        base64.encodebytes(PNG),
        base64.urlsafe_b64encode(PNG).rstrip(b"="),
        b'"data:image/png;base64,' + base64.b64encode(PNG) + b'"\n',
    ],
    ids=["plain", "in lines", "for URLs", "data address"],
)
def test_a_base64_text_is_decoded_and_stored(stand: Stand, web: Web, text: bytes) -> None:
    """The API stores some outputs in this form."""
    row = stand.download(web.serves("/a.txt", page(200, text, Content_Type="text/plain")))
    assert_stored(stand, row, PNG)
    assert row.media_type == "image/png"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (base64.b64encode(PNG)[:-7], "truncated"),
        (base64.b64encode(PNG[:-100]), "truncated"),
        (base64.b64encode(PNG) + b"<html>", "not_media"),
        (base64.b64encode(HTML * 9), "not_media"),
        (base64.b64encode(png(12_500, 12_001)), "too_large"),
    ],
    ids=["text cut", "picture cut", "more after it", "of a page", "150 megapixels and more"],
)
def test_a_decoded_base64_text_passes_the_same_checks(stand: Stand, web: Web, text: bytes, code: str) -> None:
    """A refused file is deleted."""
    row = stand.download(web.serves("/a.txt", page(200, text)))
    assert (row.error_code, stand.files) == (code, [])


# ── files without a download ──────────────────────────────────────────────────────────────────────────────────────────

OPTIONS = DownloadOptions(max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS, timeout=5.0, deadline=60.0)


@pytest.fixture
def incoming(tmp_path: Path) -> Iterator[Incoming]:
    """A file of which nothing was received yet."""
    with PartialFiles(tmp_path / "parts").receive(1, "t") as incoming:
        incoming.begin(Source("a-link"))
        yield incoming


def packed(body: bytes, times: int) -> bytes:
    """Return a body that is compressed this many times."""
    for _ in range(times):
        body = gzip.compress(body)
    return body


@pytest.mark.parametrize("times", range(MAX_CODINGS + 1))
def test_given_a_body_that_is_packed_up_to_three_times_then_it_is_unpacked(incoming: Incoming, times: int) -> None:
    incoming.write(packed(PNG, times))

    media = check_content(incoming, OPTIONS, remote=True)

    assert media == Media("image/png", "png")
    assert b"".join(incoming.chunks()) == PNG


def test_given_a_body_that_is_packed_more_often_then_it_is_not_media(incoming: Incoming) -> None:
    incoming.write(packed(PNG, MAX_CODINGS + 1))

    result = check_content(incoming, OPTIONS, remote=True)

    assert isinstance(result, BadBody)
    assert result.code == "not_media"


def test_given_a_body_that_unpacks_to_more_than_the_limit_then_it_is_too_large_and_not_changed(
    incoming: Incoming,
) -> None:
    incoming.write(gzip.compress(PNG))

    exact = replace(OPTIONS, max_bytes=len(PNG))
    small = replace(OPTIONS, max_bytes=len(PNG) - 1)

    result = check_content(incoming, small, remote=True)
    assert isinstance(result, Unfit)
    assert result.code == "too_large"
    assert b"".join(incoming.chunks()) == gzip.compress(PNG)
    assert check_content(incoming, exact, remote=True) == Media("image/png", "png")


def test_given_a_picture_with_more_pixels_than_allowed_then_it_is_too_large(incoming: Incoming) -> None:
    incoming.write(png(8, 8))

    result = check_content(incoming, replace(OPTIONS, max_pixels=63), remote=True)

    assert isinstance(result, Unfit)
    assert "64 pixels" in result.message
    assert check_content(incoming, replace(OPTIONS, max_pixels=64), remote=True) == Media("image/png", "png")


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize(
    ("body", "code"),
    [(PNG[:-20], "truncated"), (base64.b64encode(PNG)[:-7], "truncated"), (HTML, "not_media"), (b"", "not_media")],
    ids=["picture", "base64", "a page", "empty"],
)
def test_given_an_incomplete_file_then_only_a_remote_store_may_have_the_rest_later(
    incoming: Incoming, body: bytes, code: str, remote: bool
) -> None:
    """The bytes of an answer never change."""
    incoming.write(body)

    result = check_content(incoming, OPTIONS, remote=remote)

    assert isinstance(result, BadBody)
    assert (result.code, result.early) == (code, remote)


def test_given_a_declared_coding_that_the_body_does_not_have_then_the_body_is_used_as_it_is(
    incoming: Incoming,
) -> None:
    """Text has no signature, so its declared coding is tried."""
    incoming.begin(Source("a-link", coding="gzip,deflate", text="text"))
    incoming.write(b"Hello.\n")

    assert check_content(incoming, OPTIONS, remote=True) == Media("text/plain", "txt")
    assert b"".join(incoming.chunks()) == b"Hello.\n"
