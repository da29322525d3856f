"""Processes of the demo: Redis, the stand-in of the API, and those of the Procfile, with settings of their own."""

import difflib
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from celery import Celery
from sqlalchemy import URL

from worker.errors import WorkerError
from worker.launch.embedded_redis import EmbeddedRedis
from worker.launch.supervisor import Program, Supervisor, Timing, own_procfile, prepared, program, read_procfile
from worker.sandbox.options import SandboxOptions
from worker.settings import Settings
from worker.store.engine import make_engine
from worker.store.migrate import migrate

START_SECONDS = 45.0
END_SECONDS = 6.0
PING_SECONDS = 0.5
SOCKET_SECONDS = 10.0
CHECK_SECONDS = 0.03
CELERY_NODES = ("worker", "downloads")
OWN_PREFIXES = ("FLOWER_", "CELERY_", "SD_API_", "POLL_")
SIMILARITY = 0.9


class Stopped(WorkerError):
    """The demo was stopped by a signal. This is not an error."""


class DemoFailed(WorkerError):
    """The demo cannot continue. Show the message to the user."""


@dataclass(frozen=True, slots=True)
class Flower:
    """Address and login of Flower."""

    port: int
    user: str
    password: str

    @property
    def url(self) -> str:
        """The address of its first page."""
        return f"http://127.0.0.1:{self.port}"


class DemoProcesses:
    """All processes of one demo. They run inside its `with` block; none is left running afterwards."""

    def __init__(self, folder: Path, options: SandboxOptions, *, with_flower: bool) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.flower = Flower(_free_port(), "admin", secrets.token_urlsafe(9)) if with_flower else None
        self._options = options
        self._redis = EmbeddedRedis(folder / "redis.sock", folder / "redis", persistent=False)
        self._base_environment = prepared(_without_own_settings(os.environ))
        self.logs.mkdir()
        self._log = (self.logs / "demo.log").open("a", encoding="utf-8")
        self._supervisor = Supervisor(folder, self._say, logs=self.logs, timing=Timing(stop_seconds=END_SECONDS))

    def __enter__(self) -> Self:
        self._supervisor.__enter__()
        return self

    def __exit__(self, *raised: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self._supervisor.__exit__(*raised)
        finally:
            self._redis.release()
            self._log.close()

    def start(self) -> None:
        """Start all processes, as many as possible at the same time. Raises Stopped and DemoFailed."""
        self._redis.claim()
        self._supervisor.start(Program("redis", self._redis.command, self._base_environment, outlives=True))
        self._supervisor.start(Program("sandbox", self._sandbox_command, self._base_environment))
        engine = make_engine(self.database)
        migrate(engine)
        engine.dispose()
        environment = self._base_environment | self._environment
        lines = {line.name: line for line in read_procfile(own_procfile())}
        for name in ("worker", "downloads", "beat", *(["flower"] if self.flower else [])):
            self._supervisor.start(program(lines[name], environment))
        self.until("redis", self._redis.answers)

    def until_ready(self) -> None:
        """Wait until the workers answer and Flower listens. Raises Stopped and DemoFailed."""
        self.until("worker", self._workers_answer)
        if self.flower is not None:
            port = self.flower.port
            self.until("flower", lambda: _listens(port) or bool(self._supervisor.exits.get("flower")))

    def until(self, name: str, condition: Callable[[], bool]) -> None:
        """Wait until a process is ready. Raises Stopped and DemoFailed."""
        exited = self._exited
        is_ready = self._supervisor.wait_until(lambda: bool(exited()) or condition(), START_SECONDS, CHECK_SECONDS)
        self.check()
        if not is_ready:
            raise DemoFailed(f"{name} was not ready within {START_SECONDS:.0f} s{self._last_line(name)}")

    def wait(self, seconds: float) -> None:
        """Supervise the processes for this many seconds. Raises Stopped and DemoFailed."""
        self._supervisor.step(seconds)
        self.check()

    def check(self) -> None:
        """Raises Stopped after a signal, and DemoFailed if a process died."""
        if self._supervisor.stop_signals:
            raise Stopped
        for name in self._exited():
            raise DemoFailed(f"{name} ended unexpectedly{self._last_line(name)}")

    # ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def database(self) -> URL:
        """The URL of a new SQLite file."""
        return URL.create("sqlite", database=str(self.folder / "worker.db"))

    @cached_property
    def api(self) -> Mapping[str, str]:
        """The `url` and `key` that the stand-in announces as soon as it listens."""
        log = self.logs / "sandbox.log"
        self.until("sandbox", lambda: log.read_text(encoding="utf-8").endswith("}\n"))
        announcement: Mapping[str, str] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        return announcement

    @cached_property
    def client(self) -> Celery:
        """A Celery client like that of a web app: it knows two addresses and has nothing of ours installed."""
        client = Celery("web-app", broker=self._redis.url, backend=self._redis.url, set_as_current=False)
        client.conf.broker_transport_options = {"socket_timeout": SOCKET_SECONDS}
        return client

    @cached_property
    def settings(self) -> Settings:
        """Settings with every value set, so that neither environment nor `.env` file has an effect."""
        values: dict[str, Any] = {name: field.default for name, field in Settings.model_fields.items()}
        return Settings(**(values | self._settings))

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "database_url": self.database.render_as_string(hide_password=False),
            "redis_url": self._redis.url,
            "sd_api_url": self.api["url"],
            "sd_api_key": self.api["key"],
            "storage_url": f"file:{self.folder / 'outputs'}",
            "output_allowed_networks": "127.0.0.0/8",
            "poll_min": 1.0,  # its jobs take seconds
        }

    @property
    def _environment(self) -> dict[str, str]:
        variables = {name.upper(): str(value) for name, value in self._settings.items()} | {"LOG_FORMAT": "text"}
        if self.flower is not None:
            login = f"{self.flower.user}:{self.flower.password}"
            variables |= {"FLOWER_BASIC_AUTH": login, "FLOWER_PORT": str(self.flower.port)}
        return variables

    @property
    def _sandbox_command(self) -> tuple[str, ...]:
        options = {
            "port": 0,
            "seed": self._options.seed,
            "min-seconds": self._options.min_seconds,
            "max-seconds": self._options.max_seconds,
            "outputs": f"{self._options.min_outputs}-{self._options.max_outputs}",
            "size": self._options.size,
        }
        arguments = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
        return (sys.executable, "-m", "worker.sandbox", "--json", *arguments)

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _workers_answer(self) -> bool:
        limit = len(CELERY_NODES)
        replies = self.client.control.broadcast("ping", reply=True, timeout=PING_SECONDS, limit=limit)
        return len(replies or ()) >= limit

    def _exited(self) -> list[str]:
        """Return the processes that ended unexpectedly. Flower is left out because the demo does not need it."""
        return [name for name in self._supervisor.exits if name != "flower"]

    def _last_line(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        last_line = f": {lines[-1][:300]}" if lines else ""
        return f"{last_line} (more in {log})"

    def _say(self, name: str, text: str) -> None:
        self._log.write(f"{text}\n")
        self._log.flush()


def _without_own_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without our settings, and without names that resemble them."""
    names = {name.upper() for name in Settings.model_fields}

    def is_ours(name: str) -> bool:
        upper = name.upper()
        return upper.startswith(OWN_PREFIXES) or bool(difflib.get_close_matches(upper, names, n=1, cutoff=SIMILARITY))

    return {name: value for name, value in environment.items() if not is_ours(name)}


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
