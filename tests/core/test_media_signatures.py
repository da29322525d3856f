"""Media types, complete and truncated files, pixel counts, and media as base64 text."""

import base64
import io
import json
import re
import struct
import time
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.core.media.base64_text import Base64Decoder, base64_start
from worker.core.media.signatures import (
    HEAD_BYTES,
    TAIL_BYTES,
    Media,
    is_complete,
    pixel_count,
    sniff,
)


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


def gif(width: int = 5, height: int = 7, *, picture: tuple[int, int] = (5, 7), colours: bool = False) -> bytes:
    table = b"\x80\0\0" + bytes(6) if colours else b"\0\0\0"
    comment = b"!\xfe\x05hello\0"
    return (
        b"GIF89a" + struct.pack("<HH", width, height) + table + comment
        + b"," + bytes(4) + struct.pack("<HH", *picture) + b"\0" + b"\x02\x02\x44\x01\x00;"
    )  # fmt: skip


def riff(kind: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + kind + body


def webp(kind: bytes, header: bytes) -> bytes:
    return riff(b"WEBP", kind + struct.pack("<I", len(header)) + header + bytes(40))


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    return box(b"ftyp", brand + bytes(4) + b"".join(compatible))


def heif(brand: bytes, *sizes: tuple[int, int]) -> bytes:
    ispe = b"".join(box(b"ispe", bytes(4) + struct.pack(">II", *size)) for size in sizes)
    return ftyp(brand, b"mif1") + box(b"meta", bytes(4) + box(b"iprp", box(b"ipco", ispe))) + box(b"mdat", bytes(50))


def ebml(doctype: bytes, *, unknown: bool = False) -> bytes:
    header = b"\x42\x82" + bytes([0x80 | len(doctype)]) + doctype
    length = b"\x01" + b"\xff" * 7 if unknown else b"\x40\x64"
    return b"\x1aE\xdf\xa3" + bytes([0x80 | len(header)]) + header + b"\x18\x53\x80\x67" + length + bytes(100)


def ogg(*pages: int) -> bytes:
    return b"".join(b"OggS\0" + bytes(21) + bytes([2, size, 5]) + b"x" * (size + 5) for size in pages)


def mp3(*, tag: bytes = b"", info: bool = True) -> bytes:
    header = b"Info" + struct.pack(">III", 3, 1, 417) if info else b""
    return tag + (b"\xff\xfb\x90\x00" + bytes(32) + header).ljust(417, b"\0")


def id3(length: int) -> bytes:
    return b"ID3\x04\0\0" + bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(length)


def zipped(name: str = "a.obj", body: bytes = b"v 0 0 0\n" * 20, comment: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, body)
        archive.comment = comment
    return file.getvalue()


def stl(count: int, normal: tuple[float, float, float] = (0, 0, 1), header: bytes = b"") -> bytes:
    triangle = struct.pack("<12fH", *normal, 0, 0, 0, 1, 0, 0, 1.2e-16, 1, 0, 0)
    return header.ljust(80, b"\0") + struct.pack("<I", count) + triangle * count


def ply(form: str = "binary_little_endian", *, ends: str = "\n") -> bytes:
    lines = ["ply", f"format {form} 1.0", "comment made by hand", "element vertex 3", "property float x"]
    lines += ["property float y", "property float z", "element face 1", "property list uchar int vertex_indices"]
    header = ends.join([*lines, "end_header", ""]).encode()
    if form == "ascii":
        return header + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    return header + struct.pack("<9f", 0, 0, 0, 1, 0, 0, 0, 1, 0) + struct.pack("<B3i", 3, 0, 1, 2)


GIF = gif()
WAV = riff(b"WAVE", b"fmt " + bytes(40))
GLB = b"glTF" + struct.pack("<II", 2, 40) + bytes(28)
ZIP = zipped()
PNG, JPEG = png(), jpeg()
WEBP = webp(b"VP8X", bytes(4) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little"))
AVIF = heif(b"avif", (320, 200))
MP4 = ftyp(b"isom", b"mp42") + box(b"moov", bytes(60)) + box(b"mdat", bytes(200))
WEBM = ebml(b"webm")
OGG = ogg(200, 30)
FLAC = b"fLaC" + b"\0\0\0\x22" + bytes(34) + b"\x84\0\0\x08" + bytes(8) + b"\xff\xf8" + bytes(30)
MP3 = mp3(tag=id3(300))
OBJ = b"""# made by hand
mtllib material.mtl
o Caf\xc3\xa9 #1

v 0.1 -2 3e-5
v 1 0 0 0.5 0.5 0.5\r
v .5 1. +0
vt 0 1
vn 0 0 1
vn nan nan nan
usemtl red
s off
f 1/1/1 2//1 3
f 1 \\
 2 3
"""
PLY, STL = ply(), stl(3)
STL_TEXT = b"""solid box
 facet normal 0 0 1.0e0
  outer loop
   vertex 0 0 0
   vertex 1 0 0
   vertex 0 1 0
  endloop
 endfacet
endsolid box
"""


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PNG, "image/png png"),
        (JPEG, "image/jpeg jpg"),
        (b"\xff\xd8\xff\xdb" + bytes(9), "image/jpeg jpg"),
        (GIF, "image/gif gif"),
        (gif(colours=True), "image/gif gif"),
        (GIF.replace(b"GIF89a", b"GIF87a"), "image/gif gif"),
        (WEBP, "image/webp webp"),
        (base64.b64decode("UklGRhIAAABXRUJQVlA4TAYAAAAvQWxvAGs="), "image/webp webp"),
        (AVIF, "image/avif avif"),
        (ftyp(b"avis"), "image/avif avif"),
        (ftyp(b"mif1", b"mif1", b"avif"), "image/avif avif"),
        (ftyp(b"mif1", b"mif1", b"heic"), "image/heic heic"),
        (ftyp(b"heic", b"mif1"), "image/heic heic"),
        (WAV, "audio/wav wav"),
        (riff(b"AVI ", bytes(9)), "video/x-msvideo avi"),
        (WEBM, "video/webm webm"),
        (ebml(b"matroska"), "video/x-matroska mkv"),
        (MP4, "video/mp4 mp4"),
        (b"\0\0\0\x20ftypmp42" + bytes(9), "video/mp4 mp4"),
        (b"\0\0\0\x20ftypqt  " + bytes(9), "video/quicktime mov"),
        (b"\0\0\0\x20ftypM4A " + bytes(9), "audio/mp4 m4a"),
        (MP3, "audio/mpeg mp3"),
        (mp3(), "audio/mpeg mp3"),
        (b"\xff\xfb\x90\x00", "audio/mpeg mp3"),
        (FLAC, "audio/flac flac"),
        (OGG, "audio/ogg ogg"),
        (GLB, "model/gltf-binary glb"),
        (OBJ, "model/obj obj"),
        (b"v 1 2 3\nf 1 1 1", "model/obj obj"),
        (PLY, "model/ply ply"),
        (ply("ascii"), "model/ply ply"),
        (ply("binary_big_endian", ends="\r\n"), "model/ply ply"),
        (STL, "model/stl stl"),
        (stl(1, header=b"solid made by a program"), "model/stl stl"),
        (stl(2, normal=(0, 0, 0)), "model/stl stl"),
        (STL_TEXT, "model/stl stl"),
        (ZIP, "application/zip zip"),
        # what is media at its beginning is that media, whatever follows: it is never served as what it also may be
        (GIF + b"<script>alert(1)</script>", "image/gif gif"),
        (PNG + b"<html>", "image/png png"),
    ],
)
def test_media_types_are_detected_by_their_signature(body: bytes, kind: str) -> None:
    media = sniff(body[:HEAD_BYTES])

    assert media is not None
    assert f"{media.type} {media.extension}" == kind


