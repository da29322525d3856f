"""Fetch URLs: the URL of each job, and the rules for the hosts and paths to which the API key may be sent."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from worker.core.identity import REMOTE_ID, SYNTHETIC_ID, FetchAddress
from worker.errors import NotTrackable, RefusedAddress
from worker.vendor.families import CHAT, OTHER_FETCH_PATHS, TRAINING, ApiFamily, family_of_order, fetch_style, id_field

VENDOR_HOSTS = frozenset({"stablediffusionapi.com", "modelslab.com"})
MAX_ADDRESS = 500

# This excludes userinfo, query, fragment, dot segments and percent signs: the pattern has none of their characters.
_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[A-Za-z0-9_-]+)+)",
    re.ASCII,
)
_FETCH_PATH = re.compile(
    rf"(?P<base>/api/v[0-9]+(?:/[A-Za-z0-9_-]+)*?/fetch|{OTHER_FETCH_PATHS})(?:/(?P<id>[A-Za-z0-9_-]+))?"
)
_ROOT = re.compile(r"https?://[^/]*")
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]")
_ORDER_PATH = re.compile(r"(?:api/)?(?P<path>v[0-9]{1,3}(?:/[A-Za-z0-9_.-]{1,100}){1,10})", re.IGNORECASE)
_SLASHES = re.compile(r"/+")
_BELOW_API = re.compile(r"/api/v[0-9]{1,3}/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AllowedApi:
    """The configured API: `url` is its base URL, `hosts` are the hosts that the fetch URL of a job may have."""

    url: str
    hosts: Collection[str]


class Call(NamedTuple):
    """How to fetch a job: the HTTP method, and the name of the id in the body. None if the id is in the URL."""

    method: str
    id_field: str | None


def call_for(address: FetchAddress) -> Call:
    """Return the method and the id field for a fetch URL.

    >>> chats = "https://modelslab.com/api/v6/llm/get_queued_response"
    >>> call_for(FetchAddress(chats, chats, "modelslab.com"))
    Call(method='POST', id_field='chat_id')
    """
    return _call(address.base, address.id_in_body)


@lru_cache(maxsize=1_024)
def _call(base: str, id_in_body: bool) -> Call:
    if id_in_body:
        return Call("POST", id_field(path_of(base)))
    return Call("GET" if fetch_style(path_of(base)) == "get" else "POST", None)


@lru_cache(maxsize=1_024)
def path_of(url: str) -> str:
    """Return the path of a URL.

    >>> path_of("https://modelslab.com/api/v3/fetch")
    '/api/v3/fetch'
    """
    return _ROOT.sub("", url, count=1)


def site_of(api: AllowedApi) -> str:
    """Return scheme and host of the configured API."""
    return _api_site(api.url.rstrip("/"))[0]


def normal_host(host: str, port: str | None, scheme: str) -> str:
    """Return `host` or `host:port` in lower case. The default port of the scheme is left out.

    >>> normal_host("ModelsLab.com", "443", "https")
    'modelslab.com'
    """
    own_port = {"https": "443", "http": "80"}[scheme]
    name = host.lower()
    return name if port in (None, own_port) else f"{name}:{port}"


def api_host(url: str) -> str:
    """Return the host of the API's base URL, in the form of `normal_host`. Raises RefusedAddress if it is malformed."""
    return _api_site(url)[1]


@lru_cache(maxsize=64)
def _api_site(url: str) -> tuple[str, str]:
    """Return scheme and host of the API's base URL, and the host alone, both normalised."""
    match = _ADDRESS.fullmatch(url) or _ADDRESS.fullmatch(url + "/x")
    if match is None:
        raise RefusedAddress(f"{url[:120]!r} is not a plain URL (only scheme, host, port and path are allowed)")
    _check_scheme(match, url)
    host = normal_host(match["host"], match["port"], match["scheme"])
    return f"{match['scheme']}://{host}", host


