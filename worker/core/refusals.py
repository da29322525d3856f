"""What an answer that is no output says: the link is dead, or something on the way refuses us. Pure.

Stores tell a dead link by 403, 404 and 410, mostly with XML or JSON. A firewall, a bot check or a proxy says 403 too,
with a page for people or with headers of its own: then the link may be as good as ever.
"""

import re
from collections.abc import Mapping

HEAD_BYTES = 4_096  # of the body; enough for the error of any store

DEAD = frozenset({403, 404, 410})
_DEAD_BY_CODE = frozenset({400, 401})  # where a store's XML says that the link has run out
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
    """Return whether an answer says that the link is dead, rather than that something on the way refuses us.

    `headers` finds names in lower case; `body` is the beginning of the body.

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
        return True  # the page of a 404 may come from anybody
    if any(name in headers for name in _WALL_HEADERS) or _WALL_BODY.search(body):
        return False
    return not (_PAGE.match(body) or headers.get("content-type", "").strip().lower().startswith("text/html"))
