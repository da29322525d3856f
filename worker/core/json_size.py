"""Bound what a JSON text takes once it is parsed, before it is parsed. Pure.

A value of two bytes (`[]`) becomes an object of 56 bytes and more, so 30 MB of them would take 700 MB.
"""

import re

MAX_VALUES = 100_000  # some 25 MB of objects; 1,000 outputs with all that is said about them are 20,000
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # without an end: up to the end of the text


def too_many_values(text: bytes) -> bool:
    r"""Whether a JSON text has more than `MAX_VALUES` values: each but the first follows a comma or a bracket.

    >>> too_many_values(b"[],"  * 100_000), too_many_values(b'{"prompt": "' + b"a, " * 200_000 + b'"}')
    (True, False)
    """
    if _openings(text, 0, len(text)) <= MAX_VALUES:
        return False
    openings, at = 0, 0
    for number, string in enumerate(_STRING.finditer(text)):  # those within strings are none
        openings += _openings(text, at, string.start())
        at = string.end()
        if openings > MAX_VALUES or number > 2 * MAX_VALUES:  # a value has two strings at most, its name and itself
            return True
    return openings + _openings(text, at, len(text)) > MAX_VALUES


def _openings(text: bytes, begin: int, end: int) -> int:
    return text.count(b",", begin, end) + text.count(b"[", begin, end) + text.count(b"{", begin, end)
