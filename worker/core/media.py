"""What kind of media some bytes are, by their signature, and whether they end where their format says."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_BYTES = 65_536
TAIL_BYTES = 65_536
MAX_PIXELS = 80_000_000


@dataclass(frozen=True, slots=True)
class Media:
    """A media type and the file name extension that goes with it."""

    type: str
    extension: str


_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", Media("image/png", "png")),
    (b"\xff\xd8\xff", Media("image/jpeg", "jpg")),
    (b"GIF87a", Media("image/gif", "gif")),
    (b"GIF89a", Media("image/gif", "gif")),
    (b"\x1aE\xdf\xa3", Media("video/webm", "webm")),
    (b"ID3", Media("audio/mpeg", "mp3")),
    (b"fLaC", Media("audio/flac", "flac")),
    (b"OggS", Media("audio/ogg", "ogg")),
    (b"glTF", Media("model/gltf-binary", "glb")),
    (b"PK\x03\x04", Media("application/zip", "zip")),
)
_RIFF = {
    b"WEBP": Media("image/webp", "webp"),
    b"WAVE": Media("audio/wav", "wav"),
    b"AVI ": Media("video/x-msvideo", "avi"),
}
_BRANDS = {
    b"avif": Media("image/avif", "avif"),
    b"qt  ": Media("video/quicktime", "mov"),
    b"M4A ": Media("audio/mp4", "m4a"),
}
_SCAN = 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # the JPEG markers whose segment says the size


def sniff(head: bytes) -> Media | None:
    """The media that begins with `head` (a few bytes are enough), or None for what is no media.

    >>> sniff(b"<!doctype html>") is None
    True
    """
    for signature, media in _SIGNATURES:
        if head.startswith(signature):
            return media
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], Media("video/mp4", "mp4"))
    if len(head) >= 4 and head[0] == 0xFF and head[1] in (0xFB, 0xFA, 0xF3, 0xF2):
        return Media("audio/mpeg", "mp3")
    return None


def whole(media: Media, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes ends as its format says. Formats without an end mark count as whole."""
    match media.type:
        case "image/png":
            return b"IEND\xaeB`\x82" in tail
        case "image/jpeg":
            return _jpeg_whole(head, tail, size)
        case "image/gif":
            return b"\x00\x3b" in tail[-64:]
        case "application/zip":
            return b"PK\x05\x06" in tail
        case "image/webp" | "audio/wav" | "video/x-msvideo":
            declared = struct.unpack("<I", head[4:8])[0]
            return size >= 12 and (declared in (0, 0xFFFFFFFF) or size >= declared + 8)
        case "model/gltf-binary":
            return size >= 12 and size >= struct.unpack("<I", head[8:12])[0]
        case _:
            return True


def pixels(media: Media, head: bytes) -> int | None:
    """Width times height from the header, where the format keeps them near its start; None where it does not."""
    match media.type:
        case "image/png" if len(head) >= 24:
            width, height = struct.unpack(">II", head[16:24])
        case "image/gif" if len(head) >= 10:
            width, height = struct.unpack("<HH", head[6:10])
        case "image/jpeg":
            return _jpeg_pixels(head)
        case "image/webp" if len(head) >= 30:
            return _webp_pixels(head)
        case _:
            return None
    return int(width * height)


def _jpeg_segments(head: bytes) -> Iterator[tuple[int, int]]:
    """The segments of a JPEG's header, each as (marker, where its length stands), up to the first scan."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        yield marker, at + 2
        if marker == _SCAN:
            return
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")


def _jpeg_pixels(head: bytes) -> int | None:
    at = next((at for marker, at in _jpeg_segments(head) if marker in _FRAMES), None)
    if at is None:
        return None
    height, width = struct.unpack(">HH", head[at + 3 : at + 7])
    return int(width * height)


def _jpeg_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether the end mark comes after the picture's own scan: the header may hold a whole JPEG as thumbnail."""
    if tail.endswith(b"\xff\xd9"):
        return True
    scan = next((at for marker, at in _jpeg_segments(head) if marker == _SCAN), None)
    if scan is None and size <= len(head):
        return False
    end = tail.rfind(b"\xff\xd9")
    return end > tail.rfind(b"\xff\xda") and size - len(tail) + end > (scan or 0)


def _webp_pixels(head: bytes) -> int | None:
    match head[12:16]:
        case b"VP8X":
            width, height = int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width = int.from_bytes(head[26:28], "little") & 0x3FFF
            height = int.from_bytes(head[28:30], "little") & 0x3FFF
        case _:
            return None
    return width * height
