"""Prepare URLs for requests: only characters that are invalid in URLs are changed. Pure."""

import re
from contextlib import suppress
from urllib.parse import urlsplit

_ADDRESS = re.compile(r"(?P<site>[A-Za-z][A-Za-z0-9+.-]*+://[^/?#]*+)(?P<target>[^#]*+)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*+:")
# Not allowed by RFC 3986. Control characters and backslashes are not included: the address guard refuses them.
_UNFIT = re.compile(r'[ "<>^`{|}\xa0-\U0010ffff]')


def percent_encoded(url: str) -> str:
    """Return a URL in which blanks, non-ASCII characters (as UTF-8) and the like after the host are percent-encoded.

    Nothing else changes, because signatures of links cover the exact characters. The fragment is removed.

    >>> percent_encoded("https://h//a%2fb c.png?x=&sig=A%2B+é#top")
    'https://h//a%2fb%20c.png?x=&sig=A%2B+%C3%A9'
    """
    parts = _ADDRESS.match(url)
    if parts is None:
        return url
    return parts["site"] + _UNFIT.sub(_percent_encoded, parts["target"])


def split(url: str) -> tuple[str, str]:
    """Return the scheme with host and port of a URL, and its request target.

    >>> split("https://h:443?a=1")
    ('https://h:443', '/?a=1')
    """
    parts = _ADDRESS.match(url)
    if parts is None:
        return url, "/"
    target = parts["target"]
    return parts["site"], target if target.startswith("/") else f"/{target}"


def redirect_target(url: str, location: str) -> str:
    """Return the target of a redirect from `url`. `location` is the header, with its bytes decoded as Latin-1.

    Absolute URLs and absolute paths are used unchanged; only a relative path is resolved. Raises ValueError if the
    target is not a valid URL.

    >>> redirect_target("https://h/a/b?c", "../d//e%2F f"), redirect_target("https://h/a", "//other/x")
    ('https://h/d//e%2F f', 'https://other/x')
    """
    location = location.strip(" ")
    with suppress(UnicodeError):  # servers send UTF-8; anything else stays Latin-1
        location = location.encode("latin-1").decode("utf-8")
    target = _resolved(url, location)
    urlsplit(target)
    return target


def _resolved(url: str, location: str) -> str:
    if _SCHEME.match(location):
        return location
    site, target = split(url)
    if location.startswith("//"):
        return f"{site.partition('//')[0]}{location}"
    if location.startswith("/"):
        return site + location
    path, mark, query = target.partition("?")
    if location.startswith("?"):
        return site + path + location
    if not location or location.startswith("#"):
        return site + path + mark + query
    relative, mark, query = location.partition("?")
    return site + _without_dots(path[: path.rfind("/") + 1] + relative) + mark + query


def _without_dots(path: str) -> str:
    """Resolve dot segments (RFC 3986, section 5.2.4). Empty segments stay."""
    segments: list[str] = []
    parts = path.split("/")[1:]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "..":
            if segments:
                segments.pop()
        elif part != ".":
            segments.append(part)
            continue
        if last:
            segments.append("")
    return "/" + "/".join(segments)


def _percent_encoded(character: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in character[0].encode("utf-8", "surrogatepass"))
