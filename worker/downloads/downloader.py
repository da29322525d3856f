"""Download outputs: claim one, transfer its file, check it, store it, record the result."""

import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

from sqlalchemy import Connection, Engine

from worker.coordination.leases import LeaseKeeper, LeaseLost
from worker.core.lifecycle import Attempt, BadBody, StoredFile, TransferTrouble, Unfit, address_index
from worker.core.media.signatures import Media
from worker.core.media.text import promised_text
from worker.downloads.content import check_content
from worker.downloads.failure_log import host_of
from worker.downloads.options import DownloadOptions
from worker.downloads.progress import ReceivedBytes
from worker.downloads.recorder import AttemptRecorder
from worker.downloads.transfer import Transfer
from worker.errors import StorageTrouble
from worker.net.address_guard import Guard
from worker.net.pooled_adapter import PooledAdapter
from worker.storage.base import Storage
from worker.storage.partial_files import Incoming, Source, link_hash
from worker.store.claims import ClaimedOutput, claim_output, release_output
from worker.store.engine import database_now, transact
from worker.system.redaction import Scrubber

log = logging.getLogger(__name__)

STALE_EVERY_SECONDS = 600.0
STALE_SECONDS = 3_600.0  # a partial file is used by the next attempt, and no output waits longer for one
HOST_WAIT_SECONDS = 0.25
HOST_BUSY_SECONDS = 3.0
ELSEWHERE_SECONDS = 0.5


class Downloader:
    """Downloads outputs for one process. Thread-safe."""

    def __init__(
        self,
        *,
        engine: Engine,
        leases: LeaseKeeper,
        storage: Storage,
        guard: Guard,
        adapter: PooledAdapter,
        scrubber: Scrubber,
        options: DownloadOptions,
        notify: Callable[[Sequence[int]], None],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._leases = leases
        self._storage = storage
        self._options = options
        self._transfer = Transfer(guard, adapter, options, pause=pause)
        self._recorder = AttemptRecorder(
            engine,
            leases.holder,
            partials=storage.partials,
            scrubber=scrubber,
            deadline=timedelta(seconds=options.deadline),
            notify=notify,
        )
        self._hosts = HostSlots(options.per_host)
        self._received = ReceivedBytes(engine, leases.holder)
        self._look_elsewhere_at = 0.0
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
            self._recorder.finish_earlier()
            token = self._leases.new_token()
            with self._recorder.release_later_on_error(token):
                output = self._claim(output_id, token)
            if output is None:
                return "nothing to do"
            with self._hosts.slot(_slot_of(output)) as has_slot:
                if has_slot:
                    with suppress(LeaseLost):
                        return self._recorder.record_or_keep(output, self._attempt(output))
            with self._recorder.release_later_on_error(token):
                self._release(output)
            return "its lease may have expired: released" if has_slot else "its host is busy: again in a few seconds"

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
        if output.body is not None:
            if len(output.body) > self._options.max_bytes:
                return Unfit("too_large", f"{len(output.body)} bytes, more than OUTPUT_MAX_BYTES")
            declared = url.removeprefix("data:").partition(";")[0] if url.startswith("data:") else ""
            incoming.begin(Source(link_hash(url), text=promised_text((), declared)))
            incoming.write(output.body)
            return None
        if url.startswith("data:"):
            return BadBody("not_media", "a data: address whose bytes could not be read")
        return self._transfer.fetch(url, incoming, partial(self._leases.check, output.id, output.token))

    def _keep(self, output: ClaimedOutput, incoming: Incoming) -> Attempt:
        """Check a received file and store it."""
        incoming.hold = False
        media = check_content(incoming, self._options, remote=output.body is None)
        if not isinstance(media, Media):
            return media
        incoming.finish()
        incoming.hold = True  # if the storage fails, the next attempt need not download the file again
        location = self._storage.keep(incoming, job_id=output.job_id, position=output.position, media=media)
        incoming.hold = False
        return StoredFile(location, incoming.size, incoming.sha256, media)

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
        self._storage.partials.remove_stale(older_than=max(2 * self._options.timeout, STALE_SECONDS))


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


def _slot_of(output: ClaimedOutput) -> str:
    """Return the host whose slot a download takes. An output whose bytes came with the answer has one of its own."""
    return f"#{output.id}" if output.body is not None else host_of(output)
