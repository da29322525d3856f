"""Download one output: claim it, stream it to a partial file, check it, store it, record the result.

Servers are not trusted: addresses, sizes, times, lengths and content are all checked.
"""

import logging
import re
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from functools import partial
from http.client import HTTPException
from urllib.parse import urlsplit

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from urllib3.exceptions import HTTPError

from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.dead_links import HEAD_BYTES, is_dead_link
from worker.core.lifecycle import (
    Attempt,
    BadBody,
    DeadLink,
    GiveUp,
    StoredFile,
    TransferTrouble,
    TryAgain,
    Unfit,
    address_index,
    after_attempt,
)
from worker.core.media.base64_text import Base64Decoder, base64_start
from worker.core.media.signatures import Media, is_complete, is_text, pixel_count, proves_complete, sniff
from worker.core.media.text import NotPromisedText, Promise, promised_text, text_media
from worker.core.numbers import retry_after_seconds
from worker.core.plain_text import plain_text
from worker.core.reply import MAX_URL
from worker.core.urls import percent_encoded, redirect_target
from worker.downloads.content_coding import TooLarge, detect_coding, unpack
from worker.downloads.progress import ReceivedBytes
from worker.errors import StorageTrouble
from worker.net.address_guard import Guard, RefusedTarget
from worker.net.deadlines import TimeLimit
from worker.net.http_answers import StreamedAnswer
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter
from worker.storage.base import Storage
from worker.storage.partial_files import Incoming, Source, link_hash
from worker.store.claims import ClaimedOutput, claim_output, release_claimed_outputs, release_output
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error, transact
from worker.store.results import record_attempt
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
CONNECT_SECONDS = 10.0
MAX_REDIRECTS = 3
BEYOND_SECONDS = 1.0  # how long to wait for bytes after the declared end of an incomplete file
REFUSAL_SECONDS = 2.0  # how long to read the page of an error response
MAX_CODINGS = 3  # nested content codings of one body
NO_RANGE = frozenset({206, 400, 405, 416, 501})  # responses to a range request after which the whole file is requested
REDIRECTS = frozenset({301, 302, 303, 307, 308})
STALE_EVERY_SECONDS = 600.0
STALE_SECONDS = 3_600.0  # a partial file is used by the next attempt, and no output waits longer for one
READ_SECONDS = 60.0
FLOOR_SECONDS = 30.0  # an attempt ends if a period of this length is slower than the minimum speed
FLOOR_BYTES_PER_SECOND = 1_024
RESTARTS = 6  # per attempt: broken transfers without progress
BREAK_SECONDS = 0.1
HOST_WAIT_SECONDS = 0.25
HOST_BUSY_SECONDS = 3.0
ELSEWHERE_SECONDS = 0.5
LOCKED_SECONDS = 0.1  # how long the recording of an older result waits for a locked row


