"""The hosted API as a process of its own: orders go in and the ledger comes out through its control address."""

import http.client
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.acceptance.api import Call, Get, Job


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the hosted API was asked, in the order in which it was asked."""

    calls: tuple[Call, ...]
    gets: tuple[Get, ...]
    strays: tuple[str, ...]

    def calls_about(self, remote_id: str) -> list[Call]:
        """The fetch calls about one job, oldest first."""
        return [call for call in self.calls if call.remote_id == remote_id]

    def calls_per_job(self) -> Counter[str]:
        """How many fetch calls each job got."""
        return Counter(call.remote_id for call in self.calls)

    def calls_after_success(self) -> Counter[str]:
        """How many fetch calls each job got after the one that was answered with its outputs."""
        told: set[str] = set()
        late: Counter[str] = Counter()
        for call in self.calls:
            if call.remote_id in told:
                late[call.remote_id] += 1
            if call.answer in ("success", "success_echo"):
                told.add(call.remote_id)
        return late

    def gets_per_output(self, counted: Callable[[Get], bool]) -> Counter[tuple[str, int]]:
        """How many of the counted requests each output got."""
        return Counter((get.remote_id, get.position) for get in self.gets if counted(get))

    def busiest_second(self) -> int:
        """The most fetch calls that began within any one second."""
        times = [call.began for call in self.calls]
        most = first = 0
        for last, began in enumerate(times):
            while times[first] <= began - 1.0:
                first += 1
            most = max(most, last - first + 1)
        return most

    def most_in_flight(self, since: float, until: float) -> int:
        """The most fetch calls that were under way at one moment, of those that began in this time."""
        spans = [(call.began, call.ended) for call in self.calls if since <= call.began < until]
        return max((sum(began <= moment < ended for began, ended in spans) for moment, _ in spans), default=0)


class Hosted:
    """The hosted API in a process of its own; leaving the block ends it."""

    def __init__(self, *, seed: int, accept: Sequence[str]) -> None:
        self.seed = seed
        self._accept = list(accept)

    def __enter__(self) -> Self:
        program = [sys.executable, "-I", str(Path(__file__).with_name("api.py")), "--seed", str(self.seed)]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        ports = json.loads(self._process.stdout.readline())
        self.port, self.pictures_port = int(ports["port"]), int(ports["pictures_port"])
        self.behave(accept=self._accept)
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate(timeout=10)  # closing its standard input ends it

    @property
    def base(self) -> str:
        """What `SD_API_URL` is set to."""
        return f"http://127.0.0.1:{self.port}/api/v3"

    def register(self, jobs: Sequence[Job]) -> None:
        """Make these jobs known to the API."""
        self._control("POST", "/control/jobs", {"jobs": [asdict(job) for job in jobs]})

    def behave(self, **changes: Any) -> None:
        """Change what the API does from the next request on."""
        self._control("POST", "/control/behaviour", {"behaviour": changes})

    def ledger(self) -> Ledger:
        """All that was asked so far."""
        answer = self._control("GET", "/control/ledger")
        calls = sorted((Call(**call) for call in answer["calls"]), key=lambda call: call.began)
        return Ledger(tuple(calls), tuple(Get(**get) for get in answer["gets"]), tuple(answer["strays"]))

    def _control(self, method: str, path: str, order: object = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, None if order is None else json.dumps(order))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
