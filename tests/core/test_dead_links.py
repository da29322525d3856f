"""Errors of a store mean a dead link; blocked requests say nothing about the link."""

import pytest

from worker.core.dead_links import is_dead_link

XML = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>%s</Code><Message>Request has expired</Message></Error>'
AZURE = b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AuthenticationFailed</Code><Message>Signature</Message></Error>'


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (403, {}, XML % b"AccessDenied"),
        (403, {"server": "cloudflare"}, XML % b"ExpiredToken"),
        (403, {"server": "cloudflare", "cf-mitigated": "x"}, XML % b"SignatureDoesNotMatch"),
        (403, {}, AZURE),
        (403, {}, b""),
        (403, {"content-type": "application/json"}, b'{"error":"InvalidJWT","message":"jwt expired"}'),
        (403, {"content-type": "text/plain"}, b"URL signature expired"),
        (400, {}, XML % b"ExpiredToken"),
        (401, {}, XML % b"AccessDenied"),
        (404, {}, XML % b"NoSuchKey"),
        (404, {"content-type": "text/html"}, b"<html><h1>Not found</h1>"),
        (410, {}, b"<!doctype html>gone"),
    ],
)
def test_errors_of_stores_mean_a_dead_link(status: int, headers: dict[str, str], body: bytes) -> None:
    """XML of S3 and compatible stores, JSON, plain text, or an empty body."""
    assert is_dead_link(status, headers, body)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (403, {"cf-mitigated": "challenge"}, b""),
        (403, {"server": "cloudflare", "content-type": "text/html; charset=UTF-8"}, b"Just a moment..."),
        (403, {}, b"\n <!DOCTYPE html><title>Access denied</title>"),
        (403, {}, b"<!-- squid --><html>"),
        (403, {"content-type": "text/plain"}, b"error code: 1010"),
        (403, {"content-type": "text/plain"}, b"error code: 1020"),
        (403, {"content-type": "application/problem+json"}, b'{"cloudflare_error":true,"error_code":1010}'),
        (403, {"content-type": "application/json"}, b'{"url":"https://geo.captcha-delivery.com/captcha/"}'),
        (403, {"x-squid-error": "ERR_ACCESS_DENIED 0"}, b""),
        (403, {"x-amzn-waf-action": "captcha"}, b""),
        (400, {}, b"<html>bad request"),
        (400, {}, XML % b"InvalidArgument"),
        (407, {}, b"<html>proxy"),
        (429, {}, b""),
        (451, {}, b"<html>"),
        (503, {}, XML % b"SlowDown"),
        (511, {}, b"<html>log in"),
    ],
)
def test_blocked_requests_do_not_mean_a_dead_link(status: int, headers: dict[str, str], body: bytes) -> None:
    """HTML pages, headers of firewalls, and status codes of networks."""
    assert not is_dead_link(status, headers, body)
