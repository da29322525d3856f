"""What kind of media some bytes are, by their signature, and whether they end where their format says."""

import struct
from dataclasses import dataclass

HEAD_BYTES = 512
TAIL_BYTES = 65_536
MAX_PIXELS = 40_000_000


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


def sniff(head: bytes) -> Media | None:
    """The media that begins with `head` (the first 512 bytes are enough), or None for what is no media.

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
            return b"\xff\xd9" in tail
        case "image/gif":
            return b"\x3b" in tail[-64:]
        case "image/webp" | "audio/wav" | "video/x-msvideo":
            declared = struct.unpack("<I", head[4:8])[0]
            return size >= 12 and (declared in (0, 0xFFFFFFFF) or size >= declared + 8)
        case "model/gltf-binary":
            return size >= 12 and size >= struct.unpack("<I", head[8:12])[0]
        case _:
            return True


def pixels(media: Media, head: bytes) -> int | None:
    """Width times height from the header, where the format keeps them near its start; None where it does not."""
    if media.type == "image/png" and len(head) >= 24:
        width, height = struct.unpack(">II", head[16:24])
        return int(width * height)
    if media.type == "image/gif" and len(head) >= 10:
        width, height = struct.unpack("<HH", head[6:10])
        return int(width * height)
    return None
