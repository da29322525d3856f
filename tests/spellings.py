"""Spellings of an API key that software on its way may produce."""

import base64
import html
import json
import struct
from collections.abc import Callable
from urllib.parse import quote, quote_plus


def in_json(text: str, times: int = 1) -> str:
    """Return the text as it appears inside a JSON string."""
    for _ in range(times):
        text = json.dumps(text)[1:-1]
    return text


def units(text: str) -> str:
    """Return the text as JSON code units."""
    return "".join(f"\\u{unit:04x}" for (unit,) in struct.iter_unpack(">H", text.encode("utf-16-be")))


def entities(text: str) -> str:
    """Return the text as HTML entities."""
    return "".join(f"&#{ord(char)};" for char in text)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "in a URL": lambda key: quote(key, safe=""),
    "in a URL, in lower case": lambda key: quote(key, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
    "in a URL, every byte": lambda key: "".join(f"%{byte:02X}" for byte in key.encode()),
    "in a URL, twice": lambda key: quote(quote(key, safe=""), safe=""),
    "in a URL, every byte, twice": lambda key: quote("".join(f"%{byte:02x}" for byte in key.encode())),
    "in a URL, three times": lambda key: quote(quote(quote(key, safe=""), safe=""), safe=""),
    "form field": quote_plus,
    "in JSON": in_json,
    "in JSON of PHP": lambda key: in_json(key).replace("/", "\\/"),
    "in JSON as code units": units,
    "JSON in JSON": lambda key: in_json(in_json(key).replace("/", "\\/"), 1),
    "JSON five deep": lambda key: in_json(key, 5),
    "code units in JSON in JSON": lambda key: in_json(units(key), 2),
    "only some code units": lambda key: in_json(key).replace("q", "\\u0071").replace("/", "\\u002F"),
    "HTML": html.escape,
    "HTML, decimal": entities,
    "HTML, with zeros": lambda key: "".join(f"&#000{ord(char)};" for char in key),
    "HTML, hexadecimal": lambda key: "".join(f"&#x{ord(char):04X};" for char in key),
    "HTML, without semicolons": lambda key: "".join(f"&#{ord(char)}" for char in key),
    "HTML, named": lambda key: key.replace("&", "&amp;").replace("/", "&sol;").replace("+", "&plus;"),
    "HTML in HTML": lambda key: html.escape(entities(key)),
    "URL in JSON": lambda key: in_json(quote(key)).replace("/", "\\/"),
    "JSON in a URL": lambda key: quote(in_json(key), safe=""),
    "code units in a URL": lambda key: quote(units(key), safe=""),
    "HTML in a form field": lambda key: quote_plus(html.escape(key)),
    "half escaped": lambda key: quote(key[:9], safe="") + units(key[9:20]) + entities(key[20:]),
    "bytes of Python": lambda key: "".join(f"\\x{byte:02x}" for byte in key.encode()),
    "over two lines": lambda key: f"{key[:7]}\r\n{key[7:]}",
    "over two lines, in JSON": lambda key: in_json(f"{key[:7]}\n{key[7:]}"),
    "hexadecimal": lambda key: key.encode().hex(),
    "hexadecimal, in upper case": lambda key: key.encode().hex().upper(),
    "base64": lambda key: base64.b64encode(key.encode()).decode().rstrip("="),
    "base64 for URLs": lambda key: base64.urlsafe_b64encode(key.encode()).decode().rstrip("="),
    "base64 in a URL": lambda key: quote(base64.b64encode(key.encode()).decode().rstrip("="), safe=""),
    "base64 in JSON of PHP": lambda key: base64.b64encode(key.encode()).decode().rstrip("=").replace("/", "\\/"),
    "base64 of JSON": lambda key: base64.b64encode(in_json(key).encode()).decode().rstrip("="),
    "with zeros, as UTF-16 has them": "\0".join,
}
