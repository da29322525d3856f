"""The resources of one process, each made once: the engine, the poller, the downloader and their helpers."""

import gc
import os
import threading
from collections.abc import Container, Sequence
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Engine

from worker.app import app, settings
from worker.coordination.leases import LeaseKeeper
from worker.coordination.publisher import Publisher
from worker.coordination.rate_limiter import RateLimiter, redis_client
from worker.coordination.sent_requests import SentRequests, old_files, processes_with_files, remove_files
from worker.coordination.wakeups import WakeUps, listen
from worker.core.pacing.backlog import OrderBacklog
from worker.core.queues import DOWNLOADS, POLLS
from worker.downloads.downloader import Downloader
from worker.downloads.options import download_options
from worker.errors import WorkerError
from worker.net.address_guard import Guard, guarded_adapter
from worker.net.pooled_adapter import PooledAdapter
from worker.notify.on_done import notify
from worker.notify.webhook_sender import WebhookSender
from worker.notify.webhooks import MAX_DELIVERIES, Webhooks
from worker.ordering.candidate_checks import CandidateChecks
from worker.ordering.options import AfterRecording, order_options
from worker.ordering.order_client import OrderClient
from worker.ordering.submitter import Submitter
from worker.polling.api_client import MAX_ANSWER_BYTES, ApiClient
from worker.polling.late_looks import LateLooks
from worker.polling.options import MAX_IN_FLIGHT, AfterCommit, poll_options
from worker.polling.poller import Poller
from worker.process.dead_claims import log_released, release_dead_claims, sent_folder
from worker.process.publishing import log_broker_errors, queue_downloads, send_on_done
from worker.process.redelivery import DatabaseOutage, DeliveryCounter
from worker.process.run_requests import RunRequests
from worker.storage.select import public_addresses, storage_for
from worker.store.claims import claim_holders
from worker.store.engine import check_schema, engine_for
from worker.store.repair import Repairer
from worker.system.locked_cache import locked_property
from worker.system.process_identity import dead_holders, holder_name
from worker.system.redaction import Scrubber, shared_scrubber

Part = TypeVar("Part", Poller, Submitter, CandidateChecks, LateLooks)

DOWNLOAD_THREADS = 64
COUNT_TIMEOUT_SECONDS = 2.0
GARBAGE_THRESHOLDS = (20_000, 20, 50)
OLD_FILES_SECONDS = 86_400.0  # files of an earlier boot or container: it is unknown whether their processes still run


