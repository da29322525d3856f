"""`fetch-worker up`: checks settings and servers, then runs the Procfile's processes until it is stopped."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from kombu.connection import Connection
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import RedisError

from worker.configuration.server_settings import EMBEDDED_SOCKET
from worker.coordination.rate_limiter import redis_client
from worker.errors import SettingsError, Unavailable
from worker.launch.embedded_redis import EmbeddedRedis, start_embedded
from worker.launch.output import QuietWriter, ReadyLine, json_writer, text_writer
from worker.launch.procfile import RELEASE, Line, Program, merged_environment, own_procfile, program, read_procfile
from worker.launch.supervised_process import OWN_NAME, Say
from worker.launch.supervisor import Supervisor
from worker.settings import KEY_NAMES, PROCESS_SETTINGS, Settings, dotenv_file, load
from worker.store.engine import make_engine, shown_url, translate_errors
from worker.system.own_package import advice, other_worker, python_path

SERVER_SECONDS = 5.0
READY_SECONDS = 30.0  # a process that takes longer to start is named
READY_CHECK_SECONDS = 1.0
QUIET_NOTE = "; from now on only warnings, errors and changes of state are shown (--verbose: all lines)"
MAX_ACCOUNTS = 10  # named at the start
EXIT_FAILED = 1
OUR_APP = "worker.app"
OUR_NAMES = frozenset({RELEASE, "worker", "downloads", "beat", "flower"})


def up(*, verbose: bool = False) -> int:
    """Run `up` and return its exit code: 0 after a stop signal, 1 if a server or migration fails, 2 for wrong settings.

    On a terminal only the lines that matter are shown, unless `verbose`. Raises SettingsError and Unavailable before
    any process is started.
    """
    settings = load()
    folder = Path.cwd()
    lines = _runnable(read_procfile(procfile(folder)))
    other = other_worker(python_path(merged_environment(dotenv_file()).get("PYTHONPATH", "")))
    if other is not None:
        raise SettingsError(advice(other))
    environment = merged_environment(dotenv_file()) | {"STATE_DIRECTORY": str(settings.state)}
    embedded = EmbeddedRedis(settings.state / EMBEDDED_SOCKET, settings.state / "redis", persistent=True)
    check_database(settings)
    if settings.redis_url:
        check_redis(settings.redis, "REDIS_URL")
    else:
        environment["REDIS_URL"] = embedded.url
    if settings.broker_url:
        check_broker(settings.broker)

    as_json = settings.json_logs(sys.stdout)
    quiet = not verbose and not as_json and sys.stdout.isatty() and sys.stderr.isatty()  # else a log collector reads it
    environment["LOG_FORMAT"] = "json" if as_json or quiet else "text"
    write = json_writer(sys.stdout) if as_json else text_writer([line.name for line in lines], sys.stdout)
    if not settings.keys:
        setting = f"{KEY_NAMES[0]} (or {KEY_NAMES[1]})"
        write(OWN_NAME, f"no API key: jobs are accepted and held; set {setting} and start again")
    if settings.default_database_file is not None:
        environment["DATABASE_URL"] = settings.database_url  # said here once, and not by each process
        if not quiet:
            write(OWN_NAME, f"DATABASE_URL is not set: all processes use the file {settings.default_database_file}")
    programs = [program(line, environment) for line in lines if _settings_allow(settings, line, environment, write)]
    if quiet:
        for text in _introduction(settings, programs):
            write(OWN_NAME, text)
    ready = ReadyLine(
        QuietWriter(write) if quiet else write,
        [process.name for process in programs if process.name != RELEASE],
        note=QUIET_NOTE if quiet else "",
    )
    with Supervisor(folder, ready) as supervisor:
        if not settings.redis_url and embedded.claim():
            start_embedded(supervisor, embedded)
        return _run(supervisor, programs, ready)


def _run(supervisor: Supervisor, programs: Sequence[Program], ready: ReadyLine) -> int:
    """Run the release, then all other programs until a stop. Return the exit code."""
    for release in (process for process in programs if process.name == RELEASE):
        code = supervisor.run_once(release)
        if code:
            ready(OWN_NAME, f"{RELEASE} ended with exit code {code}: nothing else is started")
            return code if code == 2 else EXIT_FAILED
    for process in programs:
        if process.name != RELEASE and not supervisor.stop_signals:
            supervisor.start(process)
    supervisor.wait_until(lambda: supervisor.stopping or not ready.waiting, READY_SECONDS, READY_CHECK_SECONDS)
    if ready.waiting and not supervisor.stopping:
        ready(OWN_NAME, f"not reported as ready after {READY_SECONDS:g} s: {', '.join(sorted(ready.waiting))}")
    return supervisor.run()


def _introduction(settings: Settings, programs: Sequence[Program]) -> Iterator[str]:
    """Yield what is started, for whom, and where to look at it."""
    names = [process.name for process in programs if process.name != RELEASE]
    names += [] if settings.redis_url else ["an embedded Redis"]
    yield f"starts {', '.join(names)} on {shown_url(settings.database)}"
    if settings.keys:
        accounts = sorted(settings.keys)
        more = f" and {len(accounts) - MAX_ACCOUNTS} more" if len(accounts) > MAX_ACCOUNTS else ""
        yield f"accounts with a key: {', '.join(accounts[:MAX_ACCOUNTS])}{more}"
    yield f"`fetch-worker admin` serves the page for operators at {settings.page_url}"


def procfile(folder: Path) -> Path:
    """Return the folder's Procfile if it only runs our app, else our own. A web app's Procfile is not ours to run."""
    here = folder / "Procfile"
    if here.is_file() and OUR_APP in here.read_text(encoding="utf-8", errors="replace"):
        return here if {line.name for line in read_procfile(here)} <= OUR_NAMES else own_procfile()
    return own_procfile()


def _runnable(lines: Sequence[Line]) -> list[Line]:
    """Return the lines whose programs are installed."""
    runnable = [line for line in lines if line.name != "flower" or find_spec("flower")]
    if len(runnable) < len(lines):
        print("flower is not started: pip install 'fetch-worker[flower]'", file=sys.stderr)
    return runnable


def _settings_allow(settings: Settings, line: Line, environment: Mapping[str, str], say: Say) -> bool:
    """Return whether the settings allow a process to start. If not, only this process is left out."""
    try:
        if line.name in PROCESS_SETTINGS:
            settings.check(line.name)
        if line.name == "flower":
            from worker.flower.options import check_flower  # here, since Flower is an extra

            check_flower(environment, shlex.split(line.command))
    except (SettingsError, ValueError) as error:  # ValueError: a quotation mark is missing in the command
        say(OWN_NAME, f"{line.name} is not started: {error}")
        return False
    return True


# ── servers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_database(settings: Settings) -> None:
    """Raises Unavailable, with a one-line message, if the database does not answer."""
    engine = make_engine(settings.database)
    try:
        with translate_errors(settings.database), engine.connect():
            pass
    finally:
        engine.dispose()


def check_redis(url: str, variable: str) -> None:
    """Raises Unavailable, with a one-line message, if Redis does not answer."""
    client = redis_client(url, seconds=SERVER_SECONDS)
    try:
        client.ping()
    except (RedisError, OSError, ValueError) as error:
        raise Unavailable(_unreachable("Redis", url, error, variable)) from None
    finally:
        client.close()


def check_broker(url: str) -> None:
    """Raises Unavailable, with a one-line message, if the Celery broker does not answer."""
    if url.startswith(("redis", "unix")):
        check_redis(url, "BROKER_URL")
        return
    try:
        with Connection(url, connect_timeout=SERVER_SECONDS) as connection:
            connection.connect()
    except Exception as error:  # each transport raises its own errors, and a missing one raises others
        raise Unavailable(_unreachable("the broker", url, error, "BROKER_URL")) from None


def _unreachable(server: str, url: str, error: Exception, variable: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{server} at {maybe_sanitize_url(url)} does not answer ({reason}); check {variable} and the server"
