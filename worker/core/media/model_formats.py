"""Three-dimensional models without a signature, or with text for one: Wavefront OBJ, PLY and STL."""

import math
import re
import struct

CONTROLS = bytes({*range(32), 127} - {*b"\t\r\n"})  # bytes that no text has
_MARKUP = re.compile(rb"<\s*[!/?a-z]", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:e[-+]?\d++)?", re.IGNORECASE | re.ASCII)
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)(?:\(ind\))?", re.IGNORECASE)  # the normal of an empty face
_INDEX = re.compile(r"-?\d++(?:/(?:-?\d++)?(?:/-?\d++)?)?", re.ASCII)
_NAME = re.compile(
    "g|o|s|mg|mtllib|usemtl|maplib|usemap|bevel|c_interp|d_interp|lod|shadow_obj|trace_obj|ctech|stech"
    "|cstype|deg|bmat|step|curv|curv2|surf|parm|trim|hole|scrv|sp|end|con"
)


def is_obj(head: bytes) -> bool:
    """Return whether every whole line is a statement of Wavefront OBJ and one of them is a vertex."""
    if head.startswith(b"#!") or head.translate(None, CONTROLS) != head or _MARKUP.search(head):
        return False
    try:
        lines = [line.decode("utf-8") for line in obj_lines(head)[:-1]]
    except UnicodeDecodeError:
        return False
    return all(map(obj_statement, lines)) and any(line.split()[:1] == ["v"] for line in lines)


def obj_lines(text: bytes) -> list[bytes]:
    """Return the lines, where one that ends with a backslash goes on; the last has no end."""
    return text.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").split(b"\n")


def obj_statement(line: str) -> bool:
    """Return whether a line is a statement of Wavefront OBJ, a comment or blank."""
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


def ply_min_size(head: bytes) -> int | None:
    """Return the least bytes of a PLY file with this header; None for what is no such header."""
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


def is_stl_text(head: bytes) -> bool:
    """Return whether bytes begin with the first facet of an STL file in text."""
    return _STL_TEXT.match(head) is not None


def is_stl_binary(head: bytes) -> bool:
    """Return whether the first triangles have real corners, and normals of length one or none."""
    count = int.from_bytes(head[80:84], "little")
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
