"""Text from a real server: stored if text is promised; web pages, errors and other bytes instead of it are refused."""

import base64
import gzip
import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert

from tests.download_stand import PNG, Stand, png
from tests.downloads.bad_bodies import HTML
from tests.rows import read_job, read_output
from tests.web import Answer, Picture, Web, head, page, sends
from worker.errors import StorageTrouble
from worker.storage.local import FileStorage, path_of
from worker.store.schema import bodies

TRANSCRIPT = "Grüße. And that was all.\n".encode()
CHAT = json.dumps({"choices": [{"message": {"role": "assistant", "content": "Hello."}}]}).encode()
CUES = b"1\r\n00:00:00,000 --> 00:00:02,500\r\nHello.\r\n"
CAPTIONS = b"WEBVTT\n\n00:00.000 --> 00:02.500\nHello.\n"
ERROR = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'


@pytest.mark.parametrize(
    ("path", "answer", "body", "media_type", "suffix"),
    [
        ("/a.txt", page(200, TRANSCRIPT), TRANSCRIPT, "text/plain", ".txt"),
        ("/a.txt", page(200, CHAT, Content_Type="binary/octet-stream"), CHAT, "text/plain", ".txt"),
        ("/a.json", page(200, CHAT, Content_Type="text/plain"), CHAT, "application/json", ".json"),
        ("/a.srt", page(200, CUES), CUES, "application/x-subrip", ".srt"),
        ("/a.vtt", page(200, CAPTIONS), CAPTIONS, "text/vtt", ".vtt"),
        ("/a", page(200, TRANSCRIPT, Content_Type="text/plain; charset=utf-8"), TRANSCRIPT, "text/plain", ".txt"),
        ("/a", page(200, CHAT, Content_Type="application/json"), CHAT, "application/json", ".json"),
        ("/a", page(200, CAPTIONS, Content_Type="text/vtt"), CAPTIONS, "text/vtt", ".vtt"),
        ("/a", page(200, CUES, Content_Type="application/x-subrip"), CUES, "application/x-subrip", ".srt"),
        ("/a.txt", page(200, gzip.compress(TRANSCRIPT), Content_Encoding="gzip"), TRANSCRIPT, "text/plain", ".txt"),
        ("/a.json.gz", page(200, gzip.compress(CHAT)), CHAT, "application/json", ".json"),
        ("/a.txt", sends(head(200), TRANSCRIPT[:4], TRANSCRIPT[4:]), TRANSCRIPT, "text/plain", ".txt"),
        ("/a.png", page(200, PNG, Content_Type="text/plain"), PNG, "image/png", ".png"),
        ("/a.txt", page(200, PNG, Content_Type="text/plain"), PNG, "image/png", ".png"),
        ("/a.txt", page(200, base64.b64encode(PNG), Content_Type="text/plain"), PNG, "image/png", ".png"),
    ],
)
def test_given_a_link_that_promises_text_when_it_returns_text_then_it_is_stored_unchanged(
    stand: Stand, web: Web, path: str, answer: Answer, body: bytes, media_type: str, suffix: str
) -> None:
    row = stand.download(web.serves(path, answer) + "?x=a.png&sig=1")

    assert (row.status, row.error_code, row.media_type, row.size_bytes) == ("stored", None, media_type, len(body))
    assert row.sha256 == hashlib.sha256(body).hexdigest()
    assert path_of(row.location).read_bytes() == body
    assert path_of(row.location).suffix == suffix
    assert read_job(stand.engine, row.job_id).status == "completed"


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/a.txt", page(200, HTML)),
        ("/a.txt", page(200, HTML, Content_Type="text/plain")),
        ("/a.json", page(200, HTML, Content_Type="application/json")),
        ("/a.srt", page(200, HTML)),
        ("/a.vtt", page(200, b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
        ("/a.txt", page(200, ERROR)),
        ("/a.json", page(200, b'{"statusCode": "404", "error": "not_found", "message": "Object not found"}')),
        ("/a.txt", page(200, b"")),
        ("/a.txt", page(200, gzip.compress(HTML), Content_Encoding="gzip")),
        ("/a.txt", page(200, b"Hello\0")),
        ("/a.json", page(200, TRANSCRIPT)),
        ("/a.vtt", page(200, TRANSCRIPT)),
        ("/a.srt", page(200, TRANSCRIPT)),
        ("/a", page(200, TRANSCRIPT)),
        ("/a", page(200, HTML, Content_Type="text/html")),
        ("/a", page(200, HTML, Content_Type="text/plain")),
        ("/a", page(200, b'{"error": "expired"}', Content_Type="application/json")),
        ("/a.png", page(200, TRANSCRIPT, Content_Type="text/plain")),
        ("/a.png", page(200, CHAT, Content_Type="application/json")),
        ("/a.wav", page(200, CAPTIONS, Content_Type="text/vtt")),
        ("/a.xml", page(200, TRANSCRIPT, Content_Type="text/plain")),
    ],
)
def test_given_another_body_than_the_promised_output_then_nothing_is_stored(
    stand: Stand, web: Web, path: str, answer: Answer
) -> None:
    row = stand.download(web.serves(path, answer))

    assert (row.status, row.error_code, stand.files) == ("pending", "not_media", [])
    assert row.error_message


