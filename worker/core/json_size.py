"""Limit the memory that a JSON text needs after parsing. This is checked before it is parsed. Pure.

A value of two bytes (`[]`) becomes an object of at least 56 bytes, so 30 MB of them would need 700 MB.
"""

import re

MAX_VALUES = 100_000  # about 25 MB of objects; an answer with 1,000 outputs has about 20,000 values
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # an unterminated string ends with the text


def too_many_values(text: bytes) -> bool:
    r"""Return whether a JSON text has more than `MAX_VALUES` values. Every value follows a comma or a bracket.

    >>> too_many_values(b"[],"  * 100_000), too_many_values(b'{"prompt": "' + b"a, " * 200_000 + b'"}')
    (True, False)
    """
    if _openings(text, 0, len(text)) <= MAX_VALUES:
        return False
    openings, at = 0, 0
    for number, string in enumerate(_STRING.finditer(text)):  # characters inside strings don't count
        openings += _openings(text, at, string.start())
        at = string.end()
        if openings > MAX_VALUES or number > 2 * MAX_VALUES:  # a value has at most two strings: its name and its text
            return True
    return openings + _openings(text, at, len(text)) > MAX_VALUES


def _openings(text: bytes, begin: int, end: int) -> int:
    return text.count(b",", begin, end) + text.count(b"[", begin, end) + text.count(b"{", begin, end)
