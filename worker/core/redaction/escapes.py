r"""Decode the escapes of URLs, JSON, HTML and Python in bytes, and keep the original position of each byte. Pure.

The patterns can't backtrack, so the time depends only on the length of the text.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.entities import html5
from itertools import compress

_HEX = "[0-9A-Fa-f]"
_NAMES = "|".join(sorted({name.rstrip(";") for name, char in html5.items() if char.isascii()}, reverse=True))
_RUN = r"\\(?<!\\\\)\\*+"  # a run of backslashes, matched only at its first one
_PERCENT = f"%{_HEX}{{2}}"
_UNIT = f"u{_HEX}{{4}}"
_PAIR = rf"u[dD][89abAB]{_HEX}{{2}}\\++u[dD][c-fC-F]{_HEX}{{2}}"
_BYTE = f"x{_HEX}{{2}}"
_ENTITY = f"&(?:#(?:0*+[1-9][0-9]{{0,6}}|[xX]0*+[1-9A-Fa-f]{_HEX}{{0,5}})|(?=[A-Za-z])(?:{_NAMES}));?"
# Each alternative starts with a literal, so that `re` can skip other text fast.
_RUNS = re.compile(
    f"({_PERCENT}(?:{_PERCENT})*+|{_ENTITY}(?:{_ENTITY})*+"
    f"|{_RUN}(?:{_UNIT}(?:{_RUN}{_UNIT})*+|{_BYTE}(?:{_RUN}{_BYTE})*+|[rn]))".encode()
)
_SINGLE = re.compile(f"({_PERCENT}|{_ENTITY}|{_RUN}(?:{_PAIR}|{_UNIT}|{_BYTE}|[rn]))".encode())


@dataclass(frozen=True, slots=True)
class DecodedBytes:
    """Decoded bytes with their origin: byte `i` comes from the bytes `begins[i]` to `ends[i]` of the original."""

    data: bytes
    begins: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, data: bytes) -> "DecodedBytes":
        """Return the original bytes without decoding."""
        return cls(data, range(len(data)), range(1, len(data) + 1))

    def decoded(self) -> "DecodedBytes":
        """Decode one level of escapes, like the function `decoded`."""
        parts, begins, ends = [], list[int](), list[int]()
        at = 0
        for number, part in enumerate(_SINGLE.split(self.data)):
            until = at + len(part)
            if number % 2:
                part = _MEANINGS[part]
                begins += [self.begins[at]] * len(part)
                ends += [self.ends[until - 1]] * len(part)
            else:
                begins += self.begins[at:until]
                ends += self.ends[at:until]
            parts.append(part)
            at = until
        return DecodedBytes(b"".join(parts), begins, ends)

    def without(self, ignored: bytes) -> "DecodedBytes":
        """Remove the bytes in `ignored`."""
        data = self.data.translate(None, ignored)
        if len(data) == len(self.data):
            return self
        keep = self.data.translate(bytes(byte not in ignored for byte in range(256)))
        return DecodedBytes(data, list(compress(self.begins, keep)), list(compress(self.ends, keep)))


def decoded(data: bytes) -> bytes | None:
    r"""Decode one level of escapes. Return None if there is none.

    >>> decoded(b"a%2Fb \\u0041\\\\u00e9 &#65;&#x42;&amp;lt; C:\\path")
    b'a/b A\xc3\xa9 AB&lt; C:\\path'
    >>> decoded(b"100 % & more") is None
    True
    """
    parts = _RUNS.split(data)
    if len(parts) == 1:
        return None
    parts[1::2] = map(_MEANINGS.__getitem__, parts[1::2])
    return b"".join(parts)


class _Meanings(dict[bytes, bytes]):
    """A cache of decoded runs of escapes: at most `max_entries` runs of at most `max_length` bytes."""

    def __init__(self, meaning: Callable[[bytes], bytes], *, max_length: int, max_entries: int) -> None:
        super().__init__()
        self._meaning, self._max_length, self._max_entries = meaning, max_length, max_entries

    def __missing__(self, escape: bytes) -> bytes:
        meaning = self._meaning(escape)
        if len(escape) <= self._max_length and len(self) < self._max_entries:
            self[escape] = meaning
        return meaning


def _of_entity(name: bytes) -> bytes:
    return html.unescape(f"&{name.decode()}").encode("utf-8", "surrogatepass")


_ENTITIES = _Meanings(_of_entity, max_length=16, max_entries=4_096)


def _of_run(run: bytes) -> bytes:
    if run.startswith(b"%"):
        return bytes.fromhex(run.translate(None, b"%").decode())
    if run.startswith(b"&"):
        return b"".join(map(_ENTITIES.__getitem__, run.split(b"&")[1:]))
    digits = run.translate(None, b"\\")
    if digits.startswith(b"u"):
        units = bytes.fromhex(digits.translate(None, b"u").decode())
        return units.decode("utf-16-be", "surrogatepass").encode("utf-8", "surrogatepass")
    return bytes.fromhex(digits.translate(None, b"x").decode()) if digits.startswith(b"x") else b""


_MEANINGS = _Meanings(_of_run, max_length=16, max_entries=4_096)
