"""The Celery tasks: thin doors with stable names. Each may run twice, late or never, and does no harm."""

import gc
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery.exceptions import Reject
from celery.utils.log import get_task_logger
from kombu.exceptions import ChannelError
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from worker import enqueue, state_directory
from worker.addresses import Guard, guarded_adapter
from worker.app import DOWNLOADS, HINT_EXPIRES_SECONDS, POLLS, app, settings
from worker.core import gate as gates
from worker.courier import Courier
from worker.database import check_schema, database_now, described, engine_for
from worker.downloader import Downloader
from worker.errors import NotTrackable, SchemaOutdated, SettingsError, Unavailable, WorkerError
from worker.hosted_api import HostedApi
from worker.late_looks import LateLooks
from worker.leases import LeaseKeeper
from worker.notifier import refusal, tell
from worker.once import locked_property
from worker.poller import IN_FLIGHT, Poller, PollReport, Progress
from worker.process_id import dead, holder_name
from worker.pruner import Retention
from worker.pruner import prune as prune_jobs
from worker.redelivery import DELIVERIES_MOST, Deliveries, Outage, TooManyDeliveries, remote_id_of
from worker.scrubber import Scrubber, shared_scrubber
from worker.sent_requests import SentRequests, old_files, processes_with_files, remove_files, sent_by
from worker.shared_budget import SharedBudget, redis_client
from worker.store.claims import holders, waiting_outputs
from worker.store.crashes import Released, release_crashed
from worker.store.events import release_events
from worker.store.gates import locked_gate, save_gate
from worker.store.history import sample
from worker.store.repair import Repairer
from worker.stores import storage_for
from worker.transport_guard import shown
from worker.vendor.submissions import planned_job
from worker.wake_ups import listen
from worker.webhooks import AT_ONCE, Webhooks

log = get_task_logger(__name__)

SWEEP_LIMIT = 1_000
DOWNLOAD_THREADS = 64
DATABASE_AWAY_SECONDS = 1.0
COUNT_TIMEOUT_SECONDS = 2.0
DATABASE_ERRORS = (SQLAlchemyError, Unavailable)
GARBAGE_THRESHOLDS = (20_000, 20, 50)
NOTHING_HELD = Released(0, (), (), ())
PRUNE_SECONDS = 300.0  # what is left is for the next hour: a prune must not take a place of the pool for long
SAMPLE_AGAIN = timedelta(seconds=10)
OLD_FILES_SECONDS = 86_400.0  # of a boot or a container before: nobody here knows whether its processes live
TAKEN_WITHIN = timedelta(seconds=5)  # a message that left its queue is claimed within it, or was lost