HTML = b"<!doctype html><title>404</title>"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n\t",
        b"\xef\xbb\xbf",
        HTML,
        b"\xef\xbb\xbf" + HTML,
        b"\n\n  <html>",
        b"<!-- a comment --><html>",
        b"# <html><body>\nv 1 2 3\n",
        b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        b"\xef\xbb\xbf<?xml version='1.0'?><Error/>",
        b"<Error><Code>AccessDenied</Code></Error>",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        b"\xef\xbb\xbf<svg/>",
        b"<!-- Generator --><svg></svg>",
        b'{"status": "processing"}',
        b'{"asset": {"version": "2.0"}}',
        b"[]",
        b"Rate limit exceeded",
        b"https://h/a.png\n",
        b"var a = 1;\n",
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
def test_pages_errors_and_empty_bodies_are_not_media(body: bytes) -> None:
    assert sniff(body) is None


@pytest.mark.parametrize(
    "body",
    [
        b"\x89",
        b"\x89PNG",
        b"\x89PNG\r\n\x1a\n",
        PNG[:23],
        b"\x89PNG\n\x1a\n" + PNG[8:],  # newlines changed on the way
        PNG[:8] + HTML + bytes(40),
        PNG[:8] + chunk(b"tEXt", b"<script>alert(1)</script>") + PNG[8:],
        PNG[:8] + chunk(b"IHDR", bytes(25)) + PNG[33:],
        png(0, 3),
        png(2, 0),
        b"GIF",
        GIF[:12],
        b"GIF90a" + GIF[6:],
        gif(0, 7),
        gif(5, 0),
        b"GIF89a" + bytes(100),
        b"GIF89a/*\0\0" + HTML + b"*/=1;alert(1)",
        b"GIF89a=1;alert(1)//" + bytes(40),
        b"GIF89a<script>alert(1)</script>",
        b"GIF89a" + struct.pack("<HH", 5, 7) + b"\0\0\0;",  # without a picture
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff" + HTML,
        b"\xff\xd8\xff" + bytes(600),
        jpeg(0, 480),
        jpeg(640, 0),
        b"RIFF",
        b"RIFF\0\0\0\0WEB",
        b"RIFF\0\0\0\0XXXX",
        b"RIFF\0\0\0\0WEBP",
        b"RIFF/*\0\0WEBP" + HTML,
        webp(b"ALPH", bytes(20)),
        webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 0, 200)),
        webp(b"VP8 ", bytes(20)),
        webp(b"VP8L", bytes(20)),
        heif(b"avif", (0, 0)),
        b"abc ftypisom" + bytes(40),
        b"\xff",
        b"\xff\xfb",
        b"\xff\xfb\xf0\x00",  # no such bit rate
        b"\xff\xfb\x9c\x00",  # no such sampling rate
        b"\xff\xff\xff\xff",
        b"ID3",
        b"ID3 is the name of a tag",
        b"fLaC is the name of a format",
        b"OggS is how a page begins",
        b"glTF is the name of a format",
        b"glTF" + struct.pack("<II", 9, 40) + bytes(28),
    ],
)
def test_a_signature_alone_is_not_media(body: bytes) -> None:
    assert sniff(body) is None


