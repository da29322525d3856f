"""What stands in the way: every server, setting and rule that the work depends on, each with what to do about it."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kombu.connection import Connection as BrokerConnection
from kombu.exceptions import ChannelError, KombuError
from kombu.exceptions import OperationalError as BrokerError
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from worker.coordination.rate_limiter import redis_client
from worker.core.on_done import task_and_queue
from worker.errors import SettingsError, StorageTrouble, WorkerError
from worker.operations.overview import HEALTHY_SECONDS, Overview, overview
from worker.settings import Settings
from worker.storage.select import storage_for
from worker.store.database_identity import database_id
from worker.store.engine import check_schema, database_now, engine_for, is_writable, shown_url, translate_errors
from worker.store.events import UndeliveredEvents, count_overdue_events, undelivered_events
from worker.store.holds import work_limits
from worker.store.on_done import GIVE_UP, recent_on_done, refused_calls, unsent_calls
from worker.store.reports import live
from worker.store.reports.server_state import HISTORY_MOST, ServerState, server_state
from worker.system.own_package import OWN_PACKAGE, advice, other_worker, python_path
from worker.system.process_identity import host_name

SKEW_SECONDS = 5.0
SLOW_SECONDS = 0.5
PING_SECONDS = 2.0
REDIS_LEAST = (6, 2)
FULL_SHARE = 0.9
UNTOLD_LATE_SECONDS = 60.0
UNSTORED_LATE_SECONDS = 3_600.0
UNREACHABLE_LATE_SECONDS = 300.0
STALE_PARTIAL_SECONDS = 2 * 3_600.0
SOON_SECONDS = 60.0
NAMED_MOST = 5
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """A worker process that answers: the queues that it consumes, and the id of its database where it says one."""

    queues: frozenset[str]
    database: str | None = None


Nodes = Callable[[], Mapping[str, Node]]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `message` says what was seen, and where it is not ok, what to do."""

    name: str
    ok: bool
    message: str


def examine(settings: Settings, nodes: Nodes, *, queues: Mapping[str, str]) -> Iterator[Check]:
    """All checks, one after the other; none of them raises. `queues` is what each queue is for, by its name."""
    yield _names()
    yield from _settings(settings)
    database = _database(settings)
    yield database
    if database.ok:
        yield from _with_tables(settings)
        yield from _server(settings)
    yield _redis(settings)
    if settings.broker_url is not None:
        yield _broker(settings)
    yield from _processes(settings, nodes, queues)
    yield from _storage(settings)


def alive(settings: Settings) -> Check:
    """Whether the work is being done: nothing is due for long, or requests went out lately. For containers."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            return _work(overview(connection, settings))
    except WorkerError as wrong:
        return Check("work", False, str(wrong))


def _settings(settings: Settings) -> Iterator[Check]:
    """Settings that are wrong and stop one process alone, or keep a file of keys from being read."""
    wrong = list(settings.wrong)
    if settings.keys.trouble is None:
        len(settings.keys)  # reads the file
    if settings.keys.trouble is not None:
        wrong.append(f"SD_API_KEYS_FILE {settings.keys.trouble}")
    if wrong:
        yield Check("settings", False, "; ".join(wrong))


def _names() -> Check:
    """Whether Python finds our package by its name, and not the app's."""
    other = other_worker(python_path(os.environ.get("PYTHONPATH", "")))
    return (
        Check("names", True, f"the package is {OWN_PACKAGE}") if other is None else Check("names", False, advice(other))
    )


def _database(settings: Settings) -> Check:
    engine = engine_for(settings.database)
    where = shown_url(engine.url)
    try:
        check_schema(engine)
        began = time.monotonic()
        with translate_errors(settings.database), engine.connect() as connection:
            skew = (database_now(connection) - datetime.now(UTC)).total_seconds()
            writable = is_writable(connection)
        took = time.monotonic() - began
    except WorkerError as wrong:
        return Check("database", False, str(wrong))
    except SQLAlchemyError as error:
        return Check("database", False, f"{where} refused a query ({type(error).__name__}): look at its log")
    if not writable:
        advice = "is it a standby, or was it set to read-only? Work goes on as soon as it can be written to"
        return Check("database", False, f"{where} is read-only: {advice}")
    said = f"{where} answers in {took * 1e3:.0f} ms, its schema is of this version"
    if took > SLOW_SECONDS:
        return Check("database", False, f"{where} took {took:.1f} s for a query: is it overloaded, or far away?")
    if abs(skew) > SKEW_SECONDS:
        ahead = "ahead of" if skew > 0 else "behind"
        return Check(
            "database",
            False,
            f"its clock is {abs(skew):.0f} s {ahead} this machine's: run NTP on both (dues go by its)",
        )
    return Check("database", True, f"{said}, clocks differ by {abs(skew):.2f} s")