class ProcessResources:
    """What the tasks of one process share. A forked child makes its own.

    A worker process makes what its queues need as it starts (`make_for`). Anywhere else (`task.apply()`, a shell) each
    resource is made on first use, by one thread while the others wait.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()  # set when the worker shuts down: nothing new is begun
        self._release_lock = threading.Lock()

    @locked_property
    def engine(self) -> Engine:
        """This process's engine."""
        return engine_for(settings.database)

    @locked_property
    def scrubber(self) -> Scrubber:
        """Takes the keys out of texts."""
        return shared_scrubber(settings.secret_texts)

    @locked_property
    def leases(self) -> LeaseKeeper:
        """Holds this process's claims."""
        holder = holder_name()
        return LeaseKeeper(
            self.engine,
            lease=timedelta(seconds=settings.recovery_seconds),
            holder=holder,
            sent=SentRequests(sent_folder(), holder),
        )

    @locked_property
    def api(self) -> HostedApi:
        """The hosted API; mount an adapter of your own on `parts().api.session` if you must."""
        return HostedApi(
            settings.api,
            self.scrubber,
            timeout=settings.sd_api_timeout,
            connections=IN_FLIGHT,
            ca_bundle=settings.ca_bundle,
            proxy=settings.proxy,
            user_agent=settings.user_agent,
            status_words=settings.status_words,
        )

    @locked_property
    def poller(self) -> Poller:
        """Polls, and listens for wake-ups."""
        poller = Poller(
            engine=self.engine,
            api=self.api,
            budget=SharedBudget(settings.redis),
            leases=self.leases,
            keys=settings.keys,
            rps=settings.rps,
            pace=settings.pace,
            api_timeout=settings.sd_api_timeout,
            queue_downloads=lambda ids: self.courier.send("downloads", lambda: queue_downloads(ids)) if ids else None,
            tell=lambda ids: self.courier.send("on_done", lambda: self.tell(ids)) if ids else None,
            late_looks=settings.late_look_seconds,
        )
        listen(settings.redis, poller.wake)
        if self.stopping.is_set():
            poller.stop()
        return poller

    @locked_property
    def late_looks(self) -> LateLooks:
        """Asks about expired jobs again."""
        looks = LateLooks(
            engine=self.engine,
            api=self.api,
            budget=SharedBudget(settings.redis),
            keys=settings.keys,
            rps=settings.rps,
            after=settings.late_look_seconds,
            api_timeout=settings.sd_api_timeout,
            queue_downloads=queue_downloads,
            tell=self.tell,
        )
        if self.stopping.is_set():
            looks.stop()
        return looks

    @locked_property
    def deliveries(self) -> Deliveries:
        """Counts the deliveries of messages that end their process."""
        return Deliveries(redis_client(settings.redis, seconds=COUNT_TIMEOUT_SECONDS))

    @locked_property
    def outage(self) -> Outage:
        """How long messages wait while the database is away."""
        return Outage(self._database_answers)

    def _database_answers(self) -> bool:
        try:
            check_schema(self.engine)
        except WorkerError:
            return False
        return True

    @locked_property
    def courier(self) -> Courier:
        """Sends messages, so that no poll run waits for a broker that is slow or away."""
        return Courier()

    @locked_property
    def downloader(self) -> Downloader:
        """Downloads."""
        guard = Guard(settings.allowed_networks)
        return Downloader(
            engine=self.engine,
            leases=self.leases,
            storage=storage_for(settings),
            guard=guard,
            adapter=guarded_adapter(guard, connections=DOWNLOAD_THREADS),
            scrubber=self.scrubber,
            max_bytes=settings.output_max_bytes,
            max_pixels=settings.output_max_pixels,
            timeout=settings.output_timeout,
            deadline=settings.output_deadline,
            tell=self.tell,
            per_host=settings.downloads_per_host,
            user_agent=settings.user_agent,
        )

    @locked_property
    def webhooks(self) -> Webhooks:
        """Tells receivers of final jobs."""
        guard = Guard(settings.webhook_networks)
        return Webhooks(
            engine=self.engine,
            leases=self.leases,
            guard=guard,
            adapter=guarded_adapter(guard, connections=AT_ONCE),
            scrubber=self.scrubber,
            secrets=settings.webhook_secrets,
            user_agent=settings.user_agent,
        )

    @locked_property
    def repairer(self) -> Repairer:
        """Repairs rows in a state that no step of ours leaves behind."""
        return Repairer(self.engine)

    def make_for(self, queues: Container[str]) -> None:
        """Make what the tasks on these queues need, before the first task comes. No server is asked for anything."""
        # What was imported stays for ever: looking through it again and again took a tenth of all processor time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        if POLLS in queues:
            _ = self.poller, self.courier
            if settings.webhook_secrets:
                _ = self.webhooks
        if DOWNLOADS in queues:
            _ = self.downloader

    def stop(self) -> None:
        """Begin nothing new. Safe in a signal handler: it makes nothing."""
        self.stopping.set()
        for name in ("poller", "late_looks"):  # one that is being made just now looks at `stopping` itself
            made = self.__dict__.get(name)
            if made is not None:
                made.stop()

    def look_back(self) -> None:
        """Release what dead processes held, once, before anything is claimed: a new claim would hide the crash."""
        with self._release_lock:
            if self._looked_back:
                return
            with self.engine.begin() as connection:
                freed = _freed(connection)
                holding = holders(connection)
            self._looked_back = True
        folder = sent_folder()
        gone = set(dead(processes_with_files(folder))) | old_files(folder, seconds=OLD_FILES_SECONDS)
        remove_files(folder, gone - holding - {holder_name()})
        _say(freed)

    swept_at = 0.0
    sample_at = 0.0
    _looked_back = False
    ticks = False  # whether a ticker in this process takes up what a run leaves (in a prefork child none does)

    def tell(self, job_ids: Sequence[int] | None) -> None:
        """Tells web apps of final jobs; trouble with the broker leaves it to the next sweep."""
        if job_ids is not None and not job_ids:
            return
        _softly("on_done", lambda: tell(self.engine, _send_on_done, job_ids))