@pytest.mark.parametrize(
    "body",
    [
        b"v 1 2\nf 1 1 1\n",
        b"v 1 2 x\n",
        b"v 1 2 3 4 5 6 7 8 9\n",
        b"v nan nan nan\n",
        b"# nothing but a comment\n",
        b"o name\ng group\n",  # no vertex
        b"v 1 2 3",  # the line may go on
        b"v 1 2 3\nvn 1 2\n",
        b"v 1 2 3\nf 1 2\n",
        b"v 1 2 3\nf a b c\n",
        b"v 1 2 3\nand some words\n",
        b"v 1 2 3\n<script>alert(1)</script>\n",
        b"v 1 2 3\n# <?php\n",
        b"v 1 2 3\n\0\n",
        b"v 1 2 3\n\x1b[2J\n",
        b"v 1 2 3\no \xff\xfe\n",
        b"\xef\xbb\xbfv 1 2 3\n",
        b"#!/bin/sh\nv 1 2 3\n",
        b"# Title\n\nv 1 2 3\n\nA page in Markdown.\n",
        b"/*\nv 1 2 3\n*/\n",
        b"newmtl red\nKd 1 0 0\n",
        b"csh rm -rf /\nv 1 2 3\n",
        b"v 1 2 " + b"1" * 60_000 + b"x\n",
        b"ply\n",
        b"ply\nformat ascii 1.0\n",
        b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nend_header",
        b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n",
        b"ply\nelement vertex 3\nproperty float x\nend_header\n0\n",
        b"ply\nformat ascii 1.0\nelement vertex 3\nproperty colour x\nend_header\n",
        b"ply\n<script>alert(1)</script>\nend_header\n",
        b"ply\nformat ascii 1.0\nelement vertex " + b"9" * 5_000 + b"\nproperty float x\nend_header\n",
        b"solid state\n",
        b"solid box\nendsolid box\n",
        b"solid <script>" + STL_TEXT[9:],
        stl(0),
        stl(3)[:100],
        stl(3, normal=(0, 0, 2)),
        stl(3, header=b"<html>"),
        stl(3, header=b"\x01\x02"),
        bytes(80) + b"\1\0\0\0" + bytes(50),
        HTML.ljust(80) + b"a page of some length " * 40,
    ],
)
def test_text_and_bytes_similar_to_a_model_are_not_media(body: bytes) -> None:
    assert sniff(body) is None