def _with_tables(settings: Settings) -> Iterator[Check]:
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            state = overview(connection, settings)
            told = undelivered_events(connection, since=database_now(connection) - timedelta(days=1))
            late_news = count_overdue_events(
                connection, before=database_now(connection) - timedelta(seconds=UNTOLD_LATE_SECONDS)
            )
            claims = _claims(connection, settings)
            on_done = _on_done(connection)
            forgotten = _forgotten(connection, state)
    except WorkerError as wrong:
        yield Check("work", False, str(wrong))
        return
    yield _work(state)
    held = [f"{one.account}: {one.reason}" for one in state.accounts if one.reason is not None]
    held += [f"{one.host}: {one.reason}" for one in state.hosts if one.host != settings.api_host]
    if held:
        yield Check("holds", False, "; ".join(held) + ". Held jobs wait and cost nothing; see `fetch-worker status`")
    else:
        yield Check("holds", True, "no account and no host is held" if state.accounts else "no account has jobs yet")
    yield claims
    yield on_done
    yield forgotten
    waiting = state.unstored
    said = f"{waiting.count} outputs are paid for and not stored yet, the oldest for {waiting.oldest_seconds:.0f} s"
    refused = waiting.trouble.get("unreachable", 0) + waiting.trouble.get("http_error", 0)
    patient = UNREACHABLE_LATE_SECONDS if refused else UNSTORED_LATE_SECONDS
    late = waiting.count > 0 and waiting.oldest_seconds > patient
    trouble = ", ".join(f"{count} {code}" for code, count in sorted(waiting.trouble.items()))
    if late:
        said += f" ({trouble or 'no attempt yet'}): is a `downloads` process running? Links die; see `show`"
    yield Check("outputs", not late, said if waiting.count else "every output that is listed is stored, or given up")
    yield _webhooks(told, late_news)


