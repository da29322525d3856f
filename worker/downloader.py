"""One download: claim the output, stream it to a temporary file, check it, name it, record it. Trusts nobody."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from sqlalchemy import Engine
from urllib3.exceptions import DecodeError, HTTPError, IncompleteRead, ProtocolError

from worker.addresses import Guard, RefusedTarget
from worker.core.lifecycle import (
    Attempt,
    BadBody,
    DeadLink,
    GiveUp,
    StoredFile,
    Trouble,
    Unfit,
    after_attempt,
    source,
)
from worker.core.media import MAX_PIXELS, pixels, sniff, whole
from worker.database import database_now
from worker.errors import StorageTrouble
from worker.leases import LeaseKeeper
from worker.scrubber import Scrubber
from worker.storage import FileStorage, Incoming
from worker.store.claims import ClaimedOutput, claim_output
from worker.store.outcomes import record_attempt
from worker.timed_http import TimeLimit, lean_session

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
CONNECT_SECONDS = 10.0
MAX_REDIRECTS = 3
DEAD = frozenset({403, 404, 410})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
STALE_EVERY_SECONDS = 600.0


class Downloader:
    """Downloads for one process, many threads at once, over one pooled session that carries no key and no cookies."""

    def __init__(
        self,
        *,
        engine: Engine,
        leases: LeaseKeeper,
        storage: FileStorage,
        guard: Guard,
        adapter: HTTPAdapter,
        scrubber: Scrubber,
        max_bytes: int,
        timeout: float,
        deadline: float,
        tell: Callable[[Sequence[int]], None],
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._storage = storage
        self._guard = guard
        self._scrubber = scrubber
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._deadline = timedelta(seconds=deadline)
        self._tell = tell
        self._session = lean_session(adapter)
        self._cleaned_at = time.monotonic()

    def run(self, output_id: int) -> str:
        """Stores one output, if there is something to do; what happened, in a few words."""
        self._remove_stale()
        with self._leases:
            with self._engine.begin() as connection:
                output = claim_output(
                    connection,
                    output_id,
                    token=secrets.token_hex(8),
                    holder=self._leases.holder,
                    lease=self._leases.lease,
                    now=database_now(connection),
                )
            if output is None:
                return "nothing to do"
            return self._record(output, self._attempt(output))

    def _attempt(self, output: ClaimedOutput) -> Attempt:
        try:
            with self._storage.receive(output.id, output.token) as incoming:
                trouble = self._receive(output, incoming)
                return trouble or self._keep(output, incoming)
        except StorageTrouble as refused:
            return Trouble("storage", str(refused))

    def _receive(self, output: ClaimedOutput, incoming: Incoming) -> Attempt | None:
        """Fills `incoming`; what stood in the way, or None."""
        if output.body is not None:
            if len(output.body) > self._max_bytes:
                return Unfit("too_large", f"{len(output.body)} bytes, more than OUTPUT_MAX_BYTES")
            incoming.write(output.body)
            return None
        url = output.urls[source(output.facts)]
        if url.startswith("data:"):
            return BadBody("not_media", "a data: address whose bytes could not be read")
        try:
            with TimeLimit(self._timeout) as limit:
                return self._download(url, incoming, limit)
        except RefusedTarget as refused:
            return Unfit("refused_address", str(refused))
        except _Truncated as broken:
            return BadBody("truncated", str(broken))
        except (requests.RequestException, HTTPError, OSError, ValueError) as error:
            refusal = _refusal_in(error)
            if refusal is not None:
                return Unfit("refused_address", str(refusal))
            return Trouble("unreachable", f"no answer: {type(error).__name__}")

    def _download(self, url: str, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        for _ in range(MAX_REDIRECTS + 1):
            self._guard.check_url(url)
            with self._session.get(
                url,
                headers={"Accept": "*/*", "Accept-Encoding": "identity"},
                timeout=(min(CONNECT_SECONDS, limit.remaining), min(60.0, limit.remaining)),
                allow_redirects=False,
                stream=True,
            ) as response:
                if response.status_code in REDIRECTS and response.headers.get("location"):
                    url = _redirected(url, response.headers["location"])
                    continue
                if response.status_code in DEAD:
                    return DeadLink(f"HTTP {response.status_code}")
                if response.status_code != 200:
                    return Trouble("http_error", f"HTTP {response.status_code}")
                return self._stream(response, incoming, limit)
        return Trouble("http_error", f"more than {MAX_REDIRECTS} redirects")

    def _stream(self, response: requests.Response, incoming: Incoming, limit: TimeLimit) -> Attempt | None:
        declared = response.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return Unfit("too_large", f"{declared} bytes, more than OUTPUT_MAX_BYTES")
        try:
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=True):
                if incoming.size + len(chunk) > self._max_bytes:
                    return Unfit("too_large", f"more than OUTPUT_MAX_BYTES ({self._max_bytes} bytes)")
                incoming.write(chunk)
                if limit.over:
                    return Trouble("unreachable", f"not done within OUTPUT_TIMEOUT, after {incoming.size} bytes")
        except (IncompleteRead, ProtocolError, DecodeError) as error:
            if limit.over:
                return Trouble("unreachable", f"not done within OUTPUT_TIMEOUT, after {incoming.size} bytes")
            raise _Truncated(f"the body ended after {incoming.size} bytes ({type(error).__name__})") from None
        if limit.over:  # where no length was declared, a connection that the watchdog ended looks like the end
            return Trouble("unreachable", f"not done within OUTPUT_TIMEOUT, after {incoming.size} bytes")
        return None

    def _keep(self, output: ClaimedOutput, incoming: Incoming) -> Attempt:
        media = sniff(incoming.head)
        if media is None:
            return BadBody("not_media", f"{incoming.size} bytes that begin like no media")
        area = pixels(media, incoming.head)
        if area is not None and area > MAX_PIXELS:
            return Unfit("too_large", f"{area} pixels, more than {MAX_PIXELS}")
        if not whole(media, incoming.head, incoming.tail, incoming.size):
            return BadBody("truncated", f"{incoming.size} bytes that do not end like {media.type}")
        location = self._storage.keep(
            incoming, job_id=output.job_id, position=output.position, extension=media.extension
        )
        return StoredFile(location, incoming.size, incoming.sha256, media)

    def _record(self, output: ClaimedOutput, attempt: Attempt) -> str:
        with self._engine.begin() as connection:
            now = database_now(connection)
            result = after_attempt(output.facts, attempt, now=now, deadline=self._deadline)
            if not isinstance(result, StoredFile):
                result = replace(result, message=self._scrubber.text(result.message))
            stood, final = record_attempt(connection, output, result, now=now)
        if not stood:
            return "the claim was lost"
        if final is not None:
            self._tell([output.job_id])
        if isinstance(result, StoredFile):
            return f"stored {result.size_bytes} bytes" + (f", job {output.job_id} {final}" if final else "")
        verb = "gave up" if isinstance(result, GiveUp) else "again later"
        log.warning(
            "output not stored output=%s code=%s outcome=%s reason=%s", output.id, result.code, verb, result.message
        )
        return f"{verb}: {result.code}"

    def _remove_stale(self) -> None:
        if time.monotonic() - self._cleaned_at < STALE_EVERY_SECONDS:
            return
        self._cleaned_at = time.monotonic()
        self._storage.remove_stale(older_than=2 * self._timeout + 60)


class _Truncated(ValueError):
    """The body ended before its end."""


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads. Headers are read as Latin-1, but UTF-8 is what servers write."""
    with suppress(UnicodeError):
        location = location.encode("latin-1").decode("utf-8")
    return urljoin(url, location)


def _refusal_in(error: BaseException) -> RefusedTarget | None:
    """The guard's refusal, where a library wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RefusedTarget):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
