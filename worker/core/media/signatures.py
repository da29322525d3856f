"""Detect the media type of bytes by their signature, and check that a file is complete according to its format."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from worker.core.media.model_formats import (
    CONTROLS,
    is_obj,
    is_stl_binary,
    is_stl_text,
    obj_lines,
    obj_statement,
    ply_min_size,
)

HEAD_BYTES = 65_536
TAIL_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Media:
    """A media type and its file name extension."""

    type: str
    extension: str


_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", Media("image/png", "png")),
    (b"\xff\xd8\xff", Media("image/jpeg", "jpg")),
    (b"GIF87a", Media("image/gif", "gif")),
    (b"GIF89a", Media("image/gif", "gif")),
    (b"ID3", Media("audio/mpeg", "mp3")),
    (b"fLaC", Media("audio/flac", "flac")),
    (b"OggS\0", Media("audio/ogg", "ogg")),
    (b"glTF", Media("model/gltf-binary", "glb")),
    (b"PK\x03\x04", Media("application/zip", "zip")),
)
_EBML = b"\x1aE\xdf\xa3"
_WEBM, _MATROSKA = Media("video/webm", "webm"), Media("video/x-matroska", "mkv")
_RIFF = {
    b"WEBP": Media("image/webp", "webp"),
    b"WAVE": Media("audio/wav", "wav"),
    b"AVI ": Media("video/x-msvideo", "avi"),
}
_AVIF, _HEIC = Media("image/avif", "avif"), Media("image/heic", "heic")
_MP4 = Media("video/mp4", "mp4")
_BRANDS = {
    b"avif": _AVIF,
    b"avis": _AVIF,
    b"heic": _HEIC,
    b"heix": _HEIC,
    b"heim": _HEIC,
    b"heis": _HEIC,
    b"hevc": _HEIC,
    b"hevx": _HEIC,
    b"qt  ": Media("video/quicktime", "mov"),
    b"M4A ": Media("audio/mp4", "m4a"),
}
_ANY_PICTURE = (b"mif1", b"msf1")  # for these brands the compatible brands name the codec
_MP3 = Media("audio/mpeg", "mp3")
_OBJ, _PLY, _STL = Media("model/obj", "obj"), Media("model/ply", "ply"), Media("model/stl", "stl")

_SCAN = 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # JPEG markers of segments that contain the size
_STANDALONE = range(0xD0, 0xDA)  # JPEG markers that can't follow the start of the picture
_STREAMED = 0x7FFF_F000  # higher RIFF lengths are placeholders, written before the length was known
_BOXES = frozenset(b"ftyp styp moov mdat moof mfra meta free skip wide uuid udta sidx ssix pdin emsg prft".split())
_SEGMENT = b"\x18S\x80g"


def sniff(head: bytes) -> Media | None:
    """Return the media type of a file that starts with `head`, or None if it is not media.

    The first kilobyte is enough for most formats. Models in text form are checked up to the end of `head`.

    >>> sniff(b"<!doctype html>") is None
    True
    """
    media = _signed(head) or _model(head)
    return media if media is not None and _well_formed(media, head) else None


def is_complete(media: Media, head: bytes, tail: bytes, size: int) -> bool:
    """Return whether a file of `size` bytes is complete. Formats without a detectable end count as complete."""
    match media.type:
        case "image/png":
            return b"IEND\xaeB`\x82" in tail
        case "image/jpeg":
            return _jpeg_whole(head, tail, size)
        case "image/gif":
            ends = size > len(head) and tail.rstrip(b"\0\r\n").endswith(b"\x00\x3b")
            return ends or any(kind == 0x3B for kind, _ in _gif_blocks(head))
        case "image/avif" | "image/heic":
            return _boxes_whole(head, tail, size, {b"meta", b"mdat"})
        case "video/mp4" | "video/quicktime" | "audio/mp4":
            return _boxes_whole(head, tail, size, {b"moov", b"mdat"})
        case "video/webm" | "video/x-matroska":
            return size >= (_ebml_length(head) or 0)  # a live recording has no declared length
        case "image/webp":
            return size >= max(_little(head[4:8]), 12) + 8
        case "audio/wav" | "video/x-msvideo":
            declared = _little(head[4:8])
            return size >= 12 and (declared == 0 or declared >= _STREAMED or size >= declared + 8)
        case "audio/ogg":
            return _ogg_whole(tail)
        case "audio/flac":
            return _flac_whole(head, size)
        case "audio/mpeg":
            return _mp3_whole(head, size)
        case "model/gltf-binary":
            return size >= max(_little(head[8:12]), 12)
        case "model/obj":
            return obj_statement(obj_lines(tail)[-1].decode("utf-8", "replace"))
        case "model/ply":
            return size >= (ply_min_size(head) or 0)
        case "model/stl":
            return b"endsolid" in tail if is_stl_text(head) else size >= 84 + 50 * _little(head[80:84])
        case "application/zip":
            return _zip_whole(tail, size)
        case _:
            return True


def proves_complete(media: Media, head: bytes, tail: bytes, size: int) -> bool:
    """Return whether the file itself proves that it is complete, by an end mark or a length field.

    `is_complete` accepts a file in doubt. This is for transfers that ended differently from what their headers say.
    """
    if not is_complete(media, head, tail, size):
        return False
    match media.type:
        case "image/png" | "image/gif" | "image/webp" | "model/gltf-binary" | "application/zip":
            return True
        case "image/jpeg":
            return tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
        case "audio/wav" | "video/x-msvideo":
            return 0 < _little(head[4:8]) < _STREAMED
        case "image/avif" | "image/heic" | "video/mp4" | "video/quicktime" | "audio/mp4":
            return _boxes_end(head, tail, size) == size
        case "video/webm" | "video/x-matroska":
            return _ebml_length(head) is not None
        case "model/ply":
            return size == ply_min_size(head)
        case "model/stl":
            return is_stl_text(head) or size == 84 + 50 * _little(head[80:84])
        case _:
            return False


def is_text(head: bytes) -> bool:
    r"""Return whether bytes look like text or are empty. Stores send text or HTML pages instead of a missing file.

    >>> is_text(b"<html>"), is_text(b""), is_text(b"\x7fELF\x02\x01\x01\x00")
    (True, True, False)
    """
    return head.translate(None, CONTROLS) == head


def pixel_count(media: Media, head: bytes) -> int | None:
    """Return width times height from the header. None if the format does not store them near the start."""
    size = _dimensions(media, head)
    return None if size is None else size[0] * size[1]


def _signed(head: bytes) -> Media | None:
    """Return the media type whose signature `head` starts with."""
    for signature, media in _SIGNATURES:
        if head.startswith(signature):
            return media
    if head.startswith(_EBML):
        return _MATROSKA if b"matroska" in head[:64] else _WEBM
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp" and 16 <= int.from_bytes(head[:4], "big") <= 4_096:
        return _branded(head)
    if len(head) >= 4 and head[0] == 0xFF and head[1] in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2):
        return (
            _MP3 if head[2] >> 4 != 0xF and head[2] >> 2 & 3 != 3 else None
        )  # these bit rates and sampling rates don't exist
    return None


def _branded(head: bytes) -> Media:
    brand = head[8:12]
    if brand in _ANY_PICTURE:
        compatible = head[16 : int.from_bytes(head[:4], "big")]
        return _AVIF if b"avif" in compatible or b"avis" in compatible else _HEIC
    return _BRANDS.get(brand, _MP4)


def _well_formed(media: Media, head: bytes) -> bool:
    """Return whether the header after the signature is valid. Text may start with a signature by chance."""
    size = _dimensions(media, head)
    if size is not None and 0 in size:
        return False
    match media.type:
        case "image/png":
            return size is not None and head[8:16] == b"\0\0\0\rIHDR"
        case "image/jpeg":
            return len(head) >= 4 and head[3] >= 0xC0 and head[3] not in _STANDALONE
        case "image/gif":
            return size is not None and _gif_well_formed(head)
        case "image/webp":
            return size is not None
        case "audio/mpeg" if head.startswith(b"ID3"):
            return len(head) >= 10 and head[3] in (2, 3, 4) and max(head[6:10]) < 0x80
        case "audio/flac":
            return len(head) >= 8 and head[4] & 0x7F == 0  # the first block describes the stream
        case "model/gltf-binary":
            return len(head) >= 12 and _little(head[4:8]) in (1, 2)
        case _:
            return True


def _dimensions(media: Media, head: bytes) -> tuple[int, int] | None:
    match media.type:
        case "image/png" if len(head) >= 24:
            width, height = struct.unpack(">II", head[16:24])
            return width, height
        case "image/gif" if len(head) >= 13:
            return _gif_dimensions(head)
        case "image/jpeg":
            return _jpeg_dimensions(head)
        case "image/webp":
            return _webp_dimensions(head)
        case "image/avif" | "image/heic":
            return _heif_dimensions(head)
        case _:
            return None


def _little(digits: bytes) -> int:
    return int.from_bytes(digits, "little")


def _jpeg_segments(head: bytes) -> Iterator[tuple[int, int]]:
    """Yield the segments of a JPEG header, each as (marker, position of its length), up to the first scan."""
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


def _jpeg_dimensions(head: bytes) -> tuple[int, int] | None:
    at = next((at for marker, at in _jpeg_segments(head) if marker in _FRAMES), None)
    if at is None:
        return None
    height, width = struct.unpack(">HH", head[at + 3 : at + 7])
    return width, height


def _jpeg_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Return whether the end mark comes after the scan of the picture. The header may contain a JPEG as thumbnail."""
    if tail.endswith(b"\xff\xd9"):
        return True
    scan = next((at for marker, at in _jpeg_segments(head) if marker == _SCAN), None)
    if scan is None and size <= len(head):
        return False
    end = tail.rfind(b"\xff\xd9")
    return end > tail.rfind(b"\xff\xda") and size - len(tail) + end > (scan or 0)


