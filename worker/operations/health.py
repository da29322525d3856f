"""Health checks for `doctor`: one check for each server, setting and process, with advice where it fails."""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kombu.connection import Connection as BrokerConnection
from kombu.exceptions import ChannelError, KombuError
from kombu.exceptions import OperationalError as BrokerError
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import RedisError, ResponseError
from sqlalchemy.exc import SQLAlchemyError

from worker.coordination.rate_limiter import redis_client
from worker.core.on_done_name import task_and_queue
from worker.errors import SettingsError, StorageTrouble, WorkerError
from worker.operations.app_migrations import check_app_migrations
from worker.operations.liveness import Check
from worker.operations.overview import overview
from worker.settings import Settings
from worker.storage.select import storage_for
from worker.store.database_identity import database_id
from worker.store.engine import (
    check_schema,
    database_now,
    engine_for,
    is_writable,
    missing_tables,
    shown_url,
    translate_errors,
)
from worker.store.on_done import recent_on_done
from worker.store.reports.server_state import HISTORY_MOST, ServerState, server_state
from worker.system.own_package import OWN_PACKAGE, advice, other_worker, python_path
from worker.system.process_identity import host_name

SKEW_SECONDS = 5.0  # allowed difference of the clocks
SLOW_SECONDS = 0.5  # a query takes a few milliseconds; each claim and each result needs several
PING_SECONDS = 2.0  # a server on the same network answers sooner
REDIS_MINIMUM = (6, 2)  # what Celery needs
FULL_SHARE = 0.9  # of Redis's memory: at the limit it refuses writes, or removes messages
STALE_PARTIAL_SECONDS = 2 * 3_600.0  # far longer than any download
MAX_NAMED = 5  # rows named in one message
MIB = 1 << 20
AREAS = {  # the check that shows each trouble
    "no_worker": "work",
    "polling_stalled": "work",
    "backlog": "work",
    "redis_away": "work",
    "account_refused": "holds",
    "no_key": "holds",
    "wrong_path": "holds",
    "host_not_allowed": "holds",
    "api_unreachable": "holds",
    "account_slowed": "holds",
    "held_by_operator": "holds",
    "uncertain_orders": "orders",
    "lost_claims": "claims",
    "past_deadline": "deadlines",
    "storage": "outputs",
    "no_downloader": "outputs",
    "links_ending": "outputs",
    "outputs_unreachable": "outputs",
    "webhooks_refused": "webhooks",
    "webhooks_given_up": "webhooks",
    "webhooks_late": "webhooks",
    "on_done_refused": "on_done",
    "on_done_late": "on_done",
}
NO_TROUBLE = {
    "work": "due work is done",
    "holds": "no account and no host is held",
    "orders": "the answer to every order that was sent is known",
    "claims": "no dead process holds a claim",
    "on_done": "every on_done task of a final job was sent",
    "deadlines": "every job past its deadline is polled soon",
    "outputs": "every listed output is stored, has failed, or is on its way",
    "webhooks": "every receiver accepts them",
}


@dataclass(frozen=True, slots=True)
class Node:
    """A worker process that answers: the queues it consumes, and the id of its database if it sends one."""

    queues: frozenset[str]
    database: str | None = None


Nodes = Callable[[], Mapping[str, Node]]


def run_checks(settings: Settings, nodes: Nodes, *, queues: Mapping[str, str]) -> Iterator[Check]:
    """Run all checks. None of them raises. `queues` maps each queue's name to its purpose."""
    yield _names()
    yield from _settings(settings)
    database = _database(settings)
    yield database
    if database.ok:
        yield from _with_tables(settings)
        yield from _migrations(settings)
        yield from _server(settings)
    yield _redis(settings)
    if settings.broker_url is not None:
        yield _broker(settings)
    yield from _processes(settings, nodes, queues)
    yield from _storage(settings)


def _settings(settings: Settings) -> Iterator[Check]:
    """Report wrong settings that stop only one kind of process, and a key file that can't be read."""
    problems = list(settings.process_errors)
    if settings.keys.trouble is None:
        len(settings.keys)  # reads the file
    if settings.keys.trouble is not None:
        problems.append(f"SD_API_KEYS_FILE {settings.keys.trouble}")
    if problems:
        yield Check("settings", False, "; ".join(problems))


def _names() -> Check:
    """Check that `import worker` finds this package and not a module of the app."""
    shadowing_module = other_worker(python_path(os.environ.get("PYTHONPATH", "")))
    return (
        Check("names", True, f"the package is {OWN_PACKAGE}")
        if shadowing_module is None
        else Check("names", False, advice(shadowing_module))
    )