def fetch_address(fetch_url: str | None, remote_id: str, api: AllowedApi) -> FetchAddress:
    """Return where to fetch `remote_id`: the job's own `fetch_url` if it has one, else the API's base URL with the id.

    Raises RefusedAddress if the URL breaks a rule. The message names the rule.
    """
    if not (REMOTE_ID.fullmatch(remote_id) or SYNTHETIC_ID.fullmatch(remote_id)):
        raise RefusedAddress(f"{remote_id[:60]!r} is not a valid remote id, so it has no fetch URL")
    own_url = api.url.rstrip("/")
    own_site, own_host = _api_site(own_url)
    configured = f"{own_site}{path_of(own_url)}/fetch"
    if not fetch_url:
        return FetchAddress(f"{configured}/{remote_id}", configured, own_host)
    match = _ADDRESS.fullmatch(fetch_url)
    if match is None or len(fetch_url) > MAX_ADDRESS:
        raise RefusedAddress(
            f"the fetch URL {fetch_url[:120]!r} is refused: only scheme, host, port and a plain path are allowed"
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
    path = _FETCH_PATH.fullmatch(match["path"])
    if path is None or not _fits_its_id(path["base"], path["id"]):
        raise RefusedAddress(f"the fetch URL {fetch_url[:120]!r} is refused: {match['path']!r} is not a fetch path")
    if path["id"] is not None and path["id"] != remote_id:
        raise RefusedAddress(f"the fetch URL is refused: it has the id {path['id']!r}, the job has {remote_id!r}")
    base = f"{site}{path['base']}"
    return FetchAddress(base if path["id"] is None else f"{base}/{remote_id}", base, host)


def _fits_its_id(fetch_path: str, remote_id: str | None) -> bool:
    """Return whether a fetch path may have this id at its end, or no id."""
    if remote_id is not None:
        return fetch_path != CHAT
    return fetch_path != TRAINING and fetch_style(fetch_path) != "get"


class NamedJob(NamedTuple):
    """The parts of a `fetch_result`: the id at its end, and the URL without the id."""

    remote_id: str
    base: str


def named_job(fetch_result: str) -> NamedJob | None:
    """Return the id at the end of a fetch URL, and the URL without it. None if there is no id or no fetch path.

    >>> named_job("https://modelslab.com/api/v7/video-fusion/fetch/155").remote_id
    '155'
    """
    match = _ADDRESS.fullmatch(fetch_result)
    path = None if match is None else _FETCH_PATH.fullmatch(match["path"])
    if path is None or path["id"] is None:
        return None
    return NamedJob(path["id"], fetch_result.removesuffix(f"/{path['id']}"))


class Order(NamedTuple):
    """Where an order was posted: its family, and the site (scheme and host) at which its job is fetched."""

    family: ApiFamily
    site: str

    def fetch_url(self, remote_id: str) -> str:
        """Return the fetch URL of the job."""
        base = f"{self.site}/api/{self.family.fetch}"
        return f"{base}/{remote_id}" if self.family.fetch_style in ("path", "get") else base


def order_at(endpoint: object, api: AllowedApi) -> Order:
    """Return the order that was posted to `endpoint`: a URL, or a path below `/api/`, such as `v6/video/text2video`.

    Raises NotTrackable if it is neither, and RefusedAddress if the host is not on SD_API_HOSTS.
    """
    return order_and_path(endpoint, api)[0]


def order_and_path(endpoint: object, api: AllowedApi) -> tuple[Order, str]:
    """Return the order of `order_at`, and the path below `/api/` as the caller wrote it, without double slashes.

    Raises the same errors as `order_at`.
    """
    if not isinstance(endpoint, str):
        raise NotTrackable(f"endpoint is the URL or path that the order was posted to, not {type(endpoint).__name__}")
    text = endpoint.strip()
    site, path = site_of(api), re.split("[?#]", text, maxsplit=1)[0]
    first_part = path.partition("/")[0].lower()
    if "://" not in text and first_part in api.hosts:
        text = f"{site.partition('://')[0] if first_part == api_host(api.url) else 'https'}://{text}"
    if "://" in text:
        parts = _split(text)
        if parts is None:
            raise NotTrackable(f"endpoint {text[:120]!r} is not a URL")
        own_site, host = _api_site(f"{parts.scheme}://{parts.netloc}/x")
        if host not in api.hosts:
            raise RefusedAddress(
                f"the host {host!r} of the endpoint is refused: it is not on SD_API_HOSTS"
                f" ({', '.join(sorted(api.hosts))})"
            )
        site, path = own_site, parts.path
    match = _ORDER_PATH.fullmatch(_SLASHES.sub("/", path[:MAX_ADDRESS]).strip("/"))
    is_plain = match is not None and all(part.strip(".") for part in match["path"].split("/"))
    family = family_of_order(match["path"]) if match is not None and is_plain else None
    if match is None or family is None:
        raise NotTrackable(
            f"endpoint {text[:120]!r} is not a path of the API: use a path such as v6/video/text2video, or the full URL"
        )
    return Order(family, site), match["path"]


def order_of_response(url: object, api: AllowedApi) -> Order | None:
    """Return the order to which a response from `url` belongs, or None if the URL does not tell.

    A response may come through a gateway of the app. So a host that is not on SD_API_HOSTS is not an error; only the
    path is used then.
    """
    parts = _split(str(url))
    if parts is None:
        return None
    try:
        return order_at(f"{parts.scheme}://{parts.netloc}{parts.path}", api)
    except NotTrackable:
        pass
    below = list(_BELOW_API.finditer(parts.path))
    try:
        return order_at(parts.path[below[-1].start() :], api) if below else None
    except NotTrackable:
        return None


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url[:2_000])
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.netloc else None


def _check_scheme(match: re.Match[str], url: str) -> None:
    if match["port"] is not None and not 0 < int(match["port"]) < 65536:
        raise RefusedAddress(f"{url[:120]!r} is refused: {match['port']} is not a port")
    if match["scheme"] == "http" and not _LOOPBACK.fullmatch(match["host"].lower()):
        raise RefusedAddress(
            f"{url[:120]!r} is refused: use https; plain http is allowed only for 127.0.0.0/8, [::1] and localhost"
        )
