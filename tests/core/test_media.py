"""Media by its first bytes, whole or not by its last, and its size in pixels by its header."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.media import HEAD_BYTES, TAIL_BYTES, Media, pixels, sniff, whole


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int = 2, height: int = 3) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels_in_rows = zlib.compress((b"\0" + b"\x10" * 6) * 3)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels_in_rows) + chunk(b"IEND", b"")


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(width: int = 640, height: int = 480, *, thumbnail: bytes = b"", frame: int = 0xC0) -> bytes:
    size = struct.pack(">BHH", 8, height, width) + b"\x03" + bytes(9)
    scan = segment(0xDA, bytes(10)) + b"\x12\xff\x00\x34" * 50
    return b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + thumbnail) + segment(frame, size) + scan + b"\xff\xd9"


def riff(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + kind + body


def webp(kind: bytes, header: bytes) -> bytes:
    return riff(b"WEBP", kind + struct.pack("<I", len(header)) + header + bytes(40))


GIF = b"GIF89a" + struct.pack("<HH", 5, 7) + b"\0\0\0," + bytes(9) + b"\x02\x02\x44\x01\x00;"
WAV = riff(b"WAVE", b"fmt " + bytes(40))
GLB = b"glTF" + struct.pack("<II", 2, 40) + bytes(28)
ZIP = b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + bytes(18)
PNG, JPEG = png(), jpeg()
WEBP = webp(b"VP8X", bytes(4) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little"))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PNG, "image/png png"),
        (JPEG, "image/jpeg jpg"),
        (b"\xff\xd8\xff\xdb" + bytes(9), "image/jpeg jpg"),
        (GIF, "image/gif gif"),
        (b"GIF87a" + bytes(9), "image/gif gif"),
        (WEBP, "image/webp webp"),
        (WAV, "audio/wav wav"),
        (riff(b"AVI ", bytes(9)), "video/x-msvideo avi"),
        (b"\x1aE\xdf\xa3" + bytes(9), "video/webm webm"),
        (b"\0\0\0\x20ftypisom" + bytes(9), "video/mp4 mp4"),
        (b"\0\0\0\x20ftypmp42" + bytes(9), "video/mp4 mp4"),
        (b"\0\0\0\x20ftypavif" + bytes(9), "image/avif avif"),
        (b"\0\0\0\x20ftypqt  " + bytes(9), "video/quicktime mov"),
        (b"\0\0\0\x20ftypM4A " + bytes(9), "audio/mp4 m4a"),
        (b"ID3\x04" + bytes(9), "audio/mpeg mp3"),
        (b"\xff\xfb\x90\x00", "audio/mpeg mp3"),
        (b"fLaC" + bytes(9), "audio/flac flac"),
        (b"OggS" + bytes(9), "audio/ogg ogg"),
        (GLB, "model/gltf-binary glb"),
        (ZIP, "application/zip zip"),
        # what begins as media is that media, whatever follows: it is never served as what it also may be
        (GIF + b"<script>alert(1)</script>", "image/gif gif"),
        (PNG + b"<html>", "image/png png"),
    ],
)
def test_media_is_known_by_its_signature(body: bytes, kind: str) -> None:
    found = sniff(body[:HEAD_BYTES])

    assert found is not None
    assert f"{found.type} {found.extension}" == kind


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x89",
        b"\x89PNG",
        b"\x89PNG\n\x1a\n",  # newlines changed on the way
        b"GIF",
        b"GIF90a",
        b"\xff\xd8",
        b"\xff",
        b"\xff\xfb",
        b"\xff\xff\xff\xff",
        b"RIFF",
        b"RIFF\0\0\0\0WEB",
        b"RIFF\0\0\0\0XXXX",
        b"<!doctype html><title>404</title>",
        b"\n\n  <html>",
        b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"\xef\xbb\xbf<svg/>",
        b'{"status": "processing"}',
        b"#!/bin/sh\n",
        b"\x7fELF",
        b"MZ\x90\x00",
        b"%PDF-1.7",
        b"\x1f\x8b\x08\x00",
        b"<html>" + PNG,
        b" " + PNG,
        bytes(512),
    ],
)
def test_what_begins_like_no_media_is_none(body: bytes) -> None:
    assert sniff(body) is None


WHOLE = {"png": PNG, "jpeg": JPEG, "gif": GIF, "webp": WEBP, "wav": WAV, "glb": GLB, "zip": ZIP}


def judged(body: bytes) -> bool:
    media = sniff(body[:HEAD_BYTES])
    assert media is not None
    return whole(media, body[:HEAD_BYTES], body[-TAIL_BYTES:], len(body))


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in WHOLE.items()])
def test_a_whole_file_is_whole_and_a_shorter_one_is_not(body: bytes) -> None:
    assert judged(body)
    for size in range(12, len(body) - (18 if body is ZIP else 0)):
        assert not judged(body[:size]), size


@pytest.mark.parametrize("body", [PNG + bytes(100), JPEG + b"trailer", GIF + b"\0", WAV + b"LIST", GLB + b"\0"])
def test_something_after_the_end_does_no_harm(body: bytes) -> None:
    assert judged(body)


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_photo() -> None:
    """Cameras and editors put a whole small JPEG into the header of the large one."""
    photo = jpeg(thumbnail=JPEG)

    assert judged(photo)
    assert not judged(photo[:-2])
    assert not judged(photo[: len(JPEG) + 20])


def test_a_large_file_is_judged_by_its_tail() -> None:
    header, end = PNG[:-12], PNG[-12:]

    assert judged(header + bytes(3 * TAIL_BYTES) + end)
    assert not judged(header + bytes(3 * TAIL_BYTES))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_streamed_recording_that_knows_no_length_counts_as_whole(size: int) -> None:
    body = b"RIFF" + struct.pack("<I", size) + WAV[8:]

    assert judged(body)


@pytest.mark.parametrize("body", [b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypisom", b"OggS", b"ID3"])
def test_formats_without_an_end_mark_count_as_whole(body: bytes) -> None:
    assert judged(body)


@pytest.mark.parametrize(
    ("body", "area"),
    [
        (PNG, 6),
        (png(30_000, 30_000), 900_000_000),
        (png(2**32 - 1, 2**32 - 1), (2**32 - 1) ** 2),
        (GIF, 35),
        (JPEG, 640 * 480),
        (jpeg(65_535, 65_535, frame=0xC2), 65_535**2),
        (jpeg(thumbnail=jpeg(9, 9)), 640 * 480),
        (jpeg(thumbnail=bytes(60_000)), 640 * 480),
        (WEBP, 640 * 480),
        (webp(b"VP8L", b"\x2f" + (99 | 49 << 14).to_bytes(4, "little")), 100 * 50),
        (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 320, 200)), 320 * 200),
        (webp(b"ALPH", bytes(20)), None),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", None),
        (b"\xff\xd8\xff\xff\xff\xff", None),
        (b"\xff\xd8\xff" + bytes(600), None),
        (PNG[:20], None),
        (b"GIF89a", None),
        (b"RIFF\0\0\0\0WEBP", None),
        (WAV, None),
        (GLB, None),
    ],
)
def test_the_header_tells_the_pixels(body: bytes, area: int | None) -> None:
    media = sniff(body[:HEAD_BYTES])

    assert media is not None
    assert pixels(media, body[:HEAD_BYTES]) == area


KINDS = st.sampled_from([PNG, JPEG, GIF, WEBP, WAV, GLB, ZIP, b"\0\0\0\x20ftypisom", b"ID3"])


@given(KINDS, st.integers(0, 200), st.binary(max_size=80))
def test_any_bytes_are_judged_without_an_error(start: bytes, cut: int, rest: bytes) -> None:
    body = start[:cut] + rest

    media = sniff(body)

    if media is not None:
        assert isinstance(media, Media)
        assert whole(media, body, body, len(body)) in (True, False)
        area = pixels(media, body)
        assert area is None or area >= 0
