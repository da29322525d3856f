"""What kind of media some bytes are, by their signature, and whether they end where their format says."""

import binascii
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_BYTES = 65_536
TAIL_BYTES = 65_536


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
_ANY_PICTURE = (b"mif1", b"msf1")  # brands that leave the codec to the compatible brands
_MP3 = Media("audio/mpeg", "mp3")
_OBJ, _PLY, _STL = Media("model/obj", "obj"), Media("model/ply", "ply"), Media("model/stl", "stl")

_SCAN = 0xDA
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # the JPEG markers whose segment says the size
_STANDALONE = range(0xD0, 0xDA)  # the JPEG markers that can't follow the start of the picture
_STREAMED = 0x7FFF_F000  # a RIFF length from here on is a placeholder, written before the length was known
_BOXES = frozenset(b"ftyp styp moov mdat moof mfra meta free skip wide uuid udta sidx ssix pdin emsg prft".split())
_SEGMENT = b"\x18S\x80g"


def sniff(head: bytes) -> Media | None:
    """The media that begins with `head`, or None for what is no media.

    The first kilobyte tells most formats; a model in text is read as far as `head` goes.

    >>> sniff(b"<!doctype html>") is None
    True
    """
    media = _signed(head) or _model(head)
    return media if media is not None and _well_formed(media, head) else None