def test_a_text_model_is_detected_by_its_head() -> None:
    """The head may end within a line, a number or a character."""
    body = OBJ + b"o \xc3\xa9\nv 0.25 0.5 0.75\nf 1 2 3\n" * 10_000

    for size in range(HEAD_BYTES - 40, HEAD_BYTES):
        assert sniff(body[:size]) == Media("model/obj", "obj")


WHOLE = {
    "png": PNG,
    "jpeg": JPEG,
    "gif": GIF,
    "gif with colours": gif(colours=True),
    "webp": WEBP,
    "avif": AVIF,
    "wav": WAV,
    "flac": FLAC[:-31],
    "mp4": MP4,
    "mp4 with its index last": ftyp(b"isom") + box(b"mdat", bytes(200)) + box(b"moov", bytes(60)),
    "glb": GLB,
    "ply": PLY,
    "ply as text": ply("ascii").rstrip(),
    "stl": STL,
    "stl as text": STL_TEXT[: -len(" box\n")],
    "zip": ZIP,
    "zip with a comment": zipped(comment=b"made by hand"),
    "zip in a zip": zipped("b.zip", zipped()),
}


def sniffed(body: bytes) -> bool:
    """Return whether the bytes are media and complete."""
    media = sniff(body[:HEAD_BYTES])
    return media is not None and is_complete(media, body[:HEAD_BYTES], body[-TAIL_BYTES:], len(body))


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in WHOLE.items()])
def test_complete_and_truncated_files_are_told_apart(body: bytes) -> None:
    assert sniffed(body)
    for size in range(len(body)):
        assert not sniffed(body[:size]), size


@pytest.mark.parametrize(
    "body",
    [
        PNG + bytes(100),
        JPEG + b"trailer",
        GIF + b"\0",
        GIF + HTML,
        WAV + b"LIST",
        GLB + b"\0",
        STL + b"\0",
        PLY + b"\n",
        MP4 + b"\0",
        MP4 + b"a trailer",
        MP3 + b"TAG" + bytes(125),
        ZIP + b"\0",
        WEBM + b"\0",
        OBJ + b"\n",
    ],
)
def test_data_after_the_end_is_accepted(body: bytes) -> None:
    assert sniffed(body)


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_photo() -> None:
    """Cameras and editors store a complete small JPEG in the header of the large one."""
    photo = jpeg(thumbnail=JPEG)

    assert sniffed(photo)
    assert not sniffed(photo[:-2])
    assert not sniffed(photo[: len(JPEG) + 20])


LARGE = bytes(3 * TAIL_BYTES)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        pytest.param(PNG[:-12], PNG[-12:], id="png"),
        pytest.param(JPEG[:-2] + b"x", b"x\xff\xd9", id="jpeg"),
        pytest.param(GIF[:-5] + b"\xff\x01" * 9, b"\0;", id="gif"),
        pytest.param(ogg(9) + b"OggS\0", ogg(9), id="ogg"),
        pytest.param(
            ftyp(b"isom") + struct.pack(">I4s", len(LARGE) + 8, b"mdat"), box(b"moov", bytes(60)), id="mp4, index last"
        ),
        pytest.param(
            ftyp(b"isom") + struct.pack(">I4sQ", 1, b"mdat", len(LARGE) + 16), box(b"moov"), id="mp4, 64-bit length"
        ),
        pytest.param(
            ftyp(b"isom") + box(b"moov") + struct.pack(">I4s", len(LARGE) + 9, b"mdat"), b"x", id="mp4, index first"
        ),
    ],
)
def test_large_files_are_checked_by_head_and_tail(start: bytes, end: bytes) -> None:
    filling = LARGE if not start.endswith(b"OggS\0") else bytes(21) + b"\1\1x" + LARGE

    assert sniffed(start + filling + end)
    assert not sniffed(start + filling + end[:-1])


