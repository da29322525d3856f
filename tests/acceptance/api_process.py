"""Runs the fake hosted API in a separate process, and controls it over HTTP."""

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

from tests.acceptance.api import ApiJob, ApiOrder, FetchCall, OrderCall, PictureGet


@dataclass(frozen=True, slots=True)
class Ledger:
    """The requests that the API received, in order."""

    calls: tuple[FetchCall, ...]
    orders: tuple[OrderCall, ...]
    gets: tuple[PictureGet, ...]
    strays: tuple[str, ...]

    def calls_about(self, remote_id: str) -> list[FetchCall]:
        """Return the fetch calls for one job, oldest first."""
        return [call for call in self.calls if call.remote_id == remote_id]

    def calls_per_job(self) -> Counter[str]:
        """Return the number of fetch calls per job."""
        return Counter(call.remote_id for call in self.calls)

    def calls_after_success(self) -> Counter[str]:
        """Return the number of fetch calls per job after its success answer."""
        succeeded: set[str] = set()
        late: Counter[str] = Counter()
        for call in self.calls:
            if call.remote_id in succeeded:
                late[call.remote_id] += 1
            if call.answer in ("success", "success_echo"):
                succeeded.add(call.remote_id)
        return late

    def gets_per_output(self, counted: Callable[[PictureGet], bool]) -> Counter[tuple[str, int]]:
        """Return the number of requests per output for which `counted` is true."""
        return Counter((get.remote_id, get.position) for get in self.gets if counted(get))

    def busiest_second(self) -> int:
        """Return the largest number of fetch calls that began within one second."""
        times = [call.began for call in self.calls]
        maximum = first = 0
        for last, began in enumerate(times):
            while times[first] <= began - 1.0:
                first += 1
            maximum = max(maximum, last - first + 1)
        return maximum

    def most_in_flight(self, since: float, until: float) -> int:
        """Return the largest number of concurrent fetch calls, of those that began in this time."""
        spans = [(call.began, call.ended) for call in self.calls if since <= call.began < until]
        return max((sum(began <= moment < ended for began, ended in spans) for moment, _ in spans), default=0)


class ApiProcess:
    """The fake hosted API in a separate process. Leaving the block stops it."""

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
        self._process.communicate(timeout=10)  # it exits when its standard input closes

    @property
    def base(self) -> str:
        """The value for `SD_API_URL`."""
        return f"http://127.0.0.1:{self.port}/api/v3"

    def register(self, jobs: Sequence[ApiJob]) -> None:
        """Add jobs to the API."""
        self._control("POST", "/control/jobs", {"jobs": [asdict(job) for job in jobs]})

    def expect(self, orders: Sequence[ApiOrder]) -> None:
        """Add orders that may come."""
        self._control("POST", "/control/orders", {"orders": [asdict(order) for order in orders]})

    def behave(self, **changes: Any) -> None:
        """Change the behaviour of the API from the next request on."""
        self._control("POST", "/control/behaviour", {"behaviour": changes})

    def ledger(self) -> Ledger:
        """Return all requests so far."""
        answer = self._control("GET", "/control/ledger")
        calls = sorted((FetchCall(**call) for call in answer["calls"]), key=lambda call: call.began)
        orders = sorted((OrderCall(**call) for call in answer["orders"]), key=lambda call: call.began)
        gets = (PictureGet(**get) for get in answer["gets"])
        return Ledger(tuple(calls), tuple(orders), tuple(gets), tuple(answer["strays"]))

    def _control(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
