r"""Find API keys in bytes, in all spellings, in one pass whatever the bytes and however many keys. Pure.

A key is found plain, percent-encoded, as a form field, as JSON escapes (with any number of backslashes), as HTML
entities, wrapped over lines, as hexadecimal digits and as base64 (either alphabet, any offset), also where some of its
characters are escaped and some are not, and where escapes are escaped again (`LEVELS` times).

The bytes are looked at in blocks of 4 or 8. A spelling that is long enough covers a whole block wherever it begins, so
one look into a hash table per block finds every candidate.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from worker.core.redaction.escapes import DecodedBytes, decoded

LEVELS = 6  # escapes of escapes; software that is honest writes three at most
LEAST_PIECE = 16  # characters of a key's beginning or end; a shorter one says little, and may be there by chance
LEAST_DIGITS = 6  # of a key as base64 or hexadecimal; fewer are in any text
CHUNK_BYTES = 64 * 1024  # looked at together: bounds the memory
ESCAPE_BYTES = 24  # overlap of chunks for each byte of the longest spelling; `\\\\\\\\u0041` has 13

_IGNORED = b"\\\r\n\0"  # the backslashes of JSON, line breaks within a key, the zeros of UTF-16
_ALIKE = bytes.maketrans(b"+", b" ")  # the blank of a form field
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")


@dataclass(frozen=True, slots=True)
class _Spelling:
    """One spelling of a key. `before` and `after`: base64 digits around it that hold a part of the key, too.

    Of a beginning `rest` is what follows in the key, of an end what stands before it (`backwards`).
    """

    text: bytes
    before: int = 0
    after: int = 0
    rest: bytes = b""
    backwards: bool = False


@dataclass(frozen=True, slots=True)
class _Table:
    """The spellings that cover a block of `width` bytes: for each block its offset in them, and their lengths."""

    width: int
    form: Literal["Q", "I"]
    places: dict[int, tuple[tuple[int, int], ...]]
    blocks: frozenset[int]  # of `places`; a set compares faster


class KeyFinder:
    """Finds `keys`. With `pieces` also their beginnings and ends of at least half their length and `LEAST_PIECE`."""

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
        """Where the keys are, from and to, in order; those that overlap are one."""
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
        """The spans in the original of what the text has after `level` decodings."""
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
    if len(raw) * 2 >= LEAST_DIGITS:
        yield _Spelling(raw.hex().encode())
        yield _Spelling(raw.hex().upper().encode())
    for written in {raw, json.dumps(key)[1:-1].encode(), quote(key, safe="", errors="surrogatepass").encode()}:
        yield from _base64(written)


def _base64(raw: bytes) -> Iterator[_Spelling]:
    """The digits that depend on `raw` alone, for each place it may have in a group of three bytes."""
    for shift in range(3):
        digits = base64.b64encode(bytes(shift) + raw).rstrip(b"=")
        shared = 1 if (shift + len(raw)) % 3 else 0  # the last digit has bits of what follows
        core = digits[(0, 2, 3)[shift] : len(digits) - shared]
        if len(core) >= LEAST_DIGITS:
            for text in {core, core.translate(bytes.maketrans(b"+/", b"-_"))}:
                yield _Spelling(text.translate(_ALIKE), before=1 if shift else 0, after=shared)


def _pieces(key: str) -> Iterator[_Spelling]:
    size = max(LEAST_PIECE, (len(key) + 1) // 2)
    if size < len(key):
        whole = key.encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        beginning = key[:size].encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        end = key[-size:].encode("utf-8", "surrogatepass").translate(_ALIKE, _IGNORED)
        yield _Spelling(beginning, rest=whole[len(beginning) :])
        yield _Spelling(end, rest=whole[: -len(end)], backwards=True)


def _table(texts: Iterable[bytes], width: int, form: Literal["Q", "I"]) -> _Table:
    """Blocks from the end of each text: floods of the beginning of a key are no candidates."""
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
    rest = spelling.rest
    if spelling.backwards:
        begin -= _alike(view[max(0, begin - len(rest)) : begin][::-1], rest[::-1])
        while view[begin] & 0xC0 == 0x80:  # never from within a character
            begin += 1
    elif rest:
        end += _alike(view[end : end + len(rest)], rest)
        while end < len(view) and view[end] & 0xC0 == 0x80:
            end -= 1
    if spelling.before and begin and view[begin - 1] in _BASE64:
        begin -= 1
    if spelling.after and end < len(view) and view[end] in _BASE64:
        end += 1
    return begin, end


def _alike(text: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    if text == other:
        return len(text)
    for at, (left, right) in enumerate(zip(text, other, strict=False)):
        if left != right:
            return at
    return min(len(text), len(other))


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
