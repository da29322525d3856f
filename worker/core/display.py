"""Make external text safe to display: without control characters, text direction marks and invisible characters. Pure.

This is for terminals, pages and log lines only. Stored text and JSON documents are not changed.
"""

import re

_BLANK = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)  # control characters and line breaks
_HIDDEN = (
    *(0xAD, 0x180E, 0x200B, 0xFEFF),  # soft hyphen, zero-width blanks
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2070)),  # direction, word joiners
    *range(0xFFF9, 0xFFFC),  # annotations
    *range(0xE0000, 0xE0080),  # tags: a second, invisible ASCII
)
_SHOWN = dict.fromkeys(_BLANK, " ") | dict.fromkeys(_HIDDEN, None)
_SHOWN_LINES = {code: shown for code, shown in _SHOWN.items() if code not in (0x0A, 0x09)}
_ESCAPED = {code: f"\\u{code:04x}" for code in (*_BLANK, *_HIDDEN) if 0x7F <= code < 0x10000} | {
    code: "".join(f"\\u{unit:04x}" for unit in (0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code & 0x3FF)))
    for code in _HIDDEN
    if code >= 0x10000
}
# Joiners are needed in emoji and in Persian and Indic words. Next to an ASCII character they are only invisible.
_JOINER = re.compile("(?<![^\\x00-\\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\\x00-\\x7f\u200c\u200d])")


def display_text(text: str) -> str:
    r"""Return `text` as one line. Control characters become blanks, and invisible characters are removed.

    >>> display_text("a\x1b[31mb\r\nc \u202eevil\u2066\u200b \ud800")
    'a [31mb  c evil ?'
    >>> display_text("pay\u200dpal \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u0631")
    'paypal 👨\u200d👩 می\u200cر'
    """
    return _plain(text, _SHOWN)


def display_lines(text: str) -> str:
    r"""Do the same as `display_text`, but keep line breaks and tabs.

    >>> display_lines("a\n\tb\x1b]8;;\x07\u202e")
    'a\n\tb ]8;; '
    """
    return _plain(text, _SHOWN_LINES)


def display_json(document: str) -> str:
    r"""Escape the characters that `display_text` removes in a JSON text. The data stays the same.

    >>> display_json('{"a": "\u202e\u2028b"}')
    '{"a": "\\u202e\\u2028b"}'
    """
    return document if document.isascii() else document.translate(_ESCAPED)


def _plain(text: str, table: dict[int, str | None]) -> str:
    if text.isascii() and text.isprintable():
        return text
    return _JOINER.sub("", text.encode("utf-8", "replace").decode().translate(table))
