"""Web addresses as they go over the line: as they were given, except for what no address may hold. Pure."""

import re
from contextlib import suppress
from urllib.parse import urlsplit

_ADDRESS = re.compile(r"(?P<site>[A-Za-z][A-Za-z0-9+.-]*+://[^/?#]*+)(?P<target>[^#]*+)", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*+:")
# What RFC 3986 has no place for; control characters and backslashes are left as they are, for the guard to refuse.
_UNFIT = re.compile(r'[ "<>^`{|}\xa0-\U0010ffff]')


def percent_encoded(url: str) -> str:
    """Return an address with blanks, characters beyond ASCII (as UTF-8) and the like percent-encoded after its host.

    Nothing else changes: signatures of links are made over their very characters. The fragment is left out.

    >>> percent_encoded("https://h//a%2fb c.png?x=&sig=A%2B+é#top")
    'https://h//a%2fb%20c.png?x=&sig=A%2B+%C3%A9'
    """
    parts = _ADDRESS.match(url)
    if parts is None:
        return url
    return parts["site"] + _UNFIT.sub(_percent_encoded, parts["target"])


def split(url: str) -> tuple[str, str]:
    """Return what an address begins with, down to its host and port, and the rest as a request names it.

    >>> split("https://h:443?a=1")
    ('https://h:443', '/?a=1')
    """
    parts = _ADDRESS.match(url)
    if parts is None:
        return url, "/"
    target = parts["target"]
    return parts["site"], target if target.startswith("/") else f"/{target}"


def redirect_target(url: str, location: str) -> str:
    """Return where a redirect from `url` leads. `location` is the header as it is read: bytes as Latin-1.

    An absolute address is taken as it stands, and so is a path; only a relative path is resolved. Raises ValueError
    for an address that can't be read.

    >>> redirect_target("https://h/a/b?c", "../d//e%2F f"), redirect_target("https://h/a", "//other/x")
    ('https://h/d//e%2F f', 'https://other/x')
    """
    location = location.strip(" ")
    with suppress(UnicodeError):  # UTF-8 is what servers write; what is none stays Latin-1
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
    """Resolve dot segments (RFC 3986, section 5.2.4); empty segments stay."""
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