def _server(settings: Settings) -> Iterator[Check]:
    """The database server's own upkeep: what slows everything down in the course of days."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            state = server_state(connection)
    except WorkerError as wrong:
        yield Check("vacuum", False, str(wrong))
        return
    yield _vacuum(state)
    yield _transactions(state)


def _vacuum(state: ServerState) -> Check:
    if state.autovacuum_off:
        names = ", ".join(state.autovacuum_off)
        return Check("vacuum", False, f"autovacuum is off for {names}: turn it on, or every query gets slower")
    if state.unvacuumed:
        tables = ", ".join(f"{name} ({dead:,} of {rows:,} rows)" for name, dead, rows in state.unvacuumed)
        advice = "look at its settings" if state.autovacuum else "it is off for the whole server"
        return Check("vacuum", False, f"most rows are dead in {tables}: run VACUUM; autovacuum clears them: {advice}")
    if state.history is not None and state.history > HISTORY_MOST:
        versions = f"{state.history:,} old row versions wait to be purged"
        return Check("vacuum", False, f"{versions}: look for long transactions, and at innodb_purge_threads")
    if not state.autovacuum:
        return Check("vacuum", True, "few rows are dead, but autovacuum is off for the whole server: turn it on")
    return Check("vacuum", True, "few rows are dead")


def _transactions(state: ServerState) -> Check:
    if state.open:
        names = "; ".join(
            f"{transaction.name} of {transaction.owner} for {transaction.seconds / 60:.0f} min"
            for transaction in state.open[:NAMED_MOST]
        )
        more = " …" if len(state.open) > NAMED_MOST else ""
        advice = "end them: dead rows can't be cleared away meanwhile, and locked rows wait"
        return Check("transactions", False, f"open for long: {names}{more}. If they are not needed, {advice}")
    if state.isolation is None or state.isolation == "read committed":
        return Check("transactions", True, "none is open for long")
    default = (
        f"none is open for long; the server's default isolation is {state.isolation}: the processes use their own,"
    )
    return Check(
        "transactions", True, f"{default} and `track(session=…)` uses the app's, where a conflict means: try again"
    )


def _on_done(connection: Connection) -> Check:
    """Whether brokers refuse what `on_done` asks for."""
    now = database_now(connection)
    refused = refused_calls(connection, now=now)
    late = unsent_calls(connection, before=now - timedelta(seconds=UNTOLD_LATE_SECONDS))
    if refused.job_id is not None:
        counts = f"{refused.waiting} are tried again, {refused.given_up} were given up after {GIVE_UP.days} days"
        example = f"job {refused.job_id}, {refused.on_done}: {refused.reason}"
        return Check("on_done", False, f"{counts} ({example}): look at that queue of the broker")
    if late:
        return Check("on_done", False, f"{late} are unsent for more than a minute: does a `worker` process run?")
    return Check("on_done", True, "every on_done task of a final job is sent")


def _webhooks(told: UndeliveredEvents, late: int) -> Check:
    if late:
        said = f"{late} are due for more than {UNTOLD_LATE_SECONDS:.0f} s and nobody sends them"
        return Check("webhooks", False, f"{said}: does the `worker` process run, and has it WEBHOOK_SECRET?")
    if not told.waiting and not told.given_up:
        return Check("webhooks", True, "no receiver refuses them")
    said = f"{told.waiting} are tried again, {told.given_up} were given up in the last day, {told.message}"
    return Check("webhooks", False, f"{said}: does the receiver run? `show` has the events of a job")


def _claims(connection: Connection, settings: Settings) -> Check:
    """Claims that somebody should have taken up by now, or that are older than any work can be."""
    now, work = database_now(connection), work_limits(settings)
    grace = timedelta(seconds=settings.recovery_seconds + HEALTHY_SECONDS)
    lost = live.stale_claims(
        connection,
        dead=(),
        expired_before=now - grace,
        polled_before=now - work.poll_max,
        claimed_before=now - work.download_max,
    )
    if not lost:
        return Check("claims", True, "no claim is left of a process that is gone")
    names = ", ".join(f"{one.what} {one.id}" for one in lost[:NAMED_MOST]) + (" …" if len(lost) > NAMED_MOST else "")
    said = f"{len(lost)} rows were taken by processes that are gone, and nobody took them up ({names})"
    return Check("claims", False, f"{said}: is a worker process running? `show` says what to do")


def _forgotten(connection: Connection, state: Overview) -> Check:
    """Jobs past their deadline that nobody asks about soon, so that they don't end either."""
    if state.jobs["pending"] > live.COUNTED_MOST:
        return Check("deadlines", True, "too many jobs wait to look at each: `fetch-worker list --past-deadline`")
    now = database_now(connection)
    found = live.jobs_past_deadline(connection, now=now, later=now + timedelta(seconds=SOON_SECONDS), limit=NAMED_MOST)
    if not found:
        return Check("deadlines", True, "no job past its deadline is forgotten")
    ids = " ".join(str(row.id) for row in found)
    return Check(
        "deadlines", False, f"past their deadline, and not asked about soon: `fetch-worker resume {ids}` asks at once"
    )


def _work(state: Overview) -> Check:
    if state.healthy:
        return Check("work", True, f"the oldest work that is due waits for {state.oldest_due_seconds:.1f} s")
    return Check(
        "work", False, f"work is due for {state.oldest_due_seconds:.0f} s and nobody does it: start a `worker` process"
    )