class ProcessResources:
    """The resources that the tasks of one process share. A forked child makes its own.

    A worker process makes what its queues need as it starts (`make_for`). Anywhere else (`task.apply()`, a shell) each
    resource is made on first use, by one thread while others wait.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()  # set when the worker shuts down: nothing new is started
        self._release_lock = threading.Lock()

    @locked_property
    def engine(self) -> Engine:
        """The database engine of this process."""
        return engine_for(settings.database)

    @locked_property
    def scrubber(self) -> Scrubber:
        """Removes keys from texts."""
        return shared_scrubber(settings.secret_texts)

    @locked_property
    def leases(self) -> LeaseKeeper:
        """Keeps the leases of this process's claims."""
        holder = holder_name()
        return LeaseKeeper(
            self.engine,
            lease=timedelta(seconds=settings.recovery_seconds),
            holder=holder,
            sent=SentRequests(sent_folder(), holder),
        )

    @locked_property
    def api(self) -> ApiClient:
        """The client of the hosted API. Mount an adapter on `process_resources().api.session` if needed."""
        return ApiClient(
            settings.api,
            self.scrubber,
            timeout=settings.sd_api_timeout,
            connections=MAX_IN_FLIGHT,
            ca_bundle=settings.ca_bundle,
            proxy=settings.proxy,
            user_agent=settings.user_agent,
            status_words=settings.status_words,
        )

    @locked_property
    def backlog(self) -> OrderBacklog:
        """How many orders wait for a slot."""
        return OrderBacklog()

    @locked_property
    def poller(self) -> Poller:
        """Polls jobs, and listens for wake-ups."""
        poller = Poller(
            engine=self.engine,
            api=self.api,
            budget=RateLimiter(settings.redis),
            leases=self.leases,
            options=poll_options(settings),
            after_commit=AfterCommit(
                queue_downloads=self._queue_downloads_soon,
                notify=self._notify_soon,
                slots_freed=self._slots_freed,
            ),
            backlog=self.backlog,
        )
        listen(settings.redis, self._wake)
        return self._unless_stopping(poller)

    def _queue_downloads_soon(self, output_ids: Sequence[int]) -> None:
        if output_ids:
            self.publisher.send("downloads", lambda: queue_downloads(output_ids))

    def _notify_soon(self, job_ids: Sequence[int]) -> None:
        if job_ids:
            self.publisher.send("on_done", lambda: self.notify(job_ids))

    def _slots_freed(self) -> None:
        """Look for orders at once. In a prefork pool, another process may be the one that sends them."""
        self.submitter.wake()
        if not self.ticks:
            self.wake_ups.send()

    @locked_property
    def wake_ups(self) -> WakeUps:
        """Wakes all worker processes."""
        return WakeUps(settings.redis)

    def _wake(self) -> None:
        """Look for due jobs and orders at once."""
        self.poller.wake()
        self.submitter.wake()

    @locked_property
    def submitter(self) -> Submitter:
        """Sends orders."""
        options = order_options(settings)
        adapter = PooledAdapter(limit=MAX_ANSWER_BYTES, connections=1, ca_bundle=settings.ca_bundle)
        submitter = Submitter(
            engine=self.engine,
            client=OrderClient(options, self.scrubber, adapter),
            budget=RateLimiter(settings.redis),
            leases=self.leases,
            options=options,
            backlog=self.backlog,
            after=AfterRecording(
                poll=lambda: self.poller.wake(),
                queue_downloads=self._queue_downloads_soon,
                notify=self._notify_soon,
            ),
        )
        return self._unless_stopping(submitter)

    @locked_property
    def candidate_checks(self) -> CandidateChecks:
        """Asks the API about the jobs that its calls named for uncertain orders."""
        return self._unless_stopping(
            CandidateChecks(
                engine=self.engine,
                api=self.api,
                budget=RateLimiter(settings.redis),
                options=poll_options(settings),
                attached=lambda: self.poller.wake(),
            )
        )

    @locked_property
    def late_looks(self) -> LateLooks:
        """Polls expired jobs again."""
        return self._unless_stopping(
            LateLooks(
                engine=self.engine,
                api=self.api,
                budget=RateLimiter(settings.redis),
                options=poll_options(settings),
                after_commit=AfterCommit(queue_downloads=queue_downloads, notify=self.notify),
            )
        )

    def _unless_stopping(self, part: Part) -> Part:
        """Return a part that was just made, stopped if the process is shutting down."""
        if self.stopping.is_set():
            part.stop()
        return part

    @locked_property
    def deliveries(self) -> DeliveryCounter:
        """Counts the deliveries of messages that end their process."""
        return DeliveryCounter(redis_client(settings.redis, seconds=COUNT_TIMEOUT_SECONDS))

    @locked_property
    def outage(self) -> DatabaseOutage:
        """Delays messages while the database is away."""
        return DatabaseOutage(lambda: _database_answers(self.engine))

    @locked_property
    def publisher(self) -> Publisher:
        """Publishes messages in the background, so that no poll run waits for a slow broker."""
        return Publisher()

    @locked_property
    def run_requests(self) -> RunRequests:
        """Requests runs of polls and sweeps."""
        return RunRequests(app, settings.redis, self.publisher)

    @locked_property
    def downloader(self) -> Downloader:
        """Downloads outputs."""
        guard = Guard(settings.allowed_networks)
        return Downloader(
            engine=self.engine,
            leases=self.leases,
            storage=storage_for(settings),
            guard=guard,
            adapter=guarded_adapter(guard, connections=DOWNLOAD_THREADS),
            scrubber=self.scrubber,
            options=download_options(settings),
            notify=self.notify,
        )

    @locked_property
    def webhooks(self) -> Webhooks:
        """Delivers webhooks about final jobs."""
        guard = Guard(settings.webhook_networks)
        return Webhooks(
            engine=self.engine,
            leases=self.leases,
            sender=WebhookSender(
                guard=guard,
                adapter=guarded_adapter(guard, connections=MAX_DELIVERIES),
                secrets=settings.webhook_secrets,
                user_agent=settings.user_agent,
                address_of=public_addresses(settings),
            ),
            scrubber=self.scrubber,
        )

    @locked_property
    def repairer(self) -> Repairer:
        """Repairs rows in a state that no known transition leaves behind."""
        return Repairer(self.engine)

    def make_for(self, queues: Container[str]) -> None:
        """Make what the tasks on these queues need, before the first task arrives. Sends no request to any server."""
        # Imported modules are never freed. Scanning them at each collection took a tenth of all processor time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        if POLLS in queues:
            _ = self.poller, self.submitter, self.publisher, self.run_requests
            if settings.webhook_secrets:
                _ = self.webhooks
        if DOWNLOADS in queues:
            _ = self.downloader

    def stop(self) -> None:
        """Start nothing new. Safe in a signal handler: it makes no resource."""
        self.stopping.set()
        for name in ("poller", "submitter", "candidate_checks", "late_looks"):  # see `_unless_stopping` for new ones
            resource = self.__dict__.get(name)
            if resource is not None:
                resource.stop()

    def release_dead_claims(self) -> None:
        """Release the claims of dead processes, once, before anything is claimed: a new claim would hide the crash."""
        with self._release_lock:
            if self._released_dead_claims:
                return
            with self.engine.begin() as connection:
                released = release_dead_claims(connection)
                active_holders = claim_holders(connection)
            self._released_dead_claims = True
        folder = sent_folder()
        ended = set(dead_holders(processes_with_files(folder))) | old_files(folder, seconds=OLD_FILES_SECONDS)
        remove_files(folder, ended - active_holders - {holder_name()})
        log_released(released)

    swept_at = 0.0
    sample_at = 0.0
    housekeeping_at = 0.0
    _released_dead_claims = False
    ticks = False  # whether a ticker in this process continues after a run (a prefork child has none)

    def notify(self, job_ids: Sequence[int] | None) -> None:
        """Send the `on_done` calls of final jobs. If the broker fails, the next sweep sends them."""
        if job_ids is not None and not job_ids:
            return
        log_broker_errors("on_done", lambda: notify(self.engine, send_on_done, job_ids))


def _database_answers(engine: Engine) -> bool:
    try:
        check_schema(engine)
    except WorkerError:
        return False
    return True


_resources: dict[int, ProcessResources] = {}  # by process id, so that a forked child makes its own
_resources_lock = threading.RLock()  # reentrant: a signal handler may run while its thread holds the lock


def process_resources() -> ProcessResources:
    """Return the resources of this process."""
    pid = os.getpid()
    resources = _resources.get(pid)
    if resources is None:
        with _resources_lock:
            resources = _resources.get(pid)
            if resources is None:
                resources = _resources[pid] = ProcessResources()
    return resources


def _new_resources_lock() -> None:
    """Replace the lock in a forked child: a thread of the parent may have held it."""
    global _resources_lock
    _resources_lock = threading.RLock()


os.register_at_fork(after_in_child=_new_resources_lock)
