"""Mask personal data in API messages for operators: addresses, prompts, numbers and keys of customers. Pure.

All configured secrets are removed before a text is stored. This removes other personal data, only for display. The
stored text is not changed.
"""

import re
from urllib.parse import urlsplit

ADDRESS = "[e-mail]"
NETWORK = "[ip]"
DIGITS = "[digits]"
KEY = "[key?]"
TEXT = '"[text]"'

LONGEST_WORD = 24  # a longer quoted text is masked; a shorter one without blanks is an API name such as "fetch_result"

_LINK = re.compile(r"\b[a-z][a-z0-9+.-]{1,15}://[^\s\"'<>]+", re.IGNORECASE)
_DATA = re.compile(r"\bdata:[\w.+-]*+(?:/[\w.+-]*+)?[;,][^\s\"'<>]*", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
_IPV6 = re.compile(
    r"(?<![\w:])(?:[0-9a-f]{1,4}:){3,7}[0-9a-f]{0,4}(?![\w:])|(?<![\w:])(?=[0-9a-f:]*?::)[0-9a-f:]++(?![\w:])",
    re.I,
)
_PROMPT = re.compile(
    r"""(["']?\b(?=\w*?prompt)\w++["']?\s*+[:=]\s*+)(?:"[^"]*"?|'[^']*'?|[^"',;}\s][^;}]*)""", re.IGNORECASE
)
_QUOTED = re.compile(r"\"([^\"]*)(?:\"|$)|“([^”]*)(?:”|$)|«([^»]*)(?:»|$)|(?<!\w)'([^']*)'(?!\w)")
_KEYLIKE = re.compile(r"(?<![\w+/.-])(?=[\w+/.-]*?\d)(?=[\w+/.-]*?[a-z])[\w+/.-]{20,}+={0,2}", re.IGNORECASE)
_WORD = re.compile(r"[\w.-]*|\[text\]")
_DIGITS = re.compile(
    r"(?<!\d)(?!\d{4}-\d\d-\d\d[ T]\d\d:)\+?\d(?:[ -]?\d){8,}(?!\d)"
)  # dates with a time are not masked


def mask_personal_data(text: str) -> str:
    """Return `text` without personal data. Links are reduced to their host.

    >>> mask_personal_data("mail ann@shop.example, see https://cdn.test/u/ann.png?sig=1 from 10.1.2.3")
    'mail [e-mail], see https://cdn.test/… from [ip]'
    >>> mask_personal_data('failed: prompt "a lake at dawn" of job 12202888 is not allowed, "status" is error')
    'failed: prompt "[text]" of job 12202888 is not allowed, "status" is error'
    >>> mask_personal_data("card 4111 1111 1111 1111, key 8f14e45fceea167a5a36dedd4bea2543, prompt: my own face")
    'card [digits], key [key?], prompt: "[text]"'
    """
    text = _DATA.sub("data:…", text)
    text = _LINK.sub(_host_only, text)
    text = _EMAIL.sub(ADDRESS, text)
    text = _PROMPT.sub(rf"\1{TEXT}", text)
    text = _QUOTED.sub(_unquoted, text)
    text = _KEYLIKE.sub(KEY, text)
    text = _IPV4.sub(NETWORK, text)
    text = _IPV6.sub(NETWORK, text)
    return _DIGITS.sub(DIGITS, text)


def link_host(url: str) -> str:
    """Return only the host of a link, with its port. For inline data return a text that says so.

    >>> link_host("https://ann:pw@cdn.test:8443/u/ann.png?sig=1"), link_host("data:image/png;sha256=00"), link_host("?")
    ('cdn.test:8443', '(in the answer)', '?')
    """
    if url.startswith("data:"):
        return "(in the answer)"
    try:
        parts = urlsplit(url)
        host = parts.hostname or "?"
        return host if parts.port is None else f"[{host}]:{parts.port}" if ":" in host else f"{host}:{parts.port}"
    except ValueError:
        return "?"


def _host_only(link: "re.Match[str]") -> str:
    scheme = link[0].partition("://")[0]
    return f"{scheme}://{link_host(link[0])}/…"


def _unquoted(quoted: "re.Match[str]") -> str:
    inside = next((part for part in quoted.groups() if part is not None), "")
    return quoted[0] if len(inside) <= LONGEST_WORD and _WORD.fullmatch(inside) else TEXT
