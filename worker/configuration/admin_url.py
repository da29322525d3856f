"""The address of the admin page behind a proxy, as `ADMIN_URL` names it: scheme, host and path prefix."""

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

PORTS = {"https": 443, "http": 80}
EXAMPLE = "https://ops.example.com/fetch"
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")  # a name, or an IPv6 address
_HOST_HEADER = re.compile(r"[A-Za-z0-9._:\[\]-]+")
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True, slots=True)
class AdminUrl:
    """The parts of the address. `host` has a port unless it is the usual one; `prefix` is empty or begins with `/`."""

    scheme: str
    host: str
    prefix: str

    @property
    def origin(self) -> str:
        """The origin of the page, as browsers send it."""
        return f"{self.scheme}://{self.host}"

    @property
    def secure(self) -> bool:
        """Whether browsers reach the page by https only."""
        return self.scheme == "https"

    def accepts_host(self, header: str) -> bool:
        """Return whether a Host header names the page."""
        return _HOST_HEADER.fullmatch(header) is not None and _host_of(f"{self.scheme}://{header}") == self.host

    def accepts_origin(self, url: str) -> bool:
        """Return whether an Origin or Referer header is of the page."""
        return url.partition("://")[0].lower() == self.scheme and _host_of(url) == self.host


def parse_admin_url(text: str) -> AdminUrl:
    """Return the parts of an address. Raises ValueError.

    >>> parse_admin_url("https://Ops.Example.com:443/fetch/")
    AdminUrl(scheme='https', host='ops.example.com', prefix='/fetch')
    """
    try:
        parts = urlsplit(text)
        host = _host(parts)
    except ValueError:
        raise ValueError(f"must be an address such as {EXAMPLE}") from None
    prefix = parts.path.rstrip("/")
    if parts.scheme not in PORTS or not _HOST.fullmatch(parts.hostname or ""):
        raise ValueError(f"must be an address such as {EXAMPLE}, with the host as browsers send it")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user name: ADMIN_PASSWORD is the password of the page")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise ValueError("must not contain ? or #")
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/")):
        raise ValueError("must have a path of letters, digits, and the characters - . _ ~ between single slashes")
    return AdminUrl(parts.scheme, host, prefix)


def _host_of(url: str) -> str | None:
    """Return the host of a URL without the usual port, or None for an invalid URL."""
    try:
        parts = urlsplit(url)
        return _host(parts) if "@" not in parts.netloc else None
    except ValueError:
        return None


def _host(parts: SplitResult) -> str:
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return name if parts.port in (None, PORTS.get(parts.scheme)) else f"{name}:{parts.port}"
