"""Tell dead links from blocked requests, if a download answers with an error. Pure.

Object stores report a dead link with 403, 404 or 410, mostly with XML or JSON. Firewalls, bot checks and proxies answer
with 403 as well, but with an HTML page or special headers. Then the link may still work.
"""

import re
from collections.abc import Mapping

HEAD_BYTES = 4_096  # read from the body; enough for the error of every store

DEAD = frozenset({403, 404, 410})
_DEAD_BY_CODE = frozenset({400, 401})  # only if the XML of a store says that the link has expired
_WALL_HEADERS = (
    "cf-mitigated",  # Cloudflare
    "x-amzn-waf-action",  # Amazon's WAF
    "x-datadome",
    "x-px-blocked",  # PerimeterX
    "x-sucuri-block",
    "x-squid-error",
    "x-bluecoat-via",
    "proxy-authenticate",
)
_WALL_BODY = re.compile(
    rb"error code: 1\d{3}|cloudflare_error|\"error_code\":\s?1\d{3}|captcha-delivery\.com", re.IGNORECASE
)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s{0,200}<(?:!--|(?:!doctype html|html|head|body|title|meta)\b)", re.IGNORECASE)
_STORE_CODE = re.compile(rb"<Code>\s{0,20}([A-Za-z0-9]{1,60})")
_RUN_OUT = frozenset(
    {
        b"AccessDenied",
        b"AuthenticationFailed",
        b"AuthorizationQueryParametersError",
        b"ExpiredToken",
        b"InvalidAccessKeyId",
        b"InvalidToken",
        b"NoSuchBucket",
        b"NoSuchKey",
        b"RequestExpired",
        b"SignatureDoesNotMatch",
        b"TokenRefreshRequired",
    }
)


def is_dead_link(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether an error answer means that the link is dead, and not that the request was blocked.

    The names in `headers` are in lower case. `body` is the start of the body.

    >>> is_dead_link(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
    True
    >>> is_dead_link(403, {"cf-mitigated": "challenge"}, b""), is_dead_link(403, {}, b"<html>Just a moment")
    (False, False)
    """
    if status not in DEAD and status not in _DEAD_BY_CODE:
        return False
    store_error = _STORE_CODE.search(body) if b"<Error" in body else None
    if status in _DEAD_BY_CODE:
        return store_error is not None and store_error[1] in _RUN_OUT
    if status != 403 or store_error is not None:
        return True  # a 404 may have an HTML page
    if any(name in headers for name in _WALL_HEADERS) or _WALL_BODY.search(body):
        return False
    return not (_PAGE.match(body) or headers.get("content-type", "").strip().lower().startswith("text/html"))