@pytest.mark.parametrize(
    "body",
    [
        ftyp(b"isom"),
        ftyp(b"isom") + box(b"mdat", bytes(200)),
        ftyp(b"isom") + box(b"moov", bytes(60)),
        AVIF[: -len(box(b"mdat", bytes(50)))],
        MP4[:-1],
    ],
)
def test_a_video_or_avif_without_index_or_data_is_truncated(body: bytes) -> None:
    assert sniff(body) is not None
    assert not sniffed(body)


@pytest.mark.parametrize(
    "body",
    [
        ftyp(b"isom") + box(b"moov") + struct.pack(">I4s", 0, b"mdat") + bytes(90),  # as long as the file
        ftyp(b"isom") + struct.pack(">I4s", 90_000, b"mdat") + bytes(300_000),  # the next header is out of view
        ftyp(b"isom") + b"unknown boxes",
        ftyp(b"isom") + struct.pack(">I4s", 3, b"free") + bytes(9),
    ],
)
def test_unknown_boxes_count_as_complete(body: bytes) -> None:
    assert sniffed(body)


@pytest.mark.parametrize("body", [WEBM, ebml(b"matroska")])
def test_a_recording_shorter_than_its_length_is_truncated(body: bytes) -> None:
    assert sniffed(body)
    assert not sniffed(body[:-1])


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_streamed_recording_without_length_counts_as_complete(size: int) -> None:
    assert sniffed(b"RIFF" + struct.pack("<I", size) + WAV[8:])
    assert sniffed(ebml(b"webm", unknown=True))


def test_an_ogg_file_must_end_with_a_complete_page() -> None:
    assert sniffed(OGG)
    assert sniffed(ogg(200))
    assert not sniffed(OGG[:-1])
    assert not sniffed(OGG[: len(ogg(200)) + 10])


def test_an_mp3_has_the_size_in_its_first_frame() -> None:
    assert sniffed(MP3)
    assert sniffed(mp3())
    assert not sniffed(MP3[:-1])
    assert not sniffed(mp3()[:-1])
    assert not sniffed(MP3[:380])


def test_an_mp3_without_a_size_needs_data_after_its_tag() -> None:
    assert sniffed(mp3(info=False)[:300])
    assert sniffed(mp3(tag=id3(300), info=False)[:400])
    assert not sniffed(id3(300))
    assert not sniffed(id3(300)[:100])


def test_a_text_model_must_not_end_within_a_statement() -> None:
    assert sniffed(OBJ.rstrip())
    assert sniffed(OBJ + b"f 1 2 3")
    assert sniffed(OBJ + b"# done")
    assert not sniffed(OBJ + b"f 1 2")
    assert not sniffed(OBJ + b"v 0.5 -")
    assert not sniffed(OBJ + b"usem")


@pytest.mark.parametrize("body", [b"\x1aE\xdf\xa3", b"\xff\xfb\x90\x00" + bytes(9)])
def test_formats_without_an_end_count_as_complete(body: bytes) -> None:
    assert sniffed(body)


@pytest.mark.parametrize(
    ("body", "area"),
    [
        (PNG, 6),
        (png(30_000, 30_000), 900_000_000),
        (png(2**32 - 1, 2**32 - 1), (2**32 - 1) ** 2),
        (GIF, 35),
        (gif(5, 7, picture=(60_000, 50_000)), 60_000 * 50_000),
        (gif(65_535, 65_535, colours=True), 65_535**2),
        (JPEG, 640 * 480),
        (jpeg(65_535, 65_535, frame=0xC2), 65_535**2),
        (jpeg(thumbnail=jpeg(9, 9)), 640 * 480),
        (jpeg(thumbnail=bytes(60_000)), 640 * 480),
        (WEBP, 640 * 480),
        (webp(b"VP8L", b"\x2f" + (99 | 49 << 14).to_bytes(4, "little")), 100 * 50),
        (webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 320, 200)), 320 * 200),
        (AVIF, 320 * 200),
        (heif(b"heic", (512, 512), (40_000, 30_000), (160, 120)), 40_000 * 30_000),
        (ftyp(b"avif"), None),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", None),
        (b"\xff\xd8\xff\xff\xff\xff", None),
        (WAV, None),
        (GLB, None),
        (MP4, None),
    ],
)
def test_pixels_are_read_from_the_header(body: bytes, area: int | None) -> None:
    media = sniff(body[:HEAD_BYTES])

    assert media is not None
    assert pixel_count(media, body[:HEAD_BYTES]) == area