def _gif_blocks(head: bytes) -> Iterator[tuple[int, int]]:
    """Yield the blocks of a GIF that start in `head`, each as (first byte, position). The last may be unknown."""
    if len(head) < 13:
        return
    at = 13 + _gif_colours(head[10])
    while at < len(head):
        kind = head[at]
        if kind == 0:  # some encoders write the end of a block twice
            at += 1
            continue
        yield kind, at
        if kind == 0x2C and at + 9 < len(head):
            at += 11 + _gif_colours(head[at + 9])
        elif kind == 0x21:
            at += 2
        else:
            return
        while at < len(head) and head[at]:
            at += 1 + head[at]
        at += 1


def _gif_dimensions(head: bytes) -> tuple[int, int]:
    """Return the size of the screen, or of a larger picture on it."""
    width, height = struct.unpack("<HH", head[6:10])
    for kind, at in _gif_blocks(head) if width and height else ():
        if kind == 0x2C and at + 9 < len(head):
            picture = struct.unpack("<HH", head[at + 5 : at + 9])
            width, height = max(width, picture[0]), max(height, picture[1])
    return width, height


def _gif_colours(flags: int) -> int:
    """Return the size of a colour table in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_well_formed(head: bytes) -> bool:
    """Return whether only extensions come before the first picture, up to the end of `head`."""
    return next((kind for kind, _ in _gif_blocks(head) if kind != 0x21), 0x2C) == 0x2C


def _webp_dimensions(head: bytes) -> tuple[int, int] | None:
    match head[12:16]:
        case b"VP8X" if len(head) >= 30:
            return _little(head[24:27]) + 1, _little(head[27:30]) + 1
        case b"VP8L" if len(head) >= 25 and head[20] == 0x2F:
            bits = _little(head[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 " if len(head) >= 30 and head[23:26] == b"\x9d\x01\x2a":
            return _little(head[26:28]) & 0x3FFF, _little(head[28:30]) & 0x3FFF
        case _:
            return None


_ISPE = re.compile(rb"\0\0\0\x14ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)


def _heif_dimensions(head: bytes) -> tuple[int, int] | None:
    """Return the size of the largest picture described. A large picture may consist of tiles."""
    sizes = ((int.from_bytes(width, "big"), int.from_bytes(height, "big")) for width, height in _ISPE.findall(head))
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def _boxes_whole(head: bytes, tail: bytes, size: int, needed: set[bytes]) -> bool:
    """Return whether the top-level boxes end at the end of the file, as far as their headers are available."""
    boxes = list(_box_list(head, tail, size))
    at = boxes[-1][1] if boxes else 0
    if boxes and boxes[-1][0] == b"":  # the following headers are not available
        return True
    return at <= size and needed <= {kind for kind, _ in boxes}


def _boxes_end(head: bytes, tail: bytes, size: int) -> int | None:
    """Return where the last top-level box ends, or None if some of the headers are not available."""
    boxes = list(_box_list(head, tail, size))
    return boxes[-1][1] if boxes and boxes[-1][0] else None


def _box_list(head: bytes, tail: bytes, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the top-level boxes, each as (kind, end). The kind is empty if the next header is not available."""
    at = 0
    while at + 8 <= size:
        header = _view(head, tail, size, at, 16)
        kind = header[4:8]
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # up to the end of the file
            length = size - at
        if len(header) < min(16, size - at) or kind not in _BOXES or length < 8:
            yield b"", at
            return
        at += length
        yield kind, at