def whole(media: Media, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes ends as its format says. What does not tell its end counts as whole."""
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
            return _ebml_whole(head, size)
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
            return _obj_statement(_obj_lines(tail)[-1].decode("utf-8", "replace"))
        case "model/ply":
            return size >= (_ply_least(head) or 0)
        case "model/stl":
            return b"endsolid" in tail if _stl_text(head) else size >= 84 + 50 * _little(head[80:84])
        case "application/zip":
            return _zip_whole(tail, size)
        case _:
            return True


def shows_its_end(media: Media, head: bytes, tail: bytes, size: int) -> bool:
    """Return whether the file itself proves that it is whole: by an end mark, or by a length of its own.

    `whole` gives the benefit of the doubt; this is for files whose transfer ended otherwise than its headers say.
    """
    if not whole(media, head, tail, size):
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
            return size == _ply_least(head)
        case "model/stl":
            return _stl_text(head) or size == 84 + 50 * _little(head[80:84])
        case _:
            return False


def is_text(head: bytes) -> bool:
    r"""Return whether bytes begin like a text, a page or nothing at all: what a store says instead of the file.

    >>> is_text(b"<html>"), is_text(b""), is_text(b"\x7fELF\x02\x01\x01\x00")
    (True, True, False)
    """
    return head.translate(None, _CONTROLS) == head


def pixels(media: Media, head: bytes) -> int | None:
    """Width times height from the header, where the format keeps them near its start; None where it does not."""
    size = _dimensions(media, head)
    return None if size is None else size[0] * size[1]


def _signed(head: bytes) -> Media | None:
    """The media whose signature `head` begins with."""
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
        return _MP3 if head[2] >> 4 != 0xF and head[2] >> 2 & 3 != 3 else None  # no bit rate or sampling rate there is
    return None


def _branded(head: bytes) -> Media:
    brand = head[8:12]
    if brand in _ANY_PICTURE:
        compatible = head[16 : int.from_bytes(head[:4], "big")]
        return _AVIF if b"avif" in compatible or b"avis" in compatible else _HEIC
    return _BRANDS.get(brand, _MP4)


def _well_formed(media: Media, head: bytes) -> bool:
    """Whether more than the signature is right: text may begin with one, too."""
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
            return len(head) >= 8 and head[4] & 0x7F == 0  # what comes first describes the stream
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


def _jpeg_dimensions(head: bytes) -> tuple[int, int] | None:
    at = next((at for marker, at in _jpeg_segments(head) if marker in _FRAMES), None)
    if at is None:
        return None
    height, width = struct.unpack(">HH", head[at + 3 : at + 7])
    return width, height


def _jpeg_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether the end mark comes after the picture's own scan: the header may hold a whole JPEG as thumbnail."""
    if tail.endswith(b"\xff\xd9"):
        return True
    scan = next((at for marker, at in _jpeg_segments(head) if marker == _SCAN), None)
    if scan is None and size <= len(head):
        return False
    end = tail.rfind(b"\xff\xd9")
    return end > tail.rfind(b"\xff\xda") and size - len(tail) + end > (scan or 0)


def _gif_blocks(head: bytes) -> Iterator[tuple[int, int]]:
    """The blocks of a GIF that begin in `head`, each as (first byte, where); the last may be of no known kind."""
    if len(head) < 13:
        return
    at = 13 + _gif_colours(head[10])
    while at < len(head):
        kind = head[at]
        if kind == 0:  # some encoders end a block twice
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
    """The size of the screen, or of a larger picture on it."""
    width, height = struct.unpack("<HH", head[6:10])
    for kind, at in _gif_blocks(head) if width and height else ():
        if kind == 0x2C and at + 9 < len(head):
            picture = struct.unpack("<HH", head[at + 5 : at + 9])
            width, height = max(width, picture[0]), max(height, picture[1])
    return width, height


def _gif_colours(flags: int) -> int:
    """The bytes that a table of colours takes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_well_formed(head: bytes) -> bool:
    """Whether nothing but extensions comes before the first picture, as far as `head` goes."""
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
    """The largest of the pictures described: a large one may consist of tiles."""
    found = ((int.from_bytes(width, "big"), int.from_bytes(height, "big")) for width, height in _ISPE.findall(head))
    return max(found, key=lambda size: size[0] * size[1], default=None)


def _boxes_whole(head: bytes, tail: bytes, size: int, needed: set[bytes]) -> bool:
    """Whether the top-level boxes reach the end and not beyond, as far as their headers are in view."""
    boxes = list(_box_list(head, tail, size))
    at = boxes[-1][1] if boxes else 0
    if boxes and boxes[-1][0] == b"":  # from there on they are out of view
        return True
    return at <= size and needed <= {kind for kind, _ in boxes}


def _boxes_end(head: bytes, tail: bytes, size: int) -> int | None:
    """Where the last top-level box ends; None where not all of their headers are in view."""
    boxes = list(_box_list(head, tail, size))
    return boxes[-1][1] if boxes and boxes[-1][0] else None


def _box_list(head: bytes, tail: bytes, size: int) -> Iterator[tuple[bytes, int]]:
    """The top-level boxes, each as (kind, where it ends); one without a kind where the next header is out of view."""
    at = 0
    while at + 8 <= size:
        header = _view(head, tail, size, at, 16)
        kind = header[4:8]
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # as long as the file
            length = size - at
        if len(header) < min(16, size - at) or kind not in _BOXES or length < 8:
            yield b"", at
            return
        at += length
        yield kind, at


def _view(head: bytes, tail: bytes, size: int, at: int, count: int) -> bytes:
    """`count` bytes from the place `at`, or fewer where they are not in view."""
    if at + count <= len(head):
        return head[at : at + count]
    in_tail = at - (size - len(tail))
    return tail[in_tail : in_tail + count] if in_tail >= 0 else b""


def _ebml_whole(head: bytes, size: int) -> bool:
    """Whether the segment is as long as it says. A recording in progress doesn't know how long it gets."""
    length = _ebml_length(head)
    return length is None or size >= length


def _ebml_length(head: bytes) -> int | None:
    """The least bytes of the whole file, as its segment says; None where it does not."""
    length, at = _vint(head, 4)
    at += length or 0
    if length is None or head[at : at + 4] != _SEGMENT:
        return None
    length, at = _vint(head, at + 4)
    return None if length is None else at + length


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """A number of variable width, None for an unknown one, and the place after it."""
    width = 9 - data[at].bit_length() if at < len(data) else 9
    digits = data[at : at + width]
    if width > 8 or len(digits) < width:
        return None, at
    most = (1 << 7 * width) - 1
    value = int.from_bytes(digits, "big") & most
    return (None if value == most else value), at + width


def _ogg_whole(tail: bytes) -> bool:
    """Whether the last page is there to its end."""
    at = tail.rfind(b"OggS")
    if at < 0:
        return True
    page = tail[at:]
    segments = page[26] if len(page) > 26 else 256
    return len(page) >= 27 + segments + sum(page[27 : 27 + segments])


def _flac_whole(head: bytes, size: int) -> bool:
    """Whether there is sound after the descriptions."""
    at, last = 4, False
    while not last and at + 4 <= len(head):
        last = head[at] >= 0x80
        at += 4 + int.from_bytes(head[at + 1 : at + 4], "big")
    return size > at + (0 if last else 4)


_XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x02\x03\x06\x07\x0a\x0b\x0e\x0f]")  # one that says the bytes


