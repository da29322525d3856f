"""Transfer one file over HTTP: request a link, follow redirects, continue or restart a broken transfer.

Servers are not trusted: addresses, sizes, times and lengths are all checked.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from http.client import HTTPException

from urllib3.exceptions import HTTPError

from worker.coordination.leases import LeaseLost
from worker.core.dead_links import HEAD_BYTES, is_dead_link
from worker.core.lifecycle import Attempt, BadBody, DeadLink, TransferTrouble, Unfit
from worker.core.media.signatures import is_complete, proves_complete, sniff
from worker.core.media.text import Promise, promised_text
from worker.core.numbers import retry_after_seconds
from worker.core.reply import MAX_URL
from worker.core.urls import percent_encoded, redirect_target
from worker.downloads.content import unpack_body
from worker.downloads.options import DownloadOptions
from worker.net.address_guard import Guard, RefusedTarget
from worker.net.deadlines import TimeLimit
from worker.net.http_answers import StreamedAnswer
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter
from worker.storage.partial_files import Incoming, Source, link_hash

CHUNK_BYTES = 256 * 1024
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
MAX_REDIRECTS = 3
BEYOND_SECONDS = 1.0  # how long to wait for bytes after the declared end of an incomplete file
REFUSAL_SECONDS = 2.0  # how long to read the page of an error response
NO_RANGE = frozenset({206, 400, 405, 416, 501})  # responses to a range request after which the whole file is requested
REDIRECTS = frozenset({301, 302, 303, 307, 308})
SLOWEST_BYTES_PER_SECOND = 1_024
RESTARTS = 6  # per attempt: broken transfers without progress
BREAK_SECONDS = 0.1


class Transfer:
    """Fetches links into partial files. Thread-safe. The shared HTTP connections send no API key and no cookies."""

    def __init__(
        self,
        guard: Guard,
        adapter: PooledAdapter,
        options: DownloadOptions,
        *,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._guard = guard
        self._adapter = adapter
        self._options = options
        self._headers = {"User-Agent": options.user_agent, "Accept": "*/*"}
        self._pause = pause

    def fetch(self, url: str, incoming: Incoming, check_claim: Callable[[], None]) -> Attempt | None:
        """Fetch a link into `incoming`. Return the failure, or None.

        `check_claim` is called before each request. It raises LeaseLost if no request may be sent.
        """
        if len(url) > MAX_URL:
            return Unfit("refused_address", f"the address has more than {MAX_URL} characters")
        link = link_hash(url)
        if incoming.source is not None and incoming.source.link == link and incoming.complete:
            return None  # complete already; the last attempt failed in the storage
        limit = TimeLimit(self._options.timeout, check_claim)
        try:
            with limit:
                return self._transfer(url, link, incoming, limit)
        except LeaseLost:
            incoming.hold = True
            raise
        except RefusedTarget as refused:
            return Unfit("refused_address", str(refused))
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            incoming.hold = True
            cause = f"none within OUTPUT_TIMEOUT, {self._options.timeout:g} s" if limit.expired else describe(error)
            return TransferTrouble("unreachable", f"no answer: {cause}")

    def _transfer(self, url: str, link: str, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        """Transfer a file. Continue or restart a broken transfer while this makes sense."""
        restarts, furthest, last = 0, 0, -1
        while True:
            try:
                return self._request(url, link, incoming, limit)
            except _BrokenTransfer as broken:
                incoming.hold = True
                if broken.slow or limit.expired:
                    return TransferTrouble("unreachable", str(broken))
                if incoming.size == last:  # twice at the same byte: the file is cut there, or its headers are wrong
                    return self._check_cut_file(incoming, broken)
                if not incoming.resumable or incoming.size <= furthest:
                    restarts += 1
                if restarts > RESTARTS:
                    return BadBody("truncated", str(broken), early=True)
                last = incoming.size
                furthest = max(furthest, last)
            self._pause(min(BREAK_SECONDS * 2**restarts, limit.remaining))

    def _request(self, url: str, link: str, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        redirects, listed = 0, url
        while redirects <= MAX_REDIRECTS:
            url = percent_encoded(url)
            self._guard.check_url(url)
            range_headers = _range_headers(incoming, link)
            timeout = (min(CONNECT_SECONDS, limit.remaining), min(READ_SECONDS, limit.remaining))
            with self._adapter.exchange("GET", url, self._headers | range_headers, timeout) as response:
                location = response.headers.get("location")
                if response.status in REDIRECTS and location:
                    try:
                        url = redirect_target(url, location)
                    except ValueError:
                        return TransferTrouble("http_error", f"HTTP {response.status} to a malformed address")
                    redirects += 1
                    continue
                if response.status not in (200, 206):
                    if range_headers and response.status in NO_RANGE:
                        incoming.begin(Source(link))
                        continue
                    incoming.hold = bool(range_headers)
                    return _refusal(response)
                if response.status == 206 and range_headers and not _continues(response, incoming):
                    incoming.begin(Source(link))  # it sends other bytes: request the whole file
                    continue
                if response.status == 200 or not range_headers:
                    if not _from_the_start(response):
                        return TransferTrouble("http_error", "HTTP 206 with another part than the first")
                    text = promised_text((listed, url), response.headers.get("content-type", ""))
                    incoming.begin(_describe_source(response, link, text))
                return self._stream(response, incoming, limit)
        return TransferTrouble("http_error", f"more than {MAX_REDIRECTS} redirects")

    def _stream(self, response: StreamedAnswer, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        """Receive the body of a response. Raises _BrokenTransfer if it ended too early or was too slow."""
        expected_size = None if incoming.source is None else incoming.source.length
        if expected_size is not None and expected_size > self._options.max_bytes:
            return Unfit("too_large", f"{expected_size} bytes, more than OUTPUT_MAX_BYTES")
        slow_seconds = self._options.slow_seconds
        check_at, checked_size = time.monotonic() + slow_seconds, incoming.size
        try:
            while chunk := self._piece(response, incoming):
                if incoming.size + len(chunk) > self._options.max_bytes:
                    return Unfit("too_large", f"more than OUTPUT_MAX_BYTES ({self._options.max_bytes} bytes)")
                if response.status == 206 and expected_size is not None and incoming.size + len(chunk) > expected_size:
                    # The received bytes can't be trusted: start again.
                    incoming.begin(Source(incoming.source.link if incoming.source else ""))
                    raise _BrokenTransfer(f"more bytes than the declared {expected_size}")
                incoming.write(chunk)
                now = time.monotonic()
                if now >= check_at:
                    if incoming.size - checked_size < slow_seconds * SLOWEST_BYTES_PER_SECOND:
                        raise _BrokenTransfer(
                            f"slower than {SLOWEST_BYTES_PER_SECOND} bytes/s, {incoming.size} bytes", slow=True
                        )
                    check_at, checked_size = now + slow_seconds, incoming.size
                if limit.expired:
                    break
        except (HTTPException, OSError) as error:
            if not limit.expired:
                raise _BrokenTransfer(f"the body ended after {incoming.size} bytes: {describe(error)}") from None
        if limit.expired:  # without a declared length, a connection closed at the time limit looks like a normal end
            raise _BrokenTransfer(f"not done within OUTPUT_TIMEOUT, after {incoming.size} bytes", slow=True)
        if expected_size is not None and incoming.size < expected_size:
            raise _BrokenTransfer(f"the body ended after {incoming.size} of {expected_size} bytes")
        return None

    def _piece(self, response: StreamedAnswer, incoming: Incoming) -> bytes:
        """Return the next bytes of a body. If the file is incomplete at its declared end, read further bytes too."""
        chunk = response.read_piece(CHUNK_BYTES)
        if chunk or response.remaining != 0 or response.status != 200 or not incoming.size:
            return chunk
        media = sniff(incoming.head)
        has_coding = incoming.source is not None and incoming.source.coding
        if not has_coding and (media is None or is_complete(media, incoming.head, incoming.tail, incoming.size)):
            return b""
        chunk = response.read_beyond_end(CHUNK_BYTES, BEYOND_SECONDS)
        if chunk:
            incoming.forget_length()
        return chunk

    def _check_cut_file(self, incoming: Incoming, broken: "_BrokenTransfer") -> Attempt | None:
        """Return None if the file format shows that the file is complete although it is shorter than declared."""
        failure = unpack_body(incoming, self._options.max_bytes)
        if failure is not None:
            return failure
        media = sniff(incoming.head)
        if media is None or not proves_complete(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", str(broken), early=True)
        incoming.forget_length()
        return None


class _BrokenTransfer(Exception):
    """The transfer ended too early, or was too slow (`slow`)."""

    def __init__(self, text: str, *, slow: bool = False) -> None:
        super().__init__(text)
        self.slow = slow


def _range_headers(incoming: Incoming, link: str) -> dict[str, str]:
    """Return the headers that request the rest of a file, if its first part came from the same link."""
    source = incoming.source
    if source is None or source.link != link or not source.validator or not incoming.size:
        return {}
    return {"Range": f"bytes={incoming.size}-", "If-Range": source.validator}


def _refusal(response: StreamedAnswer) -> Attempt:
    """Return the meaning of an error response: a dead link or another failure."""
    body = response.read_start(HEAD_BYTES, REFUSAL_SECONDS) if 400 <= response.status < 500 else b""
    if is_dead_link(response.status, response.headers, body):
        return DeadLink(f"HTTP {response.status}")
    on_the_way = ", refused on the way (a page or a check, not the store)" if response.status == 403 else ""
    wait = retry_after_seconds(response.headers.get("retry-after"), time.time())
    return TransferTrouble("http_error", f"HTTP {response.status}{on_the_way}", wait)


def _describe_source(response: StreamedAnswer, link: str, text: Promise) -> Source:
    """Return the source of a complete response: its length, and the validator for a later range request, if any."""
    headers = response.headers
    codings = [name.strip() for name in headers.get("content-encoding", "").lower().split(",")]
    coding = ",".join(name for name in codings if name not in ("", "identity"))
    if coding or response.status == 206 or headers.get("accept-ranges", "bytes").lower() == "none":
        return Source(link, "", response.remaining, coding[:100], text)
    return Source(link, _validator(headers), response.remaining, text=text)


def _from_the_start(response: StreamedAnswer) -> bool:
    """Return whether a response to a request without a range begins at the first byte. Its status may be 206."""
    return response.status == 200 or not re.match(r"bytes [1-9]", response.headers.get("content-range", ""))


def _validator(headers: Mapping[str, str]) -> str:
    """Return a strong entity tag, or else the Last-Modified date if it is a strong validator.

    The date is strong if it is at least a second before the response's date (RFC 9110, 8.8.2.2).
    """
    tag = headers.get("etag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]{0,200}"', tag):
        return tag
    with suppress(TypeError, ValueError, OverflowError):
        changed = parsedate_to_datetime(headers.get("last-modified", ""))
        if (parsedate_to_datetime(headers.get("date", "")) - changed).total_seconds() >= 1:
            return _http_date(changed)
    return ""


def _http_date(moment: datetime) -> str:
    return format_datetime(moment.astimezone(UTC), usegmt=True)


def _other_version(headers: Mapping[str, str], validator: str) -> bool:
    """Return whether a response has another version of the file. Some servers ignore If-Range."""
    if validator.startswith('"'):
        return headers.get("etag", validator) != validator
    with suppress(TypeError, ValueError, OverflowError):
        return _http_date(parsedate_to_datetime(headers.get("last-modified", validator))) != validator
    return False


def _continues(response: StreamedAnswer, incoming: Incoming) -> bool:
    """Return whether a partial response is exactly the rest of the received file."""
    source = incoming.source
    span = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("content-range", ""))
    if source is None or span is None or response.headers.get("content-encoding", "identity").lower() != "identity":
        return False
    if _other_version(response.headers, source.validator):
        return False
    return int(span[1]) == incoming.size and source.length is not None and span[3] in (str(source.length), "*")
