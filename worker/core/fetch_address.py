"""Where the API key may be sent: the rules for remote ids, hosts and fetch paths."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from worker.errors import NotTrackable, RefusedAddress

REMOTE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
SYNTHETIC_ID = re.compile(r"sha256:[0-9a-f]{32}")
ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

VENDOR_HOSTS = frozenset({"stablediffusionapi.com", "modelslab.com"})
MAX_ADDRESS = 500
MAX_ID_BITS = 512  # more than 128 digits have; Python refuses to print much longer numbers

# No userinfo, query, fragment, dot segment or percent sign can get through: none of their characters is in the set.
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[A-Za-z0-9_-]+)+)",
    re.ASCII,
)
_FETCH_PATH = re.compile(r"(?P<base>/api/v[0-9]+(?:/[A-Za-z0-9_-]+)*?/fetch)(?:/(?P<id>[A-Za-z0-9_-]+))?")
_TRAINING_PATH = re.compile(r"(?P<base>/api/v3/fine_tune_status)/(?P<id>[A-Za-z0-9_-]+)")
_ROOT = re.compile(r"https?://[^/]*")
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]")
_FAMILY = re.compile(r"[^/]*//[^/]*/api/v[0-9]+/(?P<family>.*?)/?fetch")


class FetchAddress(NamedTuple):
    """One job's own place to ask: `url` is posted to, `base` is `url` without the id and names the job's family.

    A tuple, since one is made for every single request.
    """

    url: str
    base: str
    host: str

    @property
    def id_in_body(self) -> bool:
        """Whether the family takes the id as `request_id` in the body, because the path does not carry it.

        >>> FetchAddress("https://h/api/v4/x/fetch", "https://h/api/v4/x/fetch", "h").id_in_body
        True
        """
        return self.url == self.base


@dataclass(frozen=True, slots=True)
class AllowedApi:
    """The API as configured: `url` is its base address, `hosts` the hosts that a job's own address may name."""

    url: str
    hosts: Collection[str]


def checked_remote_id(value: object) -> str:
    """The remote id as text. Raises NotTrackable for anything that can't be one.

    >>> checked_remote_id(12202888)
    '12202888'
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise NotTrackable(f"a remote id is text or a whole number, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > MAX_ID_BITS:
        raise NotTrackable(f"a number of {value.bit_length()} bits can't be a remote id")
    text = value.strip() if isinstance(value, str) else f"{value:d}"
    if not REMOTE_ID.fullmatch(text):
        raise NotTrackable(
            f"{text[:60]!r} can't be a remote id: letters, digits, '-' and '_', at most 128, no '-' or '_' first"
        )
    return text


def normal_host(host: str, port: str | None, scheme: str) -> str:
    """`host` or `host:port` in lower case, the scheme's own port left out.

    >>> normal_host("ModelsLab.com", "443", "https")
    'modelslab.com'
    """
    own_port = {"https": "443", "http": "80"}[scheme]
    name = host.lower()
    return name if port in (None, own_port) else f"{name}:{port}"


def api_host(url: str) -> str:
    """The host of the API's base address, as `normal_host` writes it. Raises RefusedAddress for a malformed one."""
    return _api_site(url)[1]


@lru_cache(maxsize=64)
def _api_site(url: str) -> tuple[str, str]:
    """Scheme and host of the API's base address, and the host alone, both in their normal form."""
    match = _ADDRESS.fullmatch(url) or _ADDRESS.fullmatch(url + "/x")
    if match is None:
        raise RefusedAddress(f"{url[:120]!r} is no plain address (scheme, host, port, path; nothing else)")
    _check_scheme(match, url)
    host = normal_host(match["host"], match["port"], match["scheme"])
    return f"{match['scheme']}://{host}", host


def fetch_address(fetch_url: str | None, remote_id: str, api: AllowedApi) -> FetchAddress:
    """Where to ask about `remote_id`: the job's own address where it has one, else the API's base and the id.

    Raises RefusedAddress where the address breaks a rule; the message says which.
    """
    if not (REMOTE_ID.fullmatch(remote_id) or SYNTHETIC_ID.fullmatch(remote_id)):
        raise RefusedAddress(f"{remote_id[:60]!r} can't be a remote id, so it gets no fetch address")
    own_url = api.url.rstrip("/")
    own_site, own_host = _api_site(own_url)
    configured = f"{own_site}{_ROOT.sub('', own_url, count=1)}/fetch"
    if not fetch_url:
        return FetchAddress(f"{configured}/{remote_id}", configured, own_host)
    match = _ADDRESS.fullmatch(fetch_url)
    if match is None or len(fetch_url) > MAX_ADDRESS:
        raise RefusedAddress(
            f"the fetch address {fetch_url[:120]!r} is refused: only scheme, host, port and a plain path may be in it"
        )
    _check_scheme(match, fetch_url)
    host = normal_host(match["host"], match["port"], match["scheme"])
    if host not in api.hosts:
        raise RefusedAddress(
            f"the fetch host {host!r} is refused: it is not on SD_API_HOSTS ({', '.join(sorted(api.hosts))})"
        )
    site = f"{match['scheme']}://{host}"
    if f"{site}{match['path']}" == f"{configured}/{remote_id}":
        return FetchAddress(f"{configured}/{remote_id}", configured, host)
    path = _FETCH_PATH.fullmatch(match["path"]) or _TRAINING_PATH.fullmatch(match["path"])
    if path is None:
        raise RefusedAddress(f"the fetch address {fetch_url[:120]!r} is refused: {match['path']!r} is no fetch path")
    if path["id"] is not None and path["id"] != remote_id:
        raise RefusedAddress(f"the fetch address is refused: it names the id {path['id']!r}, the job is {remote_id!r}")
    base = f"{site}{path['base']}"
    return FetchAddress(base if path["id"] is None else f"{base}/{remote_id}", base, host)


def family(address: FetchAddress) -> str:
    """The kind that a fetch address stands for where nobody named one.

    >>> family(FetchAddress("https://h/api/v6/video/fetch/1", "https://h/api/v6/video/fetch", "h"))
    'video'
    """
    return _family(address.base)


@lru_cache(maxsize=256)
def _family(base: str) -> str:
    if base.endswith("/fine_tune_status"):
        return "training"
    match = _FAMILY.match(base)
    name = match["family"].rstrip("/").replace("/", "-") if match else ""
    return name[:64] or "image"


def is_training(address_base: str) -> bool:
    """Whether the answers of this address follow the training pages, where `success` does not mean done."""
    return address_base.endswith("/fine_tune_status")


def _check_scheme(match: re.Match[str], url: str) -> None:
    if match["port"] is not None and not 0 < int(match["port"]) < 65536:
        raise RefusedAddress(f"{url[:120]!r} is refused: {match['port']} is no port")
    if match["scheme"] == "http" and not _LOOPBACK.fullmatch(match["host"].lower()):
        raise RefusedAddress(
            f"{url[:120]!r} is refused: plain http only to 127.0.0.0/8, [::1] and localhost, else https"
        )
