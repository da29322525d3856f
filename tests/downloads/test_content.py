"""Received files: they are unpacked, their media type is detected, and incomplete files are refused."""

import base64

import pytest

from tests.download_stand import PNG, Stand, assert_stored, png
from tests.downloads.bad_bodies import HTML
from tests.web import Web, page


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
