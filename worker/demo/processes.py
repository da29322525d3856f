"""Processes of the demo: Redis, the stand-in, and those of the Procfile, with settings of their own."""

import difflib
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import URL

from worker.errors import WorkerError
from worker.launch.embedded_redis import EmbeddedRedis
from worker.launch.procfile import Program, own_procfile, prepared, program, read_procfile
from worker.launch.supervised_process import Timing
from worker.launch.supervisor import Supervisor
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
FLOWER_USER = "admin"
OWN_PREFIXES = ("FLOWER_", "CELERY_", "SD_API_", "POLL_")
SIMILARITY = 0.9


class Stopped(WorkerError):
    """The demo was stopped by a signal. This is not an error."""


class DemoFailed(WorkerError):
    """The demo cannot continue. Show the message to the user."""


@contextmanager
def demo_processes(folder: Path, options: SandboxOptions, *, with_flower: bool) -> "Iterator[DemoProcesses]":
    """Yield the processes of one demo, not started yet. None is left running afterwards."""
    logs = folder / "logs"
    logs.mkdir()
    redis = EmbeddedRedis(folder / "redis.sock", folder / "redis", persistent=False)
    timing = Timing(stop_seconds=END_SECONDS)
    with (logs / "demo.log").open("a", encoding="utf-8", buffering=1) as log, ExitStack() as end:
        end.callback(redis.release)
        supervisor = Supervisor(folder, lambda name, text: print(text, file=log), logs=logs, timing=timing)
        yield DemoProcesses(folder, options, redis, end.enter_context(supervisor), _free_port() if with_flower else 0)


class DemoProcesses:
    """All processes of one demo, and what a web app needs to use them. Without a `flower_port` there is no Flower."""

    def __init__(
        self, folder: Path, options: SandboxOptions, redis: EmbeddedRedis, supervisor: Supervisor, flower_port: int
    ) -> None:
        self.database = URL.create("sqlite", database=str(folder / "worker.db"))
        self.flower_port, self.flower_password = flower_port, secrets.token_urlsafe(9)
        self._folder, self._options, self._redis, self._supervisor = folder, options, redis, supervisor
        self._base_environment = prepared(_without_own_settings(os.environ))

    def start(self) -> None:
        """Start all processes, as many as possible at the same time, and wait until they are ready.

        Raises Stopped and DemoFailed.
        """
        self._redis.claim()
        self._supervisor.start(Program("redis", self._redis.command, self._base_environment, outlives=True))
        self._supervisor.start(Program("sandbox", self._sandbox_command, self._base_environment))
        engine = make_engine(self.database)
        migrate(engine)
        engine.dispose()
        environment = self._base_environment | self._environment
        names = (*CELERY_NODES, "beat", *(["flower"] if self.flower_port else []))
        for line in read_procfile(own_procfile()):
            if line.name in names:
                self._supervisor.start(program(line, environment))
        self._wait_for("redis", self._redis.answers)
        self._wait_for("worker", self._workers_answer)
        if self.flower_port:
            self._wait_for("flower", lambda: self.flower_listens or "flower" in self._supervisor.exits)

    def wait(self, seconds: float) -> None:
        """Supervise the processes for this many seconds. Raises Stopped and DemoFailed."""
        self._supervisor.step(seconds)
        self.check()

    def check(self) -> None:
        """Raises Stopped after a signal, and DemoFailed if a process died. The demo does not need Flower."""
        if self._supervisor.stop_signals:
            raise Stopped
        for name in self._supervisor.exits:
            if name != "flower":
                raise DemoFailed(f"{name} ended unexpectedly{self._last_line(name)}")

    @cached_property
    def api(self) -> Mapping[str, str]:
        """The `url` and `key` that the stand-in announces as soon as it listens."""
        log = self._folder / "logs" / "sandbox.log"
        self._wait_for("sandbox", lambda: log.read_text(encoding="utf-8").endswith("}\n"))
        announcement: Mapping[str, str] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        return announcement

    @cached_property
    def client(self) -> Celery:
        """A Celery client like that of a web app: it knows two addresses and does not import this package."""
        client = Celery("web-app", broker=self._redis.url, backend=self._redis.url, set_as_current=False)
        client.conf.broker_transport_options = {"socket_timeout": SOCKET_SECONDS}
        return client

    @cached_property
    def settings(self) -> Settings:
        """Settings with every value set, so that neither environment nor `.env` file has an effect."""
        values: dict[str, Any] = {name: field.default for name, field in Settings.model_fields.items()}
        return Settings(**(values | self._settings))

    @property
    def flower_listens(self) -> bool:
        """Whether Flower was started and accepts connections."""
        with closing(socket.socket()) as probe:
            probe.settimeout(1.0)
            return self.flower_port > 0 and probe.connect_ex(("127.0.0.1", self.flower_port)) == 0

    # ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "database_url": self.database.render_as_string(hide_password=False),
            "redis_url": self._redis.url,
            "sd_api_url": self.api["url"],
            "sd_api_key": self.api["key"],
            "storage_url": f"file:{self._folder / 'outputs'}",
            "output_allowed_networks": "127.0.0.0/8",
            "poll_min": 1.0,  # its jobs take seconds
        }

    @property
    def _environment(self) -> dict[str, str]:
        values = self._settings | {"log_format": "text"}
        if self.flower_port:
            login = f"{FLOWER_USER}:{self.flower_password}"
            values |= {"flower_basic_auth": login, "flower_port": self.flower_port}
        return {name.upper(): str(value) for name, value in values.items()}

    @property
    def _sandbox_command(self) -> tuple[str, ...]:
        options = self._options
        arguments: tuple[str, ...] = ("--json", "--port=0", f"--seed={options.seed}", f"--size={options.size}")
        arguments += (f"--min-seconds={options.min_seconds}", f"--max-seconds={options.max_seconds}")
        return (sys.executable, "-m", "worker.sandbox", *arguments)

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _wait_for(self, name: str, condition: Callable[[], bool]) -> None:
        """Wait until a process is ready. Raises Stopped and DemoFailed."""

        def ready() -> bool:
            self.check()
            return condition()

        if not self._supervisor.wait_until(ready, START_SECONDS, CHECK_SECONDS):
            self.check()
            raise DemoFailed(f"{name} was not ready within {START_SECONDS:.0f} s{self._last_line(name)}")

    def _workers_answer(self) -> bool:
        limit = len(CELERY_NODES)
        replies = self.client.control.broadcast("ping", reply=True, timeout=PING_SECONDS, limit=limit)
        return len(replies or ()) >= limit

    def _last_line(self, name: str) -> str:
        log = self._folder / "logs" / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        last_line = f": {lines[-1][:300]}" if lines else ""
        return f"{last_line} (more in {log})"


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
