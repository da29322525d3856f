r"""Find API keys in bytes, in all encodings, in one pass for any number of keys. Pure.

A key is found as plain text, percent-encoded, as a form field, as JSON escapes (with any number of backslashes), as
HTML entities, with line breaks, as hexadecimal digits and as base64 (both alphabets, any offset). It is also found if
only some of its characters are escaped, or if escapes are escaped again (up to `LEVELS` times).

The bytes are processed in blocks of 4 or 8. A spelling that is long enough always covers a whole block, so one hash
table look-up per block finds every candidate.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from worker.core.redaction.escapes import DecodedBytes, decoded

LEVELS = 6  # levels of nested escapes; normal software writes at most three
MIN_PIECE = 16  # characters of the start or end of a key; shorter pieces reveal little and occur by chance
MIN_DIGITS = 6  # base64 or hexadecimal digits; fewer occur in any text
CHUNK_BYTES = 64 * 1024  # processed at once, which limits the memory
ESCAPE_BYTES = 24  # overlap of chunks per byte of the longest spelling; `\\\\\\\\u0041` has 13

_IGNORED = b"\\\r\n\0"  # backslashes of JSON, line breaks within a key, zeros of UTF-16
_ALIKE = bytes.maketrans(b"+", b" ")  # a blank in a form field
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")


@dataclass(frozen=True, slots=True)
class _Spelling:
    """One spelling of a key. `before` and `after` count base64 digits around it that also contain parts of the key.

    For the start of a key, `remainder` is the part of the key after it. For the end of a key (`backwards`), it is the
    part before it.
    """

    text: bytes
    before: int = 0
    after: int = 0
    remainder: bytes = b""
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class _Table:
    """The spellings by the blocks of `width` bytes in them: per block its offsets and the lengths of the spellings."""

    width: int
    form: Literal["Q", "I"]
    places: dict[int, tuple[tuple[int, int], ...]]
    blocks: frozenset[int]  # the keys of `places`; a set compares faster


class KeyFinder:
    """Finds `keys`. With `pieces` also their starts and ends of at least half their length and `MIN_PIECE`."""

    def __init__(self, keys: Iterable[str], *, pieces: bool) -> None:
        spellings: dict[bytes, list[_Spelling]] = {}
        for key in {key for key in keys if key}:
            for spelling in (*_whole(key), *(_pieces(key) if pieces else ())):
                spellings.setdefault(spelling.text, []).append(spelling)
        self._spellings = {text: tuple(alike) for text, alike in spellings.items() if text}
        lengths = [len(text) for text in self._spellings]
        self._overlap = ESCAPE_BYTES * max(lengths, default=0)
        self._chunk = max(CHUNK_BYTES, 8 * self._overlap)
        self._tables = [
            _table([text for text in self._spellings if len(text) >= 15], 8, "Q"),
            _table([text for text in self._spellings if 7 <= len(text) < 15], 4, "I"),
        ]
        self._short = [text for text in self._spellings if len(text) < 7]

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Return the start and end of each key, in order. Overlapping spans are merged."""
        if not self._spellings:
            return []
        if len(data) <= self._chunk:
            spans = self._in_chunk(data)
        else:
            spans = []
            for start in range(0, len(data), self._chunk):
                chunk = data[start : start + self._chunk + self._overlap]
                spans.extend((start + begin, start + end) for begin, end in self._in_chunk(chunk))
        return _merged(spans)

    def _in_chunk(self, data: bytes) -> list[tuple[int, int]]:
        spans = list[tuple[int, int]]()
        text: bytes | None = data
        for level in range(LEVELS + 1):
            if text is None:
                break
            view = text.translate(_ALIKE, _IGNORED)
            if any(not table.blocks.isdisjoint(_blocks(view, table)) for table in self._tables) or any(
                short in view for short in self._short
            ):
                spans.extend(self._located(data, level))
            text = decoded(text)
        return spans

    def _located(self, data: bytes, level: int) -> list[tuple[int, int]]:
        """Return the spans in the original bytes of the keys that appear after `level` decodings."""
        origin = DecodedBytes.of(data)
        for _ in range(level):
            origin = origin.decoded()
        origin = origin.without(_IGNORED)
        begins, ends = origin.begins, origin.ends
        return [(begins[begin], ends[end - 1]) for begin, end in self._matches(origin.data.translate(_ALIKE))]

    def _matches(self, view: bytes) -> Iterator[tuple[int, int]]:
        spellings = self._spellings
        for table in self._tables:
            places = table.places
            candidates = [(at, block) for at, block in enumerate(_blocks(view, table)) if block in places]
            for number, block in candidates:
                for offset, length in places[block]:
                    begin = number * table.width - offset
                    end = begin + length
                    if begin >= 0 and (text := view[begin:end]) in spellings:
                        for spelling in spellings[text]:
                            yield _extended(view, begin, end, spelling)
        for short in self._short:
            begin = view.find(short)
            while begin >= 0:
                yield begin, begin + len(short)
                begin = view.find(short, begin + len(short))