class Downloader:
    """Downloads outputs for one process. Thread-safe. The shared HTTP connections send no API key and no cookies."""

    def __init__(
        self,
        *,
        engine: Engine,
        leases: LeaseKeeper,
        storage: Storage,
        guard: Guard,
        adapter: PooledAdapter,
        scrubber: Scrubber,
        max_bytes: int,
        max_pixels: int,
        timeout: float,
        deadline: float,
        notify: Callable[[Sequence[int]], None],
        per_host: int = 12,
        user_agent: str = "fetch-worker",
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._impatient = engine.execution_options(**{LOCK_WAIT: LOCKED_SECONDS})
        self._leases = leases
        self._storage = storage
        self._guard = guard
        self._scrubber = scrubber
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._timeout = timeout
        self._deadline = timedelta(seconds=deadline)
        self._notify = notify
        self._adapter = adapter
        self._headers = {"User-Agent": user_agent, "Accept": "*/*"}
        self._hosts = HostSlots(per_host)
        self._received = ReceivedBytes(engine, leases.holder)
        self._unwritten: deque[tuple[ClaimedOutput, Attempt]] = deque()
        self._lost: deque[str] = deque()
        self._look_elsewhere_at = 0.0
        self._pause = pause
        self._cleaned_at = time.monotonic()
        self._preparing = threading.Lock()
        self._prepared = False

    def run(self, output_id: int) -> str:
        """Store one output if one is due, and return a short description of the result.

        Raises the database's errors. The result of an attempt is kept in that case, and recorded at the next call.
        Without this, the lease of the claim would be renewed for as long as this process has work.
        """
        self._prepare_storage()
        self._remove_stale()
        with self._leases:
            self._release_lost()
            self._record_kept_results()
            token = self._leases.new_token()
            with self._release_later_on_error(token):
                output = self._claim(output_id, token)
            if output is None:
                return "nothing to do"
            with self._hosts.slot(_host_of(output)) as has_slot:
                busy = not has_slot
                if has_slot:
                    with suppress(LeaseLost):
                        return self._record_or_keep(output, self._attempt(output))
            with self._release_later_on_error(token):
                self._release(output)
            return "its host is busy: again in a few seconds" if busy else "its lease may have expired: released"

    @contextmanager
    def _release_later_on_error(self, token: str) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError:
            self._lost.append(token)
            raise

    def _release_lost(self) -> None:
        """Release claims whose end could not be recorded. A process with constant work would renew them forever."""
        lost = [self._lost.popleft() for _ in range(len(self._lost))]
        if not lost:
            return
        try:
            with self._engine.begin() as connection:
                released = release_claimed_outputs(connection, self._leases.holder, lost, now=database_now(connection))
        except SQLAlchemyError:
            self._lost.extend(lost)
            raise
        if released:
            log.warning("released claims whose end could not be recorded outputs=%s", released)

    def _claim(self, output_id: int, token: str) -> ClaimedOutput | None:
        """Claim the next output, if possible from a host with a free slot."""
        full = self._hosts.full()
        if full and time.monotonic() >= self._look_elsewhere_at:
            output = self._claim_without(full, output_id, token)
            if output is not None:
                return output
            self._look_elsewhere_at = time.monotonic() + ELSEWHERE_SECONDS  # not too often: it reads all due outputs
        return self._claim_without((), output_id, token)

    def _claim_without(self, hosts: Collection[str], output_id: int, token: str) -> ClaimedOutput | None:
        def claim(connection: Connection) -> ClaimedOutput | None:
            return claim_output(
                connection,
                output_id,
                token=token,
                holder=self._leases.holder,
                lease=self._leases.lease,
                now=database_now(connection),
                without=hosts,
            )

        return transact(self._engine, claim)

    def _release(self, output: ClaimedOutput) -> None:
        with self._engine.begin() as connection:
            now = database_now(connection)
            release_output(connection, output, due_at=now + timedelta(seconds=HOST_BUSY_SECONDS), now=now)

    def _attempt(self, output: ClaimedOutput) -> Attempt:
        try:
            receive = self._storage.partials.receive
            with receive(output.id, output.token) as incoming, self._received.counted(output, incoming):
                return self._receive(output, incoming) or self._keep(output, incoming)
        except StorageTrouble as refused:
            return TransferTrouble("storage", str(refused))
        except LeaseLost:
            raise
        except Exception as error:  # any bug: without a result, the output would be tried forever and never fail
            name = type(error).__name__  # not its text, which may contain a link
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.error("internal error output=%s reason=%s at=%s:%s", output.id, name, place.name, place.lineno)
            return TransferTrouble("unreachable", f"internal error: {name}")

    def _receive(self, output: ClaimedOutput, incoming: Incoming) -> Attempt | None:
        """Receive the file into `incoming`. Return the failure, or None."""
        url = output.urls[address_index(output.facts)]
        link = link_hash(url)
        if output.body is not None:
            if len(output.body) > self._max_bytes:
                return Unfit("too_large", f"{len(output.body)} bytes, more than OUTPUT_MAX_BYTES")
            declared = url.removeprefix("data:").partition(";")[0] if url.startswith("data:") else ""
            incoming.begin(Source(link, text=promised_text((), declared)))
            incoming.write(output.body)
            return None
        if url.startswith("data:"):
            return BadBody("not_media", "a data: address whose bytes could not be read")
        if len(url) > MAX_URL:
            return Unfit("refused_address", f"the address has more than {MAX_URL} characters")
        if incoming.source is not None and incoming.source.link == link and incoming.complete:
            return None  # complete already; the last attempt failed in the storage
        limit = TimeLimit(self._timeout, partial(self._leases.check, output.id, output.token))
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
            cause = f"none within OUTPUT_TIMEOUT, {self._timeout:g} s" if limit.expired else describe(error)
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
        if expected_size is not None and expected_size > self._max_bytes:
            return Unfit("too_large", f"{expected_size} bytes, more than OUTPUT_MAX_BYTES")
        check_at, checked_size = time.monotonic() + FLOOR_SECONDS, incoming.size
        try:
            while chunk := self._piece(response, incoming):
                if incoming.size + len(chunk) > self._max_bytes:
                    return Unfit("too_large", f"more than OUTPUT_MAX_BYTES ({self._max_bytes} bytes)")
                if response.status == 206 and expected_size is not None and incoming.size + len(chunk) > expected_size:
                    # The received bytes can't be trusted: start again.
                    incoming.begin(Source(incoming.source.link if incoming.source else ""))
                    raise _BrokenTransfer(f"more bytes than the declared {expected_size}")
                incoming.write(chunk)
                now = time.monotonic()
                if now >= check_at:
                    if incoming.size - checked_size < FLOOR_SECONDS * FLOOR_BYTES_PER_SECOND:
                        raise _BrokenTransfer(
                            f"slower than {FLOOR_BYTES_PER_SECOND} bytes/s, {incoming.size} bytes", slow=True
                        )
                    check_at, checked_size = now + FLOOR_SECONDS, incoming.size
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
        failure = self._unpack(incoming)
        if failure is not None:
            return failure
        media = sniff(incoming.head)
        if media is None or not proves_complete(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", str(broken), early=True)
        incoming.forget_length()
        return None

    def _unpack(self, incoming: Incoming) -> Attempt | None:
        """Decode a body that is not a media file as it was received. The coding in its headers may be wrong."""
        codings = [] if incoming.source is None else [name for name in incoming.source.coding.split(",") if name]
        for _ in range(MAX_CODINGS):
            if sniff(incoming.head) is not None:
                return None
            coding = detect_coding(incoming.head) or (codings.pop() if codings else None)
            if coding is None:
                return None
            try:
                incoming.replace(unpack(incoming.chunks(), coding, limit=self._max_bytes))
            except TooLarge:
                return Unfit("too_large", f"unpacked more than OUTPUT_MAX_BYTES ({self._max_bytes} bytes)")
            except ValueError:
                continue  # the body does not have this coding
        return None

    def _keep(self, output: ClaimedOutput, incoming: Incoming) -> Attempt:
        incoming.hold = False
        remote = output.body is None
        failure = self._unpack(incoming)
        if failure is not None:
            return failure
        media = sniff(incoming.head)
        start = base64_start(incoming.head) if media is None else None
        if start is not None:
            try:
                incoming.replace(_decode_base64(incoming.chunks(), start))
            except ValueError:
                return BadBody("truncated", f"{incoming.size} bytes of an incomplete base64 text", remote)
            media = sniff(incoming.head)
        if media is None:
            text_result = _as_text(incoming, remote=remote)
            if not isinstance(text_result, Media):
                return text_result
            media = text_result
        area = pixel_count(media, incoming.head)
        if area is not None and area > self._max_pixels:
            return Unfit("too_large", f"{area} pixels, more than OUTPUT_MAX_PIXELS ({self._max_pixels})")
        if not is_complete(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", f"{incoming.size} bytes that do not end like {media.type}", remote)
        incoming.finish()
        incoming.hold = True  # if the storage fails, the next attempt need not download the file again
        location = self._storage.keep(incoming, job_id=output.job_id, position=output.position, media=media)
        incoming.hold = False
        return StoredFile(location, incoming.size, incoming.sha256, media)

    def _record_kept_results(self) -> None:
        for _ in range(len(self._unwritten)):
            try:
                output, attempt = self._unwritten.popleft()
            except IndexError:
                return  # another thread records the rest
            try:
                self._record_or_keep(output, attempt, self._impatient)
            except SQLAlchemyError as error:
                if is_server_error(error):
                    raise

    def _record_or_keep(self, output: ClaimedOutput, attempt: Attempt, engine: Engine | None = None) -> str:
        try:
            return self._record(output, attempt, engine or self._engine)
        except SQLAlchemyError as error:
            if error_kind(error) == "row":  # the result can't be written, so it would be tried forever
                self._lost.append(output.token)
            else:
                self._unwritten.append((output, attempt))
            raise

    def _record(self, output: ClaimedOutput, attempt: Attempt, engine: Engine) -> str:
        def record(connection: Connection) -> tuple[StoredFile | TryAgain | GiveUp, bool, str | None]:
            now = database_now(connection)
            result = after_attempt(output.facts, attempt, now=now, deadline=self._deadline)
            if not isinstance(result, StoredFile):
                result = replace(result, message=plain_text(self._scrubber.text(result.message)))
            return result, *record_attempt(connection, output, result, now=now)

        result, claim_valid, final_status = transact(engine, record)
        if not claim_valid:
            return "the claim was lost"
        if isinstance(result, GiveUp):
            self._storage.partials.discard(output.id)
        if final_status is not None:
            self._notify([output.job_id])
        if isinstance(result, StoredFile):
            return f"stored {result.size_bytes} bytes" + (
                f", job {output.job_id} {final_status}" if final_status else ""
            )
        verb = "gave up" if isinstance(result, GiveUp) else "again later"
        log.warning(
            "output not stored output=%s code=%s outcome=%s reason=%s", output.id, result.code, verb, result.message
        )
        return f"{verb}: {result.code}"

    def _prepare_storage(self) -> None:
        """Prepare the storage once, before the first download. Not at process start, because it may call a server."""
        with self._preparing:
            if not self._prepared:
                with suppress(StorageTrouble):  # each attempt reports the same error
                    self._storage.prepare()
                self._prepared = True

    def _remove_stale(self) -> None:
        if time.monotonic() - self._cleaned_at < STALE_EVERY_SECONDS:
            return
        self._cleaned_at = time.monotonic()
        self._storage.partials.remove_stale(older_than=max(2 * self._timeout, STALE_SECONDS))


class _BrokenTransfer(Exception):
    """The transfer ended too early, or was too slow (`slow`)."""

    def __init__(self, text: str, *, slow: bool = False) -> None:
        super().__init__(text)
        self.slow = slow


class HostSlots:
    """Limits the concurrent downloads from each host, so that a host that hangs can't block all threads."""

    def __init__(self, per_host: int, *, wait_seconds: float = HOST_WAIT_SECONDS) -> None:
        self._per_host = per_host
        self._wait_seconds = wait_seconds
        self._running: Counter[str] = Counter()
        self._slot_released = threading.Condition()

    def full(self) -> frozenset[str]:
        """Return the hosts without a free slot."""
        with self._slot_released:
            return frozenset(host for host, count in self._running.items() if count >= self._per_host)

    @contextmanager
    def slot(self, host: str) -> Iterator[bool]:
        """Take a slot for one download from a host. Yields False if none is released within `wait_seconds`."""
        with self._slot_released:
            has_slot = self._slot_released.wait_for(lambda: self._running[host] < self._per_host, self._wait_seconds)
            if has_slot:
                self._running[host] += 1
        try:
            yield has_slot
        finally:
            if has_slot:
                with self._slot_released:
                    self._running[host] -= 1
                    if not self._running[host]:
                        del self._running[host]
                    self._slot_released.notify_all()


def _host_of(output: ClaimedOutput) -> str:
    """Return the host of the next attempt. An output whose bytes came with the answer gets a key of its own."""
    if output.body is not None:
        return f"#{output.id}"
    with suppress(ValueError):
        return (urlsplit(output.urls[address_index(output.facts)]).hostname or "").rstrip(".")
    return ""


def _as_text(incoming: Incoming, *, remote: bool) -> Media | BadBody:
    """Return the text type of a file that is not another media type, if its URL or its declared type is text."""
    promise = incoming.source.text if incoming.source is not None else ""
    early = remote and is_text(incoming.head)
    if not promise:
        return BadBody("not_media", f"{incoming.size} bytes that begin like no media", early)
    try:
        return text_media(promise, incoming.chunks())
    except NotPromisedText as reason:
        message = f"{incoming.size} bytes where {promise} is promised: {reason}"
        return BadBody("truncated", message, remote) if reason.is_truncated else BadBody("not_media", message, early)


def _decode_base64(chunks: Iterator[bytes], start: int) -> Iterator[bytes]:
    """Decode a base64 text. Raises ValueError if it is not base64, or incomplete."""
    decoder = Base64Decoder()
    for chunk in chunks:
        yield decoder.feed(chunk[start:])
        start = max(0, start - len(chunk))
    yield decoder.finish()


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