def _redis(settings: Settings) -> Check:
    client = redis_client(settings.redis, seconds=PING_SECONDS)
    try:
        information: Any = client.info()
        policy = _policy(client)
    except (RedisError, OSError) as error:
        return Check(
            "redis", False, f"REDIS_URL does not answer ({type(error).__name__}): polling goes on slowly without it"
        )
    finally:
        client.close()
    version = str(information.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < REDIS_LEAST:
        return Check("redis", False, f"version {version}: 6.2 is the least that Celery works with")
    used, most = int(information.get("used_memory", 0)), int(information.get("maxmemory", 0))
    if policy not in ("", "noeviction"):
        return Check("redis", False, f"maxmemory-policy is {policy}: messages may vanish; set it to noeviction")
    if most and used > FULL_SHARE * most:
        return Check(
            "redis", False, f"{used // MIB} of {most // MIB} MiB are used: raise maxmemory, or it refuses soon"
        )
    where = maybe_sanitize_url(settings.redis)
    return Check("redis", True, f"{where} answers, version {version}, {used // MIB} MiB used")


def _policy(client: Any) -> str:
    """Empty where a hosted server does not tell."""
    try:
        return str(client.config_get("maxmemory-policy").get("maxmemory-policy", ""))
    except RedisError:
        return ""


def _broker(settings: Settings) -> Check:
    connection = BrokerConnection(settings.broker, connect_timeout=PING_SECONDS)
    where = connection.as_uri()  # without the password
    try:
        connection.ensure_connection(max_retries=1, timeout=PING_SECONDS)
    except (BrokerError, KombuError, OSError) as error:
        return Check("broker", False, f"{where} does not answer ({type(error).__name__}): check BROKER_URL")
    finally:
        connection.release()
    return Check("broker", True, f"{where} answers")


def _processes(settings: Settings, nodes: Nodes, queues: Mapping[str, str]) -> Iterator[Check]:
    try:
        found = nodes()
    except (BrokerError, KombuError, RedisError, OSError) as error:
        yield Check("processes", False, f"nobody can be asked, since the broker is away ({type(error).__name__})")
        return
    yield _on_done_queues(settings, found)
    others = strangers(settings, found)
    if others:
        advice = "give each app a Redis database, or a broker vhost, of its own"
        yield Check("processes", False, f"{', '.join(others)} take our messages into another database: {advice}")
        return
    consumed = frozenset[str]().union(*(node.queues for node in found.values()))
    missing = [f"{queue} ({purpose})" for queue, purpose in queues.items() if queue not in consumed]
    if missing:
        names = ", ".join(sorted(found)) or "none at all"
        yield Check("processes", False, f"nobody consumes {', '.join(missing)}; processes that answer: {names}")
    else:
        yield Check("processes", True, f"{len(found)} worker processes answer: {', '.join(sorted(found))}")


def _on_done_queues(settings: Settings, nodes: Mapping[str, Node]) -> Check:
    """Whether messages for web apps pile up in queues that no process consumes, as far as the broker can tell."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            queues = {task_and_queue(on_done)[1] for on_done in recent_on_done(connection)}
        with BrokerConnection(settings.broker, connect_timeout=PING_SECONDS) as broker:
            broker.ensure_connection(max_retries=1, timeout=PING_SECONDS)
            waiting = {queue: _unconsumed(broker, queue, nodes) for queue in sorted(queues)}
    except (WorkerError, BrokerError, KombuError, RedisError, OSError) as error:
        return Check("on_done queues", True, f"they can't be looked at ({type(error).__name__})")
    piles = [f"{queue} ({count} messages)" for queue, count in waiting.items() if count]
    if piles:
        return Check(
            "on_done queues", False, f"nobody consumes {', '.join(piles)}: start the Celery worker of your app"
        )
    return Check("on_done queues", True, "no message for a web app waits in a queue that nobody consumes")


def _unconsumed(broker: BrokerConnection, queue: str, nodes: Mapping[str, Node]) -> int:
    """Return the messages in a queue without consumers. Redis knows no consumers: there the processes are asked."""
    try:
        with broker.channel() as channel:
            declared = channel.queue_declare(queue, passive=True)
    except (ChannelError, ResponseError):
        return 0  # there is no such queue; on Redis that is an empty one
    if declared.consumer_count or any(queue in node.queues for node in nodes.values()):
        return 0
    return int(declared.message_count)


def strangers(settings: Settings, nodes: Mapping[str, Node]) -> list[str]:
    """The names of the processes that serve another database than these settings name; none where it is away."""
    try:
        with engine_for(settings.database).connect() as connection:
            own = database_id(connection)
    except (SQLAlchemyError, WorkerError, OSError):
        return []
    return sorted(name for name, node in nodes.items() if node.database not in (None, own))


def _storage(settings: Settings) -> Iterator[Check]:
    try:
        storage = storage_for(settings)
        if not settings.storage_url or settings.bucket is not None:
            storage.prepare()  # what somebody named and is missing may be a disk that is not mounted
        with storage.partials.receive(0, f"doctor-{host_name()}-{os.getpid()}") as probe:
            probe.write(b"a few bytes, to see whether it can be written to")
            probe.sync()
    except (StorageTrouble, SettingsError) as wrong:
        yield Check("storage", False, f"{wrong}; outputs wait until it is put right")
        return
    where = settings.storage_url or f"file:{settings.storage_path}"
    folder = storage.partials.folder
    room = shutil.disk_usage(folder).free
    if room < 2 * settings.output_max_bytes:
        said = f"only {room // MIB} MiB are free for {where}"
        yield Check("storage", False, f"{said}: make room, one output may have {settings.output_max_bytes // MIB}")
    else:
        yield Check("storage", True, f"{where} can be written to, {room // MIB} MiB are free")
    stale = [path for path in folder.glob("*.part") if time.time() - path.stat().st_mtime > STALE_PARTIAL_SECONDS]
    if stale:
        yield Check("partials", False, f"{len(stale)} old partial files in {folder}: does a `downloads` process run?")
    else:
        yield Check("partials", True, "no old partial file is left")