def decoded(text: bytes, step: int = 7) -> bytes:
    decoder = Base64Decoder()
    return b"".join(decoder.feed(text[at : at + step]) for at in range(0, len(text), step)) + decoder.finish()


DIGITS = base64.b64encode(PNG)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (DIGITS, 0),
        (DIGITS + b"\n", 0),
        (b"\r\n  " + DIGITS, 4),
        (b"\xef\xbb\xbf" + DIGITS, 3),
        (base64.encodebytes(PNG), 0),
        (base64.encodebytes(PNG).replace(b"\n", b"\r\n"), 0),
        (base64.urlsafe_b64encode(PNG), 0),
        (DIGITS.rstrip(b"="), 0),
        (b'"' + DIGITS + b'"\n', 1),
        (b"'" + DIGITS + b"'", 1),
        (b"b'" + DIGITS + b"'", 2),
        (b"data:image/png;base64," + DIGITS, 22),
        (b"data:image/png;charset=utf-8;base64,\n" + DIGITS, 37),
        (b'"DATA:IMAGE/PNG;BASE64,' + DIGITS + b'"', 23),
        (b"data:;base64," + base64.b64encode(JPEG), 13),
        (base64.b64encode(GLB), 0),
        (base64.b64encode(OBJ), 0),
    ],
)
def test_base64_media_is_detected_and_decoded(text: bytes, start: int) -> None:
    assert base64_start(text) == start
    body = decoded(text[start:])
    assert body in (PNG, JPEG, GLB, OBJ)
    assert all(decoded(text[start:], step) == body for step in (1, 2, 3, 4, 5, 64, 10_000))


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in WHOLE.items()])
def test_all_media_types_are_detected_in_base64(body: bytes) -> None:
    text = base64.b64encode(body)

    assert sniff(text) is None
    assert base64_start(text) == 0
    assert decoded(text) == body


def test_the_head_of_a_long_base64_text_is_enough() -> None:
    text = b"data:image/png;base64," + base64.encodebytes(PNG[:-12] + LARGE + PNG[-12:])

    assert base64_start(text[:HEAD_BYTES]) == 22


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"iVBORw0KGgo=",  # a signature without a picture
        b"data:",
        b"data:image/png;base64,",
        b"data:image/png," + DIGITS,
        b"data:<script>;base64," + DIGITS,
        b"data:image/svg+xml;base64," + base64.b64encode(b"<svg/>"),
        base64.b64encode(HTML),
        base64.b64encode(b"<svg onload='alert(1)'/>"),
        base64.b64encode(b'{"status": "processing"}'),
        base64.b64encode(DIGITS),
        b"Not found",
        b"processing",
        HTML,
        b'{"image": "' + DIGITS + b'"}',
        b"<html>" + DIGITS,
        DIGITS + b"<script>alert(1)</script>",
        DIGITS + b"\0",
        PNG,
        OBJ,
    ],
)
def test_other_texts_are_not_base64_media(text: bytes) -> None:
    assert base64_start(text) is None


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (b"", b""),
        (b" \r\n", b""),
        (b"QUJD", b"ABC"),
        (b"QUI=", b"AB"),
        (b"QUI", b"AB"),
        (b"QQ==", b"A"),
        (b"QQ=", b"A"),
        (b"QQ", b"A"),
        (b"Q\nQ\r\n=\t= \n", b"A"),
        (b'QQ=="\n', b"A"),
        (b"QQ'", b"A"),
        (b"-_-_", b"\xfb\xff\xbf"),
        (b"+/-_", b"\xfb\xff\xbf"),
    ],
)
def test_base64_is_decoded_in_chunks(text: bytes, body: bytes) -> None:
    assert all(decoded(text, step) == body for step in (1, 2, 3, 4, 5, 100))


