"""One download: claim the output, stream it to a temporary file, check it, name it, record it. Trusts nobody."""

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
from worker.core.refusals import HEAD_BYTES, is_dead_link
from worker.core.reply import MAX_URL
from worker.core.urls import percent_encoded, redirect_target
from worker.downloads.progress import ReceivedBytes
from worker.downloads.unpacking import TooLarge, detect_coding, unpack
from worker.errors import StorageTrouble
from worker.net.address_guard import Guard, RefusedTarget
from worker.net.deadlines import TimeLimit
from worker.net.network_errors import describe
from worker.net.pooled_adapter import PooledAdapter, StreamedAnswer
from worker.storage.local import Storage
from worker.storage.partial_files import Incoming, Source, link_hash
from worker.store.claims import ClaimedOutput, claim_output, release_claimed_outputs, release_output
from worker.store.engine import LOCK_WAIT, database_now, error_kind, is_server_error, transact
from worker.store.results import record_attempt
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
CONNECT_SECONDS = 10.0
MAX_REDIRECTS = 3
BEYOND_SECONDS = 1.0  # how long we wait for bytes after a declared end at which the file is not whole
REFUSAL_SECONDS = 2.0  # how long we read the page of a refusal
MOST_PACKINGS = 3  # of one body
NO_RANGE = frozenset({206, 400, 405, 416, 501})  # answers to a range that say: ask for all of it
REDIRECTS = frozenset({301, 302, 303, 307, 308})
STALE_EVERY_SECONDS = 600.0
STALE_SECONDS = 3_600.0  # what came of an output is of use until its next attempt; none waits longer for one
READ_SECONDS = 60.0
FLOOR_SECONDS = 30.0  # a transfer that brings less than the floor in so many seconds is given up for now
FLOOR_BYTES_PER_SECOND = 1_024
RESTARTS = 6  # of one attempt: breaks after which nothing new had come
BREAK_SECONDS = 0.1
HOST_PATIENCE_SECONDS = 0.25
HOST_BUSY_SECONDS = 3.0
ELSEWHERE_SECONDS = 0.5
LOCKED_SECONDS = 0.1  # how long what is left to be written waits for a row that somebody else has locked