_pruning = threading.Lock()
_repairing = threading.Lock()


_parts: dict[int, ProcessResources] = {}  # by process id: a forked child finds none of its own, and makes them
_parts_lock = threading.RLock()  # a signal handler may come while its own thread holds it


def parts() -> ProcessResources:
    """Return the resources of this process."""
    pid = os.getpid()
    found = _parts.get(pid)
    if found is None:
        with _parts_lock:
            found = _parts.get(pid)
            if found is None:
                found = _parts[pid] = ProcessResources()
    return found


def _new_parts_lock() -> None:
    """In a forked child: a thread that held the lock in the parent is not there to release it."""
    global _parts_lock
    _parts_lock = threading.RLock()


os.register_at_fork(after_in_child=_new_parts_lock)


def sent_folder() -> Path:
    """Return the directory of the files that say which claims led to a request."""
    try:
        return settings.state / "sent"
    except SettingsError:  # nothing can be written anywhere: then every claim counts
        return state_directory.chosen(settings.state_directory) / "sent"


def queue_downloads(output_ids: Sequence[int]) -> None:
    """Puts download tasks on their queue. If the broker is away the sweep does it later."""

    def publish() -> None:
        with app.producer_pool.acquire(block=True, timeout=5) as producer:
            for output_id in output_ids:
                download.apply_async((output_id,), producer=producer, queue=DOWNLOADS)

    if output_ids:
        _softly("downloads", publish)


def _send_on_done(task: str, queue: str, job_id: int) -> None:
    """Send, once more where a connection of the pool was lost meanwhile. Celery's own retries would take too long."""
    try:
        _send_once(task, queue, job_id)
    except Exception as error:
        if refusal(error) is not None:
            raise
        _send_once(task, queue, job_id)


def _send_once(task: str, queue: str, job_id: int) -> None:
    with app.producer_pool.acquire(block=True, timeout=5) as producer:
        try:
            app.send_task(task, (job_id,), queue=queue, producer=producer, retry=False, ignore_result=True)
        except Exception:
            producer.__connection__.collect()  # RabbitMQ closes the channel of what it refuses: the next gets a new one
            raise


def _softly(what: str, publish: Callable[[], object]) -> None:
    try:
        publish()
    except (BrokerError, OSError) as error:
        log.warning("the broker is away, the sweep will send it what=%s reason=%s", what, type(error).__name__)


# ── the work, as tasks and tickers start it ───────────────────────────────────────────────────────────────────────────


def run_polls(*, gives_way: bool = False, progress: Progress | None = None) -> str:
    """One poll run, in a few words; one that gives way ends when another one is asked for."""
    own = parts()
    try:
        own.look_back()
        report = own.poller.run(gives_way=gives_way, finish=not own.ticks, progress=progress)
    except DATABASE_ERRORS as error:
        log.error("polling waits for the database reason=%s", described(error, settings.database))
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"
    return "a run is on already" if report is None else str(report)


class ProgressEvents:
    """Tells Celery's monitors how far a task is, from the courier's thread: never two words at once."""

    def __init__(self, request: Any) -> None:
        self._uuid, self._hostname = request.id, request.hostname  # now: the courier's thread has no request
        self._on_its_way = False

    def __call__(self, report: PollReport, in_flight: int) -> None:
        """Says in words and in numbers what was done so far."""
        if self._on_its_way:
            return
        self._on_its_way = True
        told: dict[str, object] = {
            "result": f"{report}; {in_flight} in flight",  # the one place where Flower shows it
            "asked": report.asked,
            "answers": dict(report.answers),
            "in_flight": in_flight,
        }
        parts().courier.send("progress", lambda: self._send(told))

    def _send(self, told: dict[str, object]) -> None:
        try:
            with app.events.default_dispatcher(hostname=self._hostname) as dispatcher:
                dispatcher.send("task-progress", uuid=self._uuid, retry=True, retry_policy={"max_retries": 1}, **told)
        except Exception as error:  # each transport has errors of its own; it was only to be looked at
            log.debug("a monitor was not told of the progress reason=%s", type(error).__name__)
        finally:
            self._on_its_way = False