def _view(head: bytes, tail: bytes, size: int, at: int, count: int) -> bytes:
    """Return `count` bytes from position `at`, or fewer if they are neither in `head` nor in `tail`."""
    if at + count <= len(head):
        return head[at : at + count]
    in_tail = at - (size - len(tail))
    return tail[in_tail : in_tail + count] if in_tail >= 0 else b""


def _ebml_length(head: bytes) -> int | None:
    """Return the minimum size of the file according to its segment, or None if the segment has no length."""
    length, at = _vint(head, 4)
    at += length or 0
    if length is None or head[at : at + 4] != _SEGMENT:
        return None
    length, at = _vint(head, at + 4)
    return None if length is None else at + length


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a number of variable width and the position after it. The number is None if it is unknown."""
    width = 9 - data[at].bit_length() if at < len(data) else 9
    digits = data[at : at + width]
    if width > 8 or len(digits) < width:
        return None, at
    max_value = (1 << 7 * width) - 1
    value = int.from_bytes(digits, "big") & max_value
    return (None if value == max_value else value), at + width


def _ogg_whole(tail: bytes) -> bool:
    """Return whether the last page is complete."""
    at = tail.rfind(b"OggS")
    if at < 0:
        return True
    page = tail[at:]
    segments = page[26] if len(page) > 26 else 256
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _flac_whole(head: bytes, size: int) -> bool:
    """Return whether there are audio data after the metadata blocks."""
    at, last = 4, False
    while not last and at + 4 <= len(head):
        last = head[at] >= 0x80
        at += 4 + int.from_bytes(head[at + 1 : at + 4], "big")
    return size > at + (0 if last else 4)


_XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x02\x03\x06\x07\x0a\x0b\x0e\x0f]")  # one with a byte count


def _mp3_whole(head: bytes, size: int) -> bool:
    """Return whether there are audio data after the tags, and as many bytes as the first frame declares, if it does."""
    start = 0
    if head.startswith(b"ID3"):
        for digit in head[6:10]:
            start = start << 7 | digit & 0x7F
        start += 10
    match = _XING.search(head, start, start + 48)
    if match is None:
        return size > start
    at = match.end() + (4 if head[match.end() - 1] & 1 else 0)
    return size >= start + int.from_bytes(head[at : at + 4], "big")


def _zip_whole(tail: bytes, size: int) -> bool:
    """Return whether the end record follows the directory that it describes. An archive may contain other archives."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        return False
    length, start, comment = struct.unpack("<IIH", tail[at + 12 : at + 22])
    if len(tail) < at + 22 + comment:
        return False
    large = at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07"  # the real values are in a 64-bit record
    return large or bool(start + length == size - len(tail) + at)


def _model(head: bytes) -> Media | None:
    """Return the type of a 3D model without a binary signature."""
    if head.startswith((b"ply\n", b"ply\r\n")):
        return _PLY if ply_min_size(head) is not None else None
    if is_stl_text(head) or is_stl_binary(head):
        return _STL
    return _OBJ if is_obj(head) else None