class Downloader:
    """Downloads for one process, many threads at once, over one pooled session that carries no key and no cookies."""

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
        self._tell = notify
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
        """Stores one output, if there is something to do; what happened, in a few words.

        Raises what the database raises where it is away. What came of an attempt is kept then, and written first the
        next time: a claim that nobody ends would have its lease renewed for as long as this process has work.
        """
        self._prepare_storage()
        self._remove_stale()
        with self._leases:
            self._release_lost()
            self._write_what_is_left()
            token = self._leases.new_token()
            with self._lost_if_unwritten(token):
                output = self._claim(output_id, token)
            if output is None:
                return "nothing to do"
            with self._hosts.place(_host_of(output)) as free:
                busy = not free
                if free:
                    with suppress(LeaseLost):
                        return self._record_or_keep(output, self._attempt(output))
            with self._lost_if_unwritten(token):
                self._give_back(output)
            return "its host is busy: again in a few seconds" if busy else "its lease may be over: given back"

    @contextmanager
    def _lost_if_unwritten(self, token: str) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError:
            self._lost.append(token)
            raise

    def _release_lost(self) -> None:
        """Gives back claims whose end could not be recorded: a process that is never idle would renew them for ever."""
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
            log.warning("claims whose end could not be recorded are given back outputs=%s", released)

    def _claim(self, output_id: int, token: str) -> ClaimedOutput | None:
        """The next output: of a host that has places left, where there is one due."""
        full = self._hosts.full()
        if full and time.monotonic() >= self._look_elsewhere_at:
            output = self._claim_without(full, output_id, token)
            if output is not None:
                return output
            self._look_elsewhere_at = time.monotonic() + ELSEWHERE_SECONDS  # it goes through all that is due
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

    def _give_back(self, output: ClaimedOutput) -> None:
        with self._engine.begin() as connection:
            now = database_now(connection)
            release_output(connection, output, due_at=now + timedelta(seconds=HOST_BUSY_SECONDS), now=now)

    def _attempt(self, output: ClaimedOutput) -> Attempt:
        try:
            receive = self._storage.partials.receive
            with receive(output.id, output.token) as incoming, self._received.counted(output, incoming):
                trouble = self._receive(output, incoming)
                return trouble or self._keep(output, incoming)
        except StorageTrouble as refused:
            return TransferTrouble("storage", str(refused))
        except LeaseLost:
            raise
        except Exception as fault:  # a claim that nobody ends would come back for ever, and never be given up
            kind, place = (
                type(fault).__name__,
                traceback.extract_tb(fault.__traceback__)[-1],
            )  # its text may quote a link
            log.error("a fault of ours output=%s reason=%s at=%s:%s", output.id, kind, place.name, place.lineno)
            return TransferTrouble("unreachable", f"a fault of ours: {kind}")

    def _receive(self, output: ClaimedOutput, incoming: Incoming) -> Attempt | None:
        """Fills `incoming`; what stood in the way, or None."""
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
            return None  # nothing but our own storage stood in the way
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
        """One attempt: a transfer that breaks is gone on with, or started over, while there is sense in it."""
        restarts, furthest, last = 0, 0, -1
        while True:
            try:
                return self._request(url, link, incoming, limit)
            except _Broken as broken:
                incoming.hold = True
                if broken.slow or limit.expired:
                    return TransferTrouble("unreachable", str(broken))
                if incoming.size == last:  # twice at the same place: it is cut there, or its headers are wrong
                    return self._ended_otherwise(incoming, broken)
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
            asked = _range_headers(incoming, link)
            timeout = (min(CONNECT_SECONDS, limit.remaining), min(READ_SECONDS, limit.remaining))
            with self._adapter.exchange("GET", url, self._headers | asked, timeout) as answer:
                location = answer.headers.get("location")
                if answer.status in REDIRECTS and location:
                    try:
                        url = redirect_target(url, location)
                    except ValueError:
                        return TransferTrouble("http_error", f"HTTP {answer.status} to a malformed address")
                    redirects += 1
                    continue
                if answer.status not in (200, 206):
                    if asked and answer.status in NO_RANGE:
                        incoming.begin(Source(link))
                        continue
                    incoming.hold = bool(asked)
                    return _refusal(answer)
                if answer.status == 206 and asked and not _goes_on(answer, incoming):
                    incoming.begin(Source(link))  # it answers for other bytes: from the start, then
                    continue
                if answer.status == 200 or not asked:
                    if not _from_the_start(answer):
                        return TransferTrouble("http_error", "HTTP 206 with another part than the first")
                    text = promised_text((listed, url), answer.headers.get("content-type", ""))
                    incoming.begin(_source_of(answer, link, text))
                return self._stream(answer, incoming, limit)
        return TransferTrouble("http_error", f"more than {MAX_REDIRECTS} redirects")

    def _stream(self, answer: StreamedAnswer, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        """Receives a body as it comes. Raises _Broken where it ended too soon, or came too slowly."""
        expected_size = None if incoming.source is None else incoming.source.length
        if expected_size is not None and expected_size > self._max_bytes:
            return Unfit("too_large", f"{expected_size} bytes, more than OUTPUT_MAX_BYTES")
        look_at, before = time.monotonic() + FLOOR_SECONDS, incoming.size
        try:
            while chunk := self._piece(answer, incoming):
                if incoming.size + len(chunk) > self._max_bytes:
                    return Unfit("too_large", f"more than OUTPUT_MAX_BYTES ({self._max_bytes} bytes)")
                if answer.status == 206 and expected_size is not None and incoming.size + len(chunk) > expected_size:
                    incoming.begin(Source(incoming.source.link if incoming.source else ""))  # whose bytes are these?
                    raise _Broken(f"more came than the {expected_size} bytes there are")
                incoming.write(chunk)
                now = time.monotonic()
                if now >= look_at:
                    if incoming.size - before < FLOOR_SECONDS * FLOOR_BYTES_PER_SECOND:
                        raise _Broken(f"slower than {FLOOR_BYTES_PER_SECOND} bytes/s, {incoming.size} bytes", slow=True)
                    look_at, before = now + FLOOR_SECONDS, incoming.size
                if limit.expired:
                    break
        except (HTTPException, OSError) as error:
            if not limit.expired:
                raise _Broken(f"the body ended after {incoming.size} bytes: {describe(error)}") from None
        if limit.expired:  # where no length was declared, a connection that the watchdog ended looks like the end
            raise _Broken(f"not done within OUTPUT_TIMEOUT, after {incoming.size} bytes", slow=True)
        if expected_size is not None and incoming.size < expected_size:
            raise _Broken(f"the body ended after {incoming.size} of {expected_size} bytes")
        return None

    def _piece(self, answer: StreamedAnswer, incoming: Incoming) -> bytes:
        """Return the next bytes of a body: also those after its declared end, where the file goes on there."""
        piece = answer.piece(CHUNK_BYTES)
        if piece or answer.left != 0 or answer.status != 200 or not incoming.size:
            return piece
        media = sniff(incoming.head)
        packed = incoming.source is not None and incoming.source.coding
        if not packed and (media is None or is_complete(media, incoming.head, incoming.tail, incoming.size)):
            return b""
        piece = answer.piece_beyond(CHUNK_BYTES, BEYOND_SECONDS)
        if piece:
            incoming.forget_length()
        return piece

    def _ended_otherwise(self, incoming: Incoming, broken: "_Broken") -> Attempt | None:
        """Return None where a file is whole by its own account, though its transfer ended before its declared end."""
        trouble = self._unpack(incoming)
        if trouble is not None:
            return trouble
        media = sniff(incoming.head)
        if media is None or not proves_complete(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", str(broken), early=True)
        incoming.forget_length()
        return None

    def _unpack(self, incoming: Incoming) -> Attempt | None:
        """Unpack a body that is no media as it came. Its headers need not be right: what they say is tried first."""
        codings = [] if incoming.source is None else [name for name in incoming.source.coding.split(",") if name]
        for _ in range(MOST_PACKINGS):
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
                continue  # it is not packed so, whatever the header says
        return None

    def _keep(self, output: ClaimedOutput, incoming: Incoming) -> Attempt:
        incoming.hold = False
        remote = output.body is None
        trouble = self._unpack(incoming)
        if trouble is not None:
            return trouble
        media = sniff(incoming.head)
        start = base64_start(incoming.head) if media is None else None
        if start is not None:
            try:
                incoming.replace(_decoded(incoming.chunks(), start))
            except ValueError:
                return BadBody("truncated", f"{incoming.size} bytes of a base64 text, which breaks off", remote)
            media = sniff(incoming.head)
        if media is None:
            judged = _as_text(incoming, remote=remote)
            if not isinstance(judged, Media):
                return judged
            media = judged
        area = pixel_count(media, incoming.head)
        if area is not None and area > self._max_pixels:
            return Unfit("too_large", f"{area} pixels, more than OUTPUT_MAX_PIXELS ({self._max_pixels})")
        if not is_complete(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", f"{incoming.size} bytes that do not end like {media.type}", remote)
        incoming.finish()
        incoming.hold = True  # should the storage refuse it, it need not come again
        location = self._storage.keep(incoming, job_id=output.job_id, position=output.position, media=media)
        incoming.hold = False
        return StoredFile(location, incoming.size, incoming.sha256, media)

    def _write_what_is_left(self) -> None:
        for _ in range(len(self._unwritten)):
            try:
                output, attempt = self._unwritten.popleft()
            except IndexError:
                return  # other threads are at it
            try:
                self._record_or_keep(output, attempt, self._impatient)
            except SQLAlchemyError as error:
                if is_server_error(error):
                    raise

    def _record_or_keep(self, output: ClaimedOutput, attempt: Attempt, engine: Engine | None = None) -> str:
        try:
            return self._record(output, attempt, engine or self._engine)
        except SQLAlchemyError as error:
            if error_kind(error) == "row":  # one that no statement can write would come back for ever
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

        result, stood, final = transact(engine, record)
        if not stood:
            return "the claim was lost"
        if isinstance(result, GiveUp):
            self._storage.partials.discard(output.id)
        if final is not None:
            self._tell([output.job_id])
        if isinstance(result, StoredFile):
            return f"stored {result.size_bytes} bytes" + (f", job {output.job_id} {final}" if final else "")
        verb = "gave up" if isinstance(result, GiveUp) else "again later"
        log.warning(
            "output not stored output=%s code=%s outcome=%s reason=%s", output.id, result.code, verb, result.message
        )
        return f"{verb}: {result.code}"

    def _prepare_storage(self) -> None:
        """Prepare the storage once, before the first download; it may ask a server, so not while the process starts."""
        with self._preparing:
            if not self._prepared:
                with suppress(StorageTrouble):  # every attempt says so again
                    self._storage.prepare()
                self._prepared = True

    def _remove_stale(self) -> None:
        if time.monotonic() - self._cleaned_at < STALE_EVERY_SECONDS:
            return
        self._cleaned_at = time.monotonic()
        self._storage.partials.remove_stale(older_than=max(2 * self._timeout, STALE_SECONDS))


class _Broken(Exception):
    """The transfer ended before its end; `slow` where it took too long."""

    def __init__(self, text: str, *, slow: bool = False) -> None:
        super().__init__(text)
        self.slow = slow


class HostSlots:
    """How many downloads go on from each host: one that hangs must not take all the threads there are."""

    def __init__(self, most: int, *, patience: float = HOST_PATIENCE_SECONDS) -> None:
        self._most = most
        self._patience = patience
        self._busy: Counter[str] = Counter()
        self._freed = threading.Condition()

    def full(self) -> frozenset[str]:
        """The hosts that have no place left."""
        with self._freed:
            return frozenset(host for host, busy in self._busy.items() if busy >= self._most)

    @contextmanager
    def place(self, host: str) -> Iterator[bool]:
        """A place for one download from a host; whether there was one, within a moment."""
        with self._freed:
            free = self._freed.wait_for(lambda: self._busy[host] < self._most, self._patience)
            if free:
                self._busy[host] += 1
        try:
            yield free
        finally:
            if free:
                with self._freed:
                    self._busy[host] -= 1
                    if not self._busy[host]:
                        del self._busy[host]
                    self._freed.notify_all()


def _host_of(output: ClaimedOutput) -> str:
    """Where the next attempt goes; outputs that need no network have a place each."""
    if output.body is not None:
        return f"#{output.id}"
    with suppress(ValueError):
        return (urlsplit(output.urls[address_index(output.facts)]).hostname or "").rstrip(".")
    return ""


def _as_text(incoming: Incoming, *, remote: bool) -> Media | BadBody:
    """Return what text a file is that is no other media, where its address or its type promises text."""
    promise = incoming.source.text if incoming.source is not None else ""
    early = remote and is_text(incoming.head)
    if not promise:
        return BadBody("not_media", f"{incoming.size} bytes that begin like no media", early)
    try:
        return text_media(promise, incoming.chunks())
    except NotPromisedText as reason:
        message = f"{incoming.size} bytes where {promise} is promised: {reason}"
        return BadBody("truncated", message, remote) if reason.breaks_off else BadBody("not_media", message, early)


def _decoded(chunks: Iterator[bytes], start: int) -> Iterator[bytes]:
    """The bytes that a base64 text stands for. Raises ValueError where it is none, or not whole."""
    decoder = Base64Decoder()
    for chunk in chunks:
        yield decoder.feed(chunk[start:])
        start = max(0, start - len(chunk))
    yield decoder.finish()


def _range_headers(incoming: Incoming, link: str) -> dict[str, str]:
    """What asks for the rest of a file, if its link is the one that the beginning is from."""
    known = incoming.source
    if known is None or known.link != link or not known.validator or not incoming.size:
        return {}
    return {"Range": f"bytes={incoming.size}-", "If-Range": known.validator}


def _refusal(answer: StreamedAnswer) -> Attempt:
    """Return what an answer without the file means: a dead link, or trouble on the way."""
    body = answer.beginning(HEAD_BYTES, REFUSAL_SECONDS) if 400 <= answer.status < 500 else b""
    if is_dead_link(answer.status, answer.headers, body):
        return DeadLink(f"HTTP {answer.status}")
    on_the_way = ", refused on the way (a page or a check, not the store)" if answer.status == 403 else ""
    wait = retry_after_seconds(answer.headers.get("retry-after"), time.time())
    return TransferTrouble("http_error", f"HTTP {answer.status}{on_the_way}", wait)


def _source_of(answer: StreamedAnswer, link: str, text: Promise) -> Source:
    """Return what a whole answer says of itself: its length, and what its rest can be asked for with, if at all."""
    headers = answer.headers
    codings = [name.strip() for name in headers.get("content-encoding", "").lower().split(",")]
    coding = ",".join(name for name in codings if name not in ("", "identity"))
    if coding or answer.status == 206 or headers.get("accept-ranges", "bytes").lower() == "none":
        return Source(link, "", answer.left, coding[:100], text)
    return Source(link, _validator(headers), answer.left, text=text)


def _from_the_start(answer: StreamedAnswer) -> bool:
    """Whether an answer to a request without a range holds the first byte, also where it calls itself a part."""
    return answer.status == 200 or not re.match(r"bytes [1-9]", answer.headers.get("content-range", ""))


def _validator(headers: Mapping[str, str]) -> str:
    """The entity tag if it is a strong one, else the date of the last change where it is sure to be one (RFC 9110,
    8.8.2.2: changed at least a second before the answer)."""
    tag = headers.get("etag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]{0,200}"', tag):
        return tag
    with suppress(TypeError, ValueError, OverflowError):
        changed = parsedate_to_datetime(headers.get("last-modified", ""))
        if (parsedate_to_datetime(headers.get("date", "")) - changed).total_seconds() >= 1:
            return _written(changed)
    return ""


def _written(moment: datetime) -> str:
    return format_datetime(moment.astimezone(UTC), usegmt=True)


def _other_version(headers: Mapping[str, str], validator: str) -> bool:
    """Whether an answer names another version than the one that was asked for: not every server heeds If-Range."""
    if validator.startswith('"'):
        return headers.get("etag", validator) != validator
    with suppress(TypeError, ValueError, OverflowError):
        return _written(parsedate_to_datetime(headers.get("last-modified", validator))) != validator
    return False


def _goes_on(answer: StreamedAnswer, incoming: Incoming) -> bool:
    """Whether a partial answer is the rest of what is there, and nothing else."""
    known = incoming.source
    span = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", answer.headers.get("content-range", ""))
    if known is None or span is None or answer.headers.get("content-encoding", "identity").lower() != "identity":
        return False
    if _other_version(answer.headers, known.validator):
        return False
    return int(span[1]) == incoming.size and known.length is not None and span[3] in (str(known.length), "*")