def run_sweep() -> str:
    """Puts back what a lost message or a dead process left."""
    own = parts()
    own.swept_at = time.monotonic()
    patience = _patience()
    try:
        with own.engine.begin() as connection:
            now = database_now(connection)
            freed = _freed(connection)
            lost = now - patience
            output_ids = waiting_outputs(connection, now=now, queued_before=lost, limit=SWEEP_LIMIT)
    except DATABASE_ERRORS as error:
        log.error("the sweep waits for the database reason=%s", described(error, settings.database))
        return "the database is away"
    queue_downloads(output_ids)
    own.tell(None)
    _say(freed)
    _repair(own)
    _sample(own)
    _look_late(own)
    return f"{len(output_ids)} downloads put back" if output_ids else "nothing to put back"


def _freed(connection: Connection) -> Released:
    gone = dead(holders(connection))
    if not gone:
        return NOTHING_HELD
    now = database_now(connection)
    release_events(connection, gone, due_at=now)
    return release_crashed(connection, gone, now=now, sent=sent_by(sent_folder(), gone))


def _say(freed: Released) -> None:
    if freed.rows:
        log.warning("work of dead processes is taken up again rows=%s", freed.rows)
    if freed.jobs or freed.outputs:
        log.error("set aside, its processes died again and again jobs=%s outputs=%s", freed.jobs, freed.outputs)


def _repair(own: ProcessResources) -> None:
    """Repair rows in a state that no step of ours leaves behind, in transactions of its own."""
    if not _repairing.acquire(blocking=False):
        return
    try:
        repaired = own.repairer.run()
    except DATABASE_ERRORS as error:
        log.warning("a repair waits for the database reason=%s", described(error, settings.database))
        return
    finally:
        _repairing.release()
    if repaired.jobs or repaired.outputs or repaired.claims:
        log.warning(
            "repaired rows that were left in no proper state jobs_ended=%s outputs_cancelled=%s claims_released=%s",
            *(len(repaired.jobs), repaired.outputs, repaired.claims),
        )
    own.tell(repaired.jobs)


def _look_late(own: ProcessResources) -> None:
    """Have expired jobs whose look is due asked about, in a thread of its own: no sweep waits for the API."""
    try:
        own.late_looks.start()
    except DATABASE_ERRORS as error:
        log.warning("late looks wait for the database reason=%s", described(error, settings.database))


def _sample(own: ProcessResources) -> None:
    """Writes the minute's line of history, in a transaction of its own: trouble with it hurts no sweep."""
    if time.monotonic() < own.sample_at:
        return
    try:
        with own.engine.begin() as connection:
            wait = sample(connection, now=database_now(connection), full_rps=settings.rps)
    except DATABASE_ERRORS as error:
        log.warning("the history lacks a line reason=%s", described(error, settings.database))
        wait = SAMPLE_AGAIN
    own.sample_at = time.monotonic() + wait.total_seconds()


def run_webhooks() -> int:
    """Begins to deliver the webhooks that are due; how many."""
    try:
        return parts().webhooks.run()
    except DATABASE_ERRORS as error:
        log.error("webhooks wait for the database reason=%s", described(error, settings.database))
        return 0


def run_prune() -> str:
    """Removes what retention says, for a while; what came of it, in a few words."""
    if settings.prune_seconds is None:
        return "nothing is pruned: PRUNE_AFTER is not set"
    if not _pruning.acquire(blocking=False):
        return "a prune is on already"
    until = time.monotonic() + PRUNE_SECONDS
    wanted = Retention(
        older_than=timedelta(seconds=settings.prune_seconds),
        states=settings.states_to_prune,
        remove_files=settings.prune_files == "remove",
    )
    own = parts()
    try:
        done = prune_jobs(
            own.engine, settings, wanted, go_on=lambda: time.monotonic() < until and not own.stopping.is_set()
        )
    except DATABASE_ERRORS as error:
        log.error("pruning waits for the database reason=%s", described(error, settings.database))
        return "the database is away"
    finally:
        _pruning.release()
    if done.jobs:
        log.info("pruned jobs=%s outputs=%s files=%s bytes=%s", done.jobs, done.outputs, done.files, done.bytes)
    if done.kept:
        log.error("files could not be removed, their jobs stay jobs=%s reason=%s", done.kept, done.reason)
    return f"{done.jobs} jobs pruned"