def _whole(key: str) -> Iterator[_Spelling]:
    raw = key.encode("utf-8", "surrogatepass")
    yield _Spelling(raw.translate(_ALIKE, _IGNORED))
    if len(raw) * 2 >= MIN_DIGITS:
        yield _Spelling(raw.hex().encode())
        yield _Spelling(raw.hex().upper().encode())
    for written in {raw, json.dumps(key)[1:-1].encode(), quote(key, safe="", errors="surrogatepass").encode()}:
        yield from _base64(written)


def _base64(raw: bytes) -> Iterator[_Spelling]:
    """Yield the digits that depend only on `raw`, for each position in a group of three bytes."""
    for shift in range(3):
        digits = base64.b64encode(bytes(shift) + raw).rstrip(b"=")
        shared = 1 if (shift + len(raw)) % 3 else 0  # the last digit contains bits of the next byte
        core = digits[(0, 2, 3)[shift] : len(digits) - shared]
        if len(core) >= MIN_DIGITS:
            for text in {core, core.translate(bytes.maketrans(b"+/", b"-_"))}:
                yield _Spelling(text.translate(_ALIKE), before=1 if shift else 0, after=shared)


def _pieces(key: str) -> Iterator[_Spelling]:
    size = max(MIN_PIECE, (len(key) + 1) // 2)
    if size < len(key):
        whole = key.encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        beginning = key[:size].encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        end = key[-size:].encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        yield _Spelling(beginning, remainder=whole[len(beginning) :])
        yield _Spelling(end, remainder=whole[: -len(end)], backwards=True)


def _table(texts: Iterable[bytes], width: int, form: Literal["Q", "I"]) -> _Table:
    """Return a table with blocks from the end of each text, so that many repeated starts of a key cost little."""
    places: dict[int, set[tuple[int, int]]] = {}
    for text in texts:
        for offset in range(len(text) - 2 * width + 1, len(text) - width + 1):
            block = memoryview(text)[offset : offset + width].cast(form)[0]
            places.setdefault(block, set()).add((offset, len(text)))
    return _Table(width, form, {block: tuple(sorted(where)) for block, where in places.items()}, frozenset(places))


def _blocks(view: bytes, table: _Table) -> memoryview:
    whole = len(view) - len(view) % table.width if table.places else 0
    return memoryview(view)[:whole].cast(table.form)


def _extended(view: bytes, begin: int, end: int, spelling: _Spelling) -> tuple[int, int]:
    remainder = spelling.remainder
    if spelling.backwards:
        begin -= _common_prefix(view[max(0, begin - len(remainder)) : begin][::-1], remainder[::-1])
        while view[begin] & 0xC0 == 0x80:  # don't start within a character
            begin += 1
    elif remainder:
        end += _common_prefix(view[end : end + len(remainder)], remainder)
        while end < len(view) and view[end] & 0xC0 == 0x80:
            end -= 1
    if spelling.before and begin and view[begin - 1] in _BASE64:
        begin -= 1
    if spelling.after and end < len(view) and view[end] in _BASE64:
        end += 1
    return begin, end


def _common_prefix(first: bytes, second: bytes) -> int:
    """Return the length of the common prefix."""
    if first == second:
        return len(first)
    for at, (first_byte, second_byte) in enumerate(zip(first, second, strict=False)):
        if first_byte != second_byte:
            return at
    return min(len(first), len(second))


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