def test_given_incomplete_text_then_it_is_truncated(stand: Stand, web: Web) -> None:
    cut = stand.download(web.serves("/a.json", sends(head(200), CHAT[:-3])))
    short = stand.download(web.serves("/b.txt", sends(head(200, Content_Length=str(len(TRANSCRIPT))), TRANSCRIPT[:9])))

    assert [row.error_code for row in (cut, short)] == ["truncated", "truncated"]
    assert stand.files == []


def test_given_a_broken_transfer_of_text_when_it_is_resumed_then_it_is_still_text(stand: Stand, web: Web) -> None:
    text = TRANSCRIPT * 500
    headers = {"ETag": '"v1"', "Content-Type": "text/plain"}

    row = stand.download(web.serves("/a", Picture(web, text, cuts=[5_000, 3_000], headers=headers)))

    assert (row.status, row.media_type, row.size_bytes) == ("stored", "text/plain", len(text))
    assert len(web.requests) == 3


def test_given_a_redirect_to_a_name_without_an_extension_then_the_link_still_promises_text(
    stand: Stand, web: Web
) -> None:
    web.serves("/store/17", page(200, TRANSCRIPT, Content_Type="application/octet-stream"))

    row = stand.download(web.serves("/a.txt", page(302, b"", Location="/store/17")))

    assert (row.status, row.media_type) == ("stored", "text/plain")


def test_given_a_storage_that_fails_once_when_text_is_tried_again_then_it_is_not_downloaded_again(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise StorageTrouble("the disk is full")

    output_id = stand.add(web.serves("/a", page(200, TRANSCRIPT, Content_Type="text/plain", ETag='"v1"')))
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "keep", refuse)
        stand.downloader().run(output_id)
    refused = read_output(stand.engine, output_id)
    with stand.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE fetch_outputs SET due_at = listed_at WHERE id = ?", (output_id,))
    stand.downloader().run(output_id)

    row = read_output(stand.engine, output_id)
    assert refused.error_code == "storage"
    assert (row.status, row.media_type, len(web.requests)) == ("stored", "text/plain", 1)


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [("text/plain", TRANSCRIPT, None), ("application/json", CHAT, None), ("text/html", TRANSCRIPT, "not_media")],
)
def test_given_text_in_the_answer_then_its_declared_type_decides(
    stand: Stand, kind: str, body: bytes, code: str | None
) -> None:
    now = datetime.now(UTC) - timedelta(minutes=5)
    output_id = stand.add(f"data:{kind};sha256=00", listed_at=now, due_at=now)
    with stand.engine.begin() as connection:
        connection.execute(insert(bodies).values(output_id=output_id, body=body))

    stand.downloader().run(output_id)

    row = read_output(stand.engine, output_id)
    assert row.error_code == code
    assert row.media_type == (kind if code is None else None)


def test_given_an_upscaled_picture_of_133_million_pixels_then_it_is_stored(stand: Stand, web: Web) -> None:
    row = stand.download(web.serves("/a.png", page(200, png(16_384, 8_128))))

    assert row.status == "stored"