@pytest.mark.parametrize(
    "text",
    [
        b"Q",
        b"QUJDR",
        b"=",
        b"QUJD=",
        b"QUI==",
        b"QQ===",
        b"QQ==QQ==",
        b"QUI=Q",
        b'QQ"QQ',
        b'QQ"=',
        b'QQ""',
        b"QQ==;",
        b"QU,I",
        b"QU\0I",
        b"\xff\xfe",
        b"QQ%3D",
        b'"QQ==',
    ],
)
def test_invalid_base64_is_refused(text: bytes) -> None:
    for step in (1, 2, 3, 100):
        with pytest.raises(ValueError, match="base64"):
            decoded(text, step)


@given(st.binary(max_size=300), st.integers(1, 50), st.booleans(), st.booleans())
def test_base64_round_trips(body: bytes, step: int, safe: bool, padded: bool) -> None:
    text = base64.urlsafe_b64encode(body) if safe else base64.encodebytes(body)

    assert decoded(text if padded else text.replace(b"=", b""), step) == body


@given(st.text("QUJD+-=_\"' \n<", max_size=12).map(str.encode), st.integers(1, 5))
def test_chunk_sizes_make_no_difference(text: bytes, step: int) -> None:
    def outcome(size: int) -> bytes | None:
        try:
            return decoded(text, size)
        except ValueError:
            return None

    assert outcome(step) == outcome(100)


def test_a_decoder_needs_little_memory() -> None:
    decoder = Base64Decoder()

    total = sum(len(decoder.feed(b"QUJD\n" * 20_000 + b"Q")) for _ in range(8))

    assert total == 8 * 60_000 + 6
    assert decoder.finish() == b""


STARTS = [*WHOLE.values(), OBJ, OGG, WEBM, heif(b"heic", (5, 5)), DIGITS, b"data:image/png;base64," + DIGITS]
KINDS = sorted({media for body in STARTS if (media := sniff(body)) is not None}, key=lambda media: media.type)


def call_every_check(head: bytes, tail: bytes, size: int) -> None:
    start = base64_start(head)
    assert start is None or 0 <= start < len(head)
    media = sniff(head)
    assert media is None or isinstance(media, Media)
    area = None if media is None else pixel_count(media, head)
    assert area is None or area > 0
    for kind in KINDS:
        assert is_complete(kind, head, tail, size) in (True, False)
        area = pixel_count(kind, head)
        assert area is None or area >= 0


@given(st.sampled_from(STARTS), st.integers(0, 300), st.binary(max_size=80))
def test_no_bytes_raise_an_error(start: bytes, cut: int, end: bytes) -> None:
    body = start[:cut] + end

    call_every_check(body, body, len(body))


@given(st.binary(max_size=120), st.binary(max_size=120), st.integers(0, 2**40))
def test_unrelated_head_and_tail_raise_no_error(head: bytes, tail: bytes, size: int) -> None:
    call_every_check(head, tail, size)


@given(st.sampled_from(STARTS), st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=8))
def test_changed_headers_raise_no_error(start: bytes, changes: list[tuple[int, int]]) -> None:
    body = bytearray(start)
    for place, value in changes:
        body[place % len(body)] = value

    call_every_check(bytes(body), bytes(body[-100:]), len(body))


UNITS = (
    b"1", b" ", b"<", b"< ", b"v", b"v ", b"#", b"\n", b"f 1 2 3\n", b"=", b"Q", b'"', b"\xff", b"\xff\xd8\xff\xe0",
    b"!\xfe\1x\0", b"data:", b";base64", b"\0\0\0\x08free", b"OggS\0", b"\0\0\0\x14ispe\0\0\0\0", b"1.", b"nan ",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("start", [b"", b"v 1 2 ", b"ply\nformat ascii 1.0\n", b"solid ", b"data:", GIF[:13], MP4[:16]])
def test_long_repetitive_heads_are_fast(start: bytes, unit: bytes) -> None:
    head = (start + unit * HEAD_BYTES)[:HEAD_BYTES]
    began = time.process_time()

    call_every_check(head, head, 10 * HEAD_BYTES)

    assert time.process_time() - began < 1


def test_an_api_error_is_never_media() -> None:
    for status in ("error", "failed", "processing", "success"):
        answer = json.dumps({"status": status, "output": ["https://h/a.png"]}, indent=2).encode()
        assert sniff(answer) is None
        assert base64_start(answer) is None
        assert base64_start(re.sub(rb"\W", b"", answer)) is None