def _database(settings: Settings) -> Check:
    engine = engine_for(settings.database)
    url = shown_url(engine.url)
    try:
        check_schema(engine)
        started = time.monotonic()
        with translate_errors(settings.database), engine.connect() as connection:
            skew = (database_now(connection) - datetime.now(UTC)).total_seconds()
            writable = is_writable(connection)
            missing = missing_tables(connection)
        elapsed = time.monotonic() - started
    except WorkerError as error:
        return Check("database", False, str(error))
    except SQLAlchemyError as error:
        return Check(
            "database", False, f"{url} refused a query ({type(error).__name__}): check the log of the database"
        )
    if missing:
        dropped = f"{url} has no table {', '.join(missing)}: restore a backup, or run"
        return Check("database", False, f"{dropped} `fetch-worker migrate`, which makes empty ones")
    if not writable:
        advice = "check whether it is a standby or was set to read-only. Work continues as soon as it accepts writes"
        return Check("database", False, f"{url} is read-only: {advice}")
    message = f"{url} answers in {elapsed * 1e3:.0f} ms, its schema has the current version"
    if elapsed > SLOW_SECONDS:
        return Check(
            "database", False, f"{url} took {elapsed:.1f} s for a query: check whether it is overloaded or far away"
        )
    if abs(skew) > SKEW_SECONDS:
        ahead = "ahead of" if skew > 0 else "behind"
        return Check(
            "database",
            False,
            f"its clock is {abs(skew):.0f} s {ahead} this machine's: run NTP on both (due times use its clock)",
        )
    return Check("database", True, f"{message}, the clocks differ by {abs(skew):.2f} s")


def _with_tables(settings: Settings) -> Iterator[Check]:
    """Report each trouble, and each area without one."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            state = overview(connection, settings)
    except WorkerError as error:
        yield Check("work", False, str(error))
        return
    troubles = defaultdict(list)
    for trouble in state.troubles:
        troubles[AREAS[trouble.code]].append(trouble)
    for area, message in NO_TROUBLE.items():
        for trouble in troubles[area]:
            yield Check(area, False, f"{trouble.text}: {trouble.command}")
        if not troubles[area]:
            yield Check(area, True, message)


def _migrations(settings: Settings) -> Iterator[Check]:
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            yield check_app_migrations(connection, Path.cwd())
    except WorkerError as error:
        yield Check("migrations", False, str(error))


def _server(settings: Settings) -> Iterator[Check]:
    """Check the maintenance of the database server: dead rows and long transactions slow it down over days."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            state = server_state(connection)
    except WorkerError as error:
        yield Check("vacuum", False, str(error))
        return
    yield _vacuum(state)
    yield _transactions(state)


def _vacuum(state: ServerState) -> Check:
    if state.autovacuum_off:
        names = ", ".join(state.autovacuum_off)
        return Check("vacuum", False, f"autovacuum is off for {names}: turn it on, or every query gets slower")
    if state.unvacuumed:
        tables = ", ".join(f"{name} ({dead:,} of {rows:,} rows)" for name, dead, rows in state.unvacuumed)
        advice = "check its settings" if state.autovacuum else "turn it on, it is off for the whole server"
        return Check(
            "vacuum", False, f"most rows are dead in {tables}: run VACUUM. Autovacuum should remove them: {advice}"
        )
    if state.history is not None and state.history > HISTORY_MOST:
        versions = f"{state.history:,} old row versions wait to be purged"
        return Check("vacuum", False, f"{versions}: look for long transactions, and check innodb_purge_threads")
    if not state.autovacuum:
        return Check("vacuum", True, "few rows are dead, but autovacuum is off for the whole server: turn it on")
    return Check("vacuum", True, "few rows are dead")


def _transactions(state: ServerState) -> Check:
    if state.open:
        names = "; ".join(
            f"{transaction.name} of {transaction.owner} for {transaction.seconds / 60:.0f} min"
            for transaction in state.open[:MAX_NAMED]
        )
        more = " …" if len(state.open) > MAX_NAMED else ""
        advice = "end them: until then dead rows can't be removed, and locked rows wait"
        return Check("transactions", False, f"open for a long time: {names}{more}. If they are not needed, {advice}")
    if state.isolation is None or state.isolation == "read committed":
        return Check("transactions", True, "none is open for a long time")
    message = (
        f"none is open for a long time; the server's default isolation is {state.isolation}: the processes set their "
        "own, but `track(session=…)` runs in the app's transaction; after a conflict, run that transaction again"
    )
    return Check("transactions", True, message)


