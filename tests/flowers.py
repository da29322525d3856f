"""Run a real Flower for tests."""

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers import free_port
from tests.waiting import wait_until

LOGIN = "viewer:password"


@dataclass(frozen=True, slots=True)
class Flower:
    """A running Flower process."""

    port: int
    process: "subprocess.Popen[bytes]"
    log: Path

    def page(self, path: str, *, post: bool = False, body: str = "") -> str:
        """Return the body of a page. Raises OSError if there is none."""
        login = base64.b64encode(LOGIN.encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            headers={"Authorization": f"Basic {login}"},
            data=body.encode() or None,
            method="POST" if post else "GET",
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  # always http
            text: str = answer.read().decode()
            return text

    def tasks(self, query: str = "taskname=fetch-worker.job") -> dict[str, dict[str, Any]]:
        """Return the tasks that Flower's API lists; by default the jobs."""
        tasks: dict[str, dict[str, Any]] = json.loads(self.page(f"/api/tasks?{query}"))
        return tasks

    def states(self) -> dict[str, str]:
        """Return the states of all shown jobs."""
        return {uuid: task["state"] for uuid, task in self.tasks().items()}

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until Flower shows what is expected."""
        wait_until(reached, "Flower shows it", seen=lambda: f"{self.states()}\n{self.log.read_text()}")

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait(10)


@contextmanager
def flower(folder: Path, **settings: str) -> Iterator[Flower]:
    """Start Flower with the current environment and `settings`, wait until it answers, and kill it at the end."""
    port, log = int(settings.get("FLOWER_PORT") or free_port()), folder / "flower.log"
    environment = os.environ | {"FLOWER_BASIC_AUTH": LOGIN, "FLOWER_PORT": str(port)} | settings
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "flower"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    started = Flower(port, process, log)
    try:
        _wait(started)
        yield started
    finally:
        started.kill()


def _wait(started: Flower) -> None:

    def answers() -> bool:
        assert started.process.poll() is None, started.log.read_text()
        with suppress(OSError):
            started.page("/healthcheck")
            return True
        return False

    wait_until(answers, "Flower answers", seen=started.log.read_text)