def _mp3_whole(head: bytes, size: int) -> bool:
    """Whether there is sound after the tags, and as much as the first frame says, if it says so."""
    start = 0
    if head.startswith(b"ID3"):
        for digit in head[6:10]:
            start = start << 7 | digit & 0x7F
        start += 10
    found = _XING.search(head, start, start + 48)
    if found is None:
        return size > start
    at = found.end() + (4 if head[found.end() - 1] & 1 else 0)
    return size >= start + int.from_bytes(head[at : at + 4], "big")


def _zip_whole(tail: bytes, size: int) -> bool:
    """Whether the end record follows the directory it tells of: an archive may hold another, with its own end."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        return False
    length, start, comment = struct.unpack("<IIH", tail[at + 12 : at + 22])
    if len(tail) < at + 22 + comment:
        return False
    large = at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07"  # the real numbers stand in a record of 64 bits
    return large or bool(start + length == size - len(tail) + at)


def _model(head: bytes) -> Media | None:
    """The three-dimensional models that have no signature, or text for one."""
    if head.startswith((b"ply\n", b"ply\r\n")):
        return _PLY if _ply_least(head) is not None else None
    if _stl_text(head) or _stl_binary(head):
        return _STL
    return _OBJ if _obj(head) else None


_MARKUP = re.compile(rb"<\s*[!/?a-z]", re.IGNORECASE)
_CONTROLS = bytes({*range(32), 127} - {*b"\t\r\n"})
_NUMBER = re.compile(r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:e[-+]?\d++)?", re.IGNORECASE | re.ASCII)
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)(?:\(ind\))?", re.IGNORECASE)  # the normal of an empty face
_INDEX = re.compile(r"-?\d++(?:/(?:-?\d++)?(?:/-?\d++)?)?", re.ASCII)
_NAME = re.compile(
    "g|o|s|mg|mtllib|usemtl|maplib|usemap|bevel|c_interp|d_interp|lod|shadow_obj|trace_obj|ctech|stech"
    "|cstype|deg|bmat|step|curv|curv2|surf|parm|trim|hole|scrv|sp|end|con"
)


def _obj(head: bytes) -> bool:
    """Whether every whole line is a statement of Wavefront OBJ and one of them is a vertex."""
    if head.startswith(b"#!") or head.translate(None, _CONTROLS) != head or _MARKUP.search(head):
        return False
    try:
        lines = [line.decode("utf-8") for line in _obj_lines(head)[:-1]]
    except UnicodeDecodeError:
        return False
    return all(map(_obj_statement, lines)) and any(line.split()[:1] == ["v"] for line in lines)


def _obj_lines(text: bytes) -> list[bytes]:
    """The lines, where one that ends with a backslash goes on; the last has no end."""
    return text.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").split(b"\n")


def _obj_statement(line: str) -> bool:
    """Whether a line is a statement of Wavefront OBJ, a comment or blank."""
    words = line.partition("#")[0].split()
    if not words:
        return True
    rest = words[1:]
    match words[0]:
        case "v":
            return 3 <= len(rest) <= 8 and all(map(_NUMBER.fullmatch, rest))
        case "vn" | "vt" | "vp":
            numbers = all(_NUMBER.fullmatch(word) or _NO_NUMBER.fullmatch(word) for word in rest)
            return numbers and len(rest) in ((3,) if words[0] == "vn" else (1, 2, 3))
        case "f" | "l" | "p":
            return len(rest) >= {"f": 3, "l": 2, "p": 1}[words[0]] and all(map(_INDEX.fullmatch, rest))
        case keyword:
            return _NAME.fullmatch(keyword) is not None


_PLY_LINE = re.compile(
    rb"(?:comment|obj_info)(?:\s.*)?"
    rb"|format\s+(?P<format>ascii|binary_little_endian|binary_big_endian)\s+1\.0"
    rb"|element\s+\w+\s+(?P<count>\d{1,12})"
    rb"|property\s+(?:list\s+(?P<many>[a-z]+\d*)\s+)?(?P<type>[a-z]+\d*)\s+(?P<name>\S+)"
)
_PLY_BYTES = {
    **dict.fromkeys([b"char", b"uchar", b"int8", b"uint8"], 1),
    **dict.fromkeys([b"short", b"ushort", b"int16", b"uint16"], 2),
    **dict.fromkeys([b"int", b"uint", b"int32", b"uint32", b"float", b"float32"], 4),
    **dict.fromkeys([b"double", b"float64"], 8),
}
_CORNERS = (b"vertex_indices", b"vertex_index")


def _ply_least(head: bytes) -> int | None:
    """The least bytes of a PLY file with this header; None for what is no such header."""
    end = head.find(b"\nend_header")
    start = head.find(b"\n", end + 1) + 1
    if end < 0 or start <= 0:
        return None
    form, count, least = b"", 0, 0
    for line in head[:end].split(b"\n")[1:]:
        found = _PLY_LINE.fullmatch(line.strip())
        if found is None:
            return None
        form = found["format"] or form
        if found["count"]:
            count = int(found["count"])
        elif found["type"]:
            scalar, many = _PLY_BYTES.get(found["type"]), _PLY_BYTES.get(found["many"] or b"char")
            if scalar is None or many is None:
                return None
            corners = 3 if found["name"] in _CORNERS else 0
            values = corners if found["many"] else 1
            if form == b"ascii":  # one digit and one blank each
                scalar = many = 2
            least += count * (values * scalar + (many if found["many"] else 0))
    if not form or not least:
        return None
    return start + least - (1 if form == b"ascii" else 0)  # the last line may do without its end


_STL_TEXT = re.compile(
    rb"solid(?:[ \t][^\n<]{0,500})?\r?\n\s*+facet\s++normal(?:\s++[-+.\w]++){3}\s++outer\s++loop"
    rb"(?:\s++vertex(?:\s++[-+.\w]++){3}){3}\s++endloop\s++endfacet\s"
)


def _stl_text(head: bytes) -> bool:
    return _STL_TEXT.match(head) is not None


def _stl_binary(head: bytes) -> bool:
    """Whether the first triangles have real corners and normals of length one, or none: nothing else looks so."""
    count = _little(head[80:84])
    if len(head) < 134 or not count or b"<" in head[:80]:
        return False
    if not all(byte in (0, 9, 10, 13) or 32 <= byte < 127 for byte in head[:80]):
        return False
    real = False
    for at in range(84, min(84 + 50 * min(count, 16), len(head) - 49), 50):
        *numbers, extra = struct.unpack("<12fH", head[at : at + 50])
        if extra or not all(number == 0 or 1e-30 < abs(number) < 1e9 for number in numbers):
            return False
        normal = math.hypot(*numbers[:3])
        if normal and not 0.99 < normal < 1.01:
            return False
        real = real or len({tuple(numbers[at : at + 3]) for at in (3, 6, 9)}) == 3
    return real


_BEFORE_BASE64 = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*+(?:b?[\"'])?\s*+(?:data:[^,\"'<>]{0,200}?;\s*base64\s*,\s*+)?", re.IGNORECASE
)
_AFTER_BASE64 = re.compile(rb"={0,2}[\"']?")
_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\v\f"


def base64_start(head: bytes) -> int | None:
    """Where the base64 digits begin in a text that stands for media; None for any other text.

    Before them may come a byte order mark, blanks, a quotation mark and `data:...;base64,`.

    >>> base64_start(b'"data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="')
    23
    """
    before = _BEFORE_BASE64.match(head)
    start = before.end() if before else 0
    try:
        body = Base64Decoder().feed(head[start:])
    except ValueError:
        return None
    return start if sniff(body) is not None else None


class Base64Decoder:
    """Decodes base64 piece by piece, in the standard and the URL-safe alphabet, and keeps no more than a few bytes.

    Blanks don't count. After the last digit may come what padding is missing, and a quotation mark.
    """

    __slots__ = ("_after", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._after = b""

    def feed(self, chunk: bytes) -> bytes:
        """The bytes that are complete with `chunk`. Raises ValueError for what is no base64."""
        text = chunk.translate(_STANDARD, _BLANKS)
        after = text.lstrip(_DIGITS)
        digits = self._rest + text[: len(text) - len(after)]
        if self._after and len(digits) > len(self._rest):
            raise ValueError("more after the end of the base64")
        complete = len(digits) - len(digits) % 4
        self._rest = digits[complete:]
        self._after += after[:4]  # more than four are too many
        if not _AFTER_BASE64.fullmatch(self._after) or self._after.count(b"=") > -len(self._rest) % 4:
            raise ValueError("no base64")
        return binascii.a2b_base64(digits[:complete])

    def finish(self) -> bytes:
        """The last bytes. Raises ValueError where the text ends with half a byte."""
        if len(self._rest) == 1:
            raise ValueError("base64 that ends too early")
        return binascii.a2b_base64(self._rest + b"=" * (-len(self._rest) % 4))