def _redis(settings: Settings) -> Check:
    client = redis_client(settings.redis, seconds=PING_SECONDS)
    try:
        information: Any = client.info()
        policy = _policy(client)
    except (RedisError, OSError) as error:
        return Check(
            "redis",
            False,
            f"REDIS_URL does not answer ({type(error).__name__}): check REDIS_URL; polling is slower without it",
        )
    finally:
        client.close()
    version = str(information.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < REDIS_MINIMUM:
        return Check("redis", False, f"version {version} is too old: Celery needs 6.2 or later")
    used, limit = int(information.get("used_memory", 0)), int(information.get("maxmemory", 0))
    if policy not in ("", "noeviction"):
        return Check("redis", False, f"maxmemory-policy is {policy}, so messages can be lost: set it to noeviction")
    if limit and used > FULL_SHARE * limit:
        return Check(
            "redis", False, f"{used // MIB} of {limit // MIB} MiB are used: raise maxmemory before Redis refuses writes"
        )
    url = maybe_sanitize_url(settings.redis)
    return Check("redis", True, f"{url} answers, version {version}, {used // MIB} MiB used")


def _policy(client: Any) -> str:
    """Return the eviction policy of Redis, or an empty string if a hosted server refuses to say."""
    try:
        return str(client.config_get("maxmemory-policy").get("maxmemory-policy", ""))
    except RedisError:
        return ""


def _broker(settings: Settings) -> Check:
    connection = BrokerConnection(settings.broker, connect_timeout=PING_SECONDS)
    url = connection.as_uri()  # without the password
    try:
        connection.ensure_connection(max_retries=1, timeout=PING_SECONDS)
    except (BrokerError, KombuError, OSError) as error:
        return Check("broker", False, f"{url} does not answer ({type(error).__name__}): check BROKER_URL")
    finally:
        connection.release()
    return Check("broker", True, f"{url} answers")


def _processes(settings: Settings, nodes: Nodes, queues: Mapping[str, str]) -> Iterator[Check]:
    try:
        running = nodes()
    except (BrokerError, KombuError, RedisError, OSError) as error:
        yield Check(
            "processes",
            False,
            f"unknown, because the broker does not answer ({type(error).__name__}): check BROKER_URL and REDIS_URL",
        )
        return
    yield _on_done_queues(settings, running)
    foreign = foreign_processes(settings, running)
    if foreign:
        advice = "give each app a Redis database, or a broker vhost, of its own"
        yield Check("processes", False, f"{', '.join(foreign)} consume these queues but use another database: {advice}")
        return
    consumed = frozenset[str]().union(*(node.queues for node in running.values()))
    missing = [f"{queue} ({purpose})" for queue, purpose in queues.items() if queue not in consumed]
    if missing:
        names = ", ".join(sorted(running)) or "none"
        yield Check("processes", False, f"no process consumes {', '.join(missing)}; running processes: {names}")
    else:
        yield Check("processes", True, f"{len(running)} worker processes run: {', '.join(sorted(running))}")


def _on_done_queues(settings: Settings, nodes: Mapping[str, Node]) -> Check:
    """Check for messages to web apps that wait in queues without a consumer."""
    try:
        with translate_errors(settings.database), engine_for(settings.database).connect() as connection:
            queues = {task_and_queue(on_done)[1] for on_done in recent_on_done(connection)}
        with BrokerConnection(settings.broker, connect_timeout=PING_SECONDS) as broker:
            broker.ensure_connection(max_retries=1, timeout=PING_SECONDS)
            waiting = {queue: _unconsumed(broker, queue, nodes) for queue in sorted(queues)}
    except (WorkerError, BrokerError, KombuError, RedisError, OSError) as error:
        return Check(
            "on_done queues", True, f"unknown, the broker or the database does not answer ({type(error).__name__})"
        )
    unconsumed = [f"{queue} ({count} messages)" for queue, count in waiting.items() if count]
    if unconsumed:
        return Check(
            "on_done queues", False, f"no process consumes {', '.join(unconsumed)}: start your app's Celery worker"
        )
    return Check("on_done queues", True, "no message to a web app waits in a queue without a consumer")


def _unconsumed(broker: BrokerConnection, queue: str, nodes: Mapping[str, Node]) -> int:
    """Return the number of messages in a queue without consumers. Redis has no list of consumers: use `nodes`."""
    try:
        with broker.channel() as channel:
            declared = channel.queue_declare(queue, passive=True)
    except (ChannelError, ResponseError):
        return 0  # there is no such queue; on Redis that is an empty one
    if declared.consumer_count or any(queue in node.queues for node in nodes.values()):
        return 0
    return int(declared.message_count)


def foreign_processes(settings: Settings, nodes: Mapping[str, Node]) -> list[str]:
    """Return the names of the processes that use another database; empty if this database does not answer."""
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
            storage.prepare()  # a configured folder that is missing may be an unmounted disk: do not create it
        with storage.partials.receive(0, f"doctor-{host_name()}-{os.getpid()}") as probe:
            probe.write(b"test of write access by fetch-worker doctor")
            probe.sync()
    except (StorageTrouble, SettingsError) as error:
        yield Check("storage", False, f"{error}; outputs wait until this is repaired")
        return
    url = settings.storage_url or f"file:{settings.storage_path}"
    folder = storage.partials.folder
    free = shutil.disk_usage(folder).free
    if free < 2 * settings.output_max_bytes:
        message = f"only {free // MIB} MiB are free for {url}"
        limit = f"a single output may have {settings.output_max_bytes // MIB} MiB"
        yield Check("storage", False, f"{message}: free some space, {limit}")
    else:
        yield Check("storage", True, f"{url} is writable, {free // MIB} MiB are free")
    stale = [path for path in folder.glob("*.part") if time.time() - path.stat().st_mtime > STALE_PARTIAL_SECONDS]
    if stale:
        yield Check(
            "partials", False, f"{len(stale)} old partial files in {folder}: check that a `downloads` process runs"
        )
    else:
        yield Check("partials", True, "there are no old partial files")
