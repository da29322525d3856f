"""The demo's processes: Redis, the stand-in of the API, and what the Procfile names, on settings of their own."""

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
LOOK_SECONDS = 0.03
CELERY_NODES = ("worker", "downloads")
OURS = ("FLOWER_", "CELERY_", "SD_API_", "POLL_")
LIKE_OURS = 0.9


class Stopped(WorkerError):
    """The demo was told to end. Nothing is wrong; end it."""


class DemoFailed(WorkerError):
    """The demo can't go on; the text says why. Show it."""


@dataclass(frozen=True, slots=True)
class Flower:
    """Where Flower is, and how to get in."""

    port: int
    user: str
    password: str

    @property
    def url(self) -> str:
        """Its first page."""
        return f"http://127.0.0.1:{self.port}"


class Parts:
    """All processes of one demo; they run inside its `with` block, and none is left behind."""

    def __init__(self, folder: Path, options: SandboxOptions, *, with_flower: bool) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.flower = Flower(_free_port(), "admin", secrets.token_urlsafe(9)) if with_flower else None
        self._options = options
        self._redis = EmbeddedRedis(folder / "redis.sock", folder / "redis", persistent=False)
        self._plain = prepared(_without_ours(os.environ))
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
        """Starts everything, as much of it at once as can be. Raises Stopped and DemoFailed."""
        self._redis.claim()
        self._supervisor.start(Program("redis", self._redis.command, self._plain, outlives=True))
        self._supervisor.start(Program("sandbox", self._sandbox_words, self._plain))
        engine = make_engine(self.database)
        migrate(engine)
        engine.dispose()
        environment = self._plain | self._environment
        lines = {line.name: line for line in read_procfile(own_procfile())}
        for name in ("worker", "downloads", "beat", *(["flower"] if self.flower else [])):
            self._supervisor.start(program(lines[name], environment))
        self.until("redis", self._redis.answers)

    def until_ready(self) -> None:
        """Waits until the workers answer, and Flower listens. Raises Stopped and DemoFailed."""
        self.until("worker", self._workers_answer)
        if self.flower is not None:
            port = self.flower.port
            self.until("flower", lambda: _listens(port) or bool(self._supervisor.exits.get("flower")))

    def until(self, name: str, condition: Callable[[], bool]) -> None:
        """Waits for a part to be ready. Raises Stopped and DemoFailed."""
        dead = self._dead
        held = self._supervisor.wait_until(lambda: bool(dead()) or condition(), START_SECONDS, LOOK_SECONDS)
        self.check()
        if not held:
            raise DemoFailed(f"{name} was not ready within {START_SECONDS:.0f} s{self._last_words(name)}")

    def wait(self, seconds: float) -> None:
        """Looks after the processes for so long. Raises Stopped and DemoFailed."""
        self._supervisor.step(seconds)
        self.check()

    def check(self) -> None:
        """Raises Stopped where the demo was told to end, DemoFailed where a part died."""
        if self._supervisor.stop_signals:
            raise Stopped
        for name in self._dead():
            raise DemoFailed(f"{name} ended unexpectedly{self._last_words(name)}")

    # ── what they are told ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def database(self) -> URL:
        """A new SQLite file."""
        return URL.create("sqlite", database=str(self.folder / "worker.db"))

    @cached_property
    def api(self) -> Mapping[str, str]:
        """What the stand-in says of itself as soon as it listens: `url` and `key`."""
        log = self.logs / "sandbox.log"
        self.until("sandbox", lambda: log.read_text(encoding="utf-8").endswith("}\n"))
        found: Mapping[str, str] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        return found

    @cached_property
    def client(self) -> Celery:
        """A Celery client as a web app has it: two addresses and nothing of ours."""
        client = Celery("web-app", broker=self._redis.url, backend=self._redis.url, set_as_current=False)
        client.conf.broker_transport_options = {"socket_timeout": SOCKET_SECONDS}
        return client

    @cached_property
    def settings(self) -> Settings:
        """Every setting is given, so that neither the environment nor a file has a say."""
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
        own = {name.upper(): str(value) for name, value in self._settings.items()} | {"LOG_FORMAT": "text"}
        if self.flower is not None:
            login = f"{self.flower.user}:{self.flower.password}"
            own |= {"FLOWER_BASIC_AUTH": login, "FLOWER_PORT": str(self.flower.port)}
        return own

    @property
    def _sandbox_words(self) -> tuple[str, ...]:
        given = {
            "port": 0,
            "seed": self._options.seed,
            "min-seconds": self._options.min_seconds,
            "max-seconds": self._options.max_seconds,
            "outputs": f"{self._options.min_outputs}-{self._options.max_outputs}",
            "size": self._options.size,
        }
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return (sys.executable, "-m", "worker.sandbox", "--json", *words)

    # ── how they are ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _workers_answer(self) -> bool:
        limit = len(CELERY_NODES)
        replies = self.client.control.broadcast("ping", reply=True, timeout=PING_SECONDS, limit=limit)
        return len(replies or ()) >= limit

    def _dead(self) -> list[str]:
        """Parts that ended though nobody asked them to. Flower is only there to be looked at."""
        return [name for name in self._supervisor.exits if name != "flower"]

    def _last_words(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        said = f": {lines[-1][:300]}" if lines else ""
        return f"{said} (more in {log})"

    def _say(self, name: str, text: str) -> None:
        self._log.write(f"{text}\n")
        self._log.flush()


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without any of our settings, or what would be taken for one."""
    known = {name.upper() for name in Settings.model_fields}

    def ours(name: str) -> bool:
        upper = name.upper()
        return upper.startswith(OURS) or bool(difflib.get_close_matches(upper, known, n=1, cutoff=LIKE_OURS))

    return {name: value for name, value in environment.items() if not ours(name)}


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