def _patience() -> timedelta:
    """How old a message of an output that nobody took must be to count as lost: not old, where the queue is empty."""
    try:
        with app.connection_for_read(connect_timeout=2) as connection:
            waiting = connection.default_channel.queue_declare(DOWNLOADS, passive=True).message_count
    except ChannelError:
        waiting = 0  # there is no such queue: on Redis that is an empty one
    except (BrokerError, OSError):
        waiting = None
    whole = timedelta(seconds=settings.recovery_seconds)
    return min(whole, TAKEN_WITHIN) if waiting == 0 else whole


def doubt_keys(accounts: Iterable[str]) -> None:
    """Have the keys of these accounts tried, each by one call alone, before they are used at full speed.

    For all accounts as a worker starts, and for those whose key has changed since.
    """
    with parts().engine.begin() as connection:
        now = database_now(connection)
        for account in sorted(accounts):
            save_gate(connection, gates.unproven(locked_gate(connection, "account", account), now=now))


# ── the tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@app.task(name="worker.track", bind=True, ignore_result=False, acks_late=True, throws=(WorkerError,))
def track(self: Any, remote: Any, **options: Any) -> int:
    """Inserts the job once; its result is the job's id."""
    own = parts()
    redelivered = bool((self.request.delivery_info or {}).get("redelivered"))
    try:
        with own.deliveries.counted(self.request.id, redelivered=redelivered):
            job_id, created = enqueue.tracked([remote], **options)[0]
        own.outage.over()
    except (Unavailable, SchemaOutdated):
        own.outage.wait(own.stopping)
        raise Reject("the database is away", requeue=True) from None
    except TooManyDeliveries:
        log.error(
            "message set aside, its process died at each delivery remote=%s size=%s deliveries=%s",
            *(shown(own.scrubber.text(remote_id_of(remote))), len(str(remote)), DELIVERIES_MOST),
        )
        raise Reject("its process died at each delivery", requeue=False) from None
    except TypeError as wrong:
        raise NotTrackable(parts().scrubber.text(f"worker.track was called wrongly: {wrong}")) from None
    except WorkerError as wrong:
        raise type(wrong)(parts().scrubber.text(str(wrong))) from None
    where = {name: options.get(name) for name in ("fetch_url", "endpoint")}
    if created and planned_job(remote, settings.api, **where, words=settings.status_words).submission.outputs:
        # Ready at once: nothing but a sweep would find its outputs.
        _softly("sweep", lambda: sweep.apply_async(expires=HINT_EXPIRES_SECONDS))
    return job_id


@app.task(name="worker.nudge", acks_late=True, throws=(WorkerError,))
def nudge(remote_id: str | int, account: str | None = None) -> str:
    """A hint that a job may be ready: it is asked about as soon as its last request is long enough ago."""
    return f"{enqueue.nudge(remote_id, account)} brought forward"


@app.task(name="worker.cancel", throws=(WorkerError,))
def cancel(job_id: int) -> str:
    """Cancels a job that is not final."""
    return "cancelled" if enqueue.cancel(job_id) else "unchanged"


@app.task(name="worker.retry", throws=(WorkerError,))
def retry(job_id: int) -> str:
    """Takes a failed or expired job up again."""
    return "taken up again" if enqueue.retry(job_id) else "unchanged"


@app.task(name="worker.poll", bind=True)
def poll(self: Any) -> str:
    """Claims and asks until nothing is due for a second, then publishes its successor."""
    said = run_polls(progress=ProgressEvents(self.request))
    if said != "a run is on already" and not parts().stopping.is_set():
        _softly("poll", lambda: poll.apply_async(expires=HINT_EXPIRES_SECONDS))
    return said


@app.task(name="worker.download")
def download(output_id: int) -> str:
    """Stores one output."""
    if isinstance(output_id, bool) or not isinstance(output_id, int):
        return "nothing to do: no output id"
    own = parts()
    try:
        own.look_back()
        return own.downloader.run(output_id)
    except DATABASE_ERRORS as error:
        said = described(error, settings.database)
        log.error("a download waits for the database output=%s reason=%s", output_id, said)
        time.sleep(DATABASE_AWAY_SECONDS)
        return "the database is away"


@app.task(name="worker.sweep")
def sweep() -> str:
    """Puts back what a lost message or a dead process left."""
    return run_sweep()


@app.task(name="worker.prune")
def prune() -> str:
    """Removes finished jobs that are old enough, where PRUNE_AFTER says how old that is."""
    return run_prune()
