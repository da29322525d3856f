"""3D model formats without a binary signature: Wavefront OBJ, PLY and STL."""

import math
import re
import struct

CONTROLS = bytes({*range(32), 127} - {*b"\t\r\n"})  # bytes that don't occur in text
_MARKUP = re.compile(rb"<\s*[!/?a-z]", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:e[-+]?\d++)?", re.IGNORECASE | re.ASCII)
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)(?:\(ind\))?", re.IGNORECASE)  # the normal of an empty face
_INDEX = re.compile(r"-?\d++(?:/(?:-?\d++)?(?:/-?\d++)?)?", re.ASCII)
_NAME = re.compile(
    "g|o|s|mg|mtllib|usemtl|maplib|usemap|bevel|c_interp|d_interp|lod|shadow_obj|trace_obj|ctech|stech"
    "|cstype|deg|bmat|step|curv|curv2|surf|parm|trim|hole|scrv|sp|end|con"
)


def is_obj(head: bytes) -> bool:
    """Return whether every complete line is a Wavefront OBJ statement and at least one is a vertex."""
    if head.startswith(b"#!") or head.translate(None, CONTROLS) != head or _MARKUP.search(head):
        return False
    try:
        lines = [line.decode("utf-8") for line in obj_lines(head)[:-1]]
    except UnicodeDecodeError:
        return False
    return all(map(obj_statement, lines)) and any(line.split()[:1] == ["v"] for line in lines)


def obj_lines(text: bytes) -> list[bytes]:
    """Return the lines. A backslash at the end continues a line. The last line may be incomplete."""
    return text.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").split(b"\n")


def obj_statement(line: str) -> bool:
    """Return whether a line is a Wavefront OBJ statement, a comment or blank."""
    tokens = line.partition("#")[0].split()
    if not tokens:
        return True
    arguments = tokens[1:]
    match tokens[0]:
        case "v":
            return 3 <= len(arguments) <= 8 and all(map(_NUMBER.fullmatch, arguments))
        case "vn" | "vt" | "vp":
            numbers = all(_NUMBER.fullmatch(argument) or _NO_NUMBER.fullmatch(argument) for argument in arguments)
            return numbers and len(arguments) in ((3,) if tokens[0] == "vn" else (1, 2, 3))
        case "f" | "l" | "p":
            return len(arguments) >= {"f": 3, "l": 2, "p": 1}[tokens[0]] and all(map(_INDEX.fullmatch, arguments))
        case keyword:
            return _NAME.fullmatch(keyword) is not None


_PLY_LINE = re.compile(
    rb"(?:comment|obj_info)(?:\s.*)?"
    rb"|format\s+(?P<format>ascii|binary_little_endian|binary_big_endian)\s+1\.0"
    rb"|element\s+\w+\s+(?P<count>\d{1,12})"
    rb"|property\s+(?:list\s+(?P<count_type>[a-z]+\d*)\s+)?(?P<type>[a-z]+\d*)\s+(?P<name>\S+)"
)
_PLY_BYTES = {
    **dict.fromkeys([b"char", b"uchar", b"int8", b"uint8"], 1),
    **dict.fromkeys([b"short", b"ushort", b"int16", b"uint16"], 2),
    **dict.fromkeys([b"int", b"uint", b"int32", b"uint32", b"float", b"float32"], 4),
    **dict.fromkeys([b"double", b"float64"], 8),
}
_CORNERS = (b"vertex_indices", b"vertex_index")


def ply_min_size(head: bytes) -> int | None:
    """Return the minimum size of a PLY file with this header. None if it is not a PLY header."""
    end = head.find(b"\nend_header")
    start = head.find(b"\n", end + 1) + 1
    if end < 0 or start <= 0:
        return None
    form, count, body_size = b"", 0, 0
    for line in head[:end].split(b"\n")[1:]:
        match = _PLY_LINE.fullmatch(line.strip())
        if match is None:
            return None
        form = match["format"] or form
        if match["count"]:
            count = int(match["count"])
        elif match["type"]:
            value_size, count_size = _PLY_BYTES.get(match["type"]), _PLY_BYTES.get(match["count_type"] or b"char")
            if value_size is None or count_size is None:
                return None
            corners = 3 if match["name"] in _CORNERS else 0
            values = corners if match["count_type"] else 1
            if form == b"ascii":  # at least one digit and one blank each
                value_size = count_size = 2
            body_size += count * (values * value_size + (count_size if match["count_type"] else 0))
    if not form or not body_size:
        return None
    return start + body_size - (1 if form == b"ascii" else 0)  # the last line may have no line end


_STL_TEXT = re.compile(
    rb"solid(?:[ \t][^\n<]{0,500})?\r?\n\s*+facet\s++normal(?:\s++[-+.\w]++){3}\s++outer\s++loop"
    rb"(?:\s++vertex(?:\s++[-+.\w]++){3}){3}\s++endloop\s++endfacet\s"
)


def is_stl_text(head: bytes) -> bool:
    """Return whether bytes start with the first facet of an ASCII STL file."""
    return _STL_TEXT.match(head) is not None


def is_stl_binary(head: bytes) -> bool:
    """Return whether bytes look like binary STL: triangles with valid corners, and normals of length one or zero."""
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
