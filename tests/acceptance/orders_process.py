"""Runs the fake API that takes orders in a separate process, and reads its report."""

import http.client
import json
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.acceptance.orders_api import Arrival

LOST_ON_PURPOSE = ("cut_after", "swallowed")


@dataclass(frozen=True, slots=True)
class OrdersReport:
    """What the API received and did."""

    arrivals: tuple[Arrival, ...]
    slots: int
    most_queued: int
    cut_before: int
    fetches: int
    strays: tuple[str, ...]

    @property
    def charges(self) -> list[Arrival]:
        """The arrivals that were charged, oldest first."""
        charged = (arrival for arrival in self.arrivals if arrival.outcome == "charged")
        return sorted(charged, key=lambda arrival: arrival.charged_at)

    def charged(self) -> Counter[int]:
        """Return how often each order was charged."""
        return Counter(arrival.number for arrival in self.charges)

    def count(self, outcome: str) -> int:
        """Return the number of arrivals with an outcome."""
        return sum(arrival.outcome == outcome for arrival in self.arrivals)

    def answers(self) -> Counter[str]:
        """Return how often charged orders were answered in each way."""
        return Counter(arrival.answer for arrival in self.charges)

    def arrivals_of(self, number: int) -> list[Arrival]:
        """Return the arrivals of an order, oldest first."""
        return [arrival for arrival in self.arrivals if arrival.number == number]

    def slot_use(self) -> float:
        """Return which share of the slots was taken, from the first charge to the last one."""
        charges = self.charges
        if len(charges) < 2:
            return 0.0
        end = charges[-1].charged_at
        busy = sum(min(charge.ready_at, end) - charge.charged_at for charge in charges)
        return busy / (self.slots * (end - charges[0].charged_at))


class OrdersApi:
    """The fake API in a separate process. Leaving the block stops it."""

    def __init__(self, key: str, *, seed: int) -> None:
        self._key, self._seed = key, seed

    def __enter__(self) -> Self:
        program = [sys.executable, "-I", str(Path(__file__).with_name("orders_api.py"))]
        options = ["--key", self._key, "--seed", str(self._seed)]
        self._process = subprocess.Popen([*program, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        addresses = json.loads(self._process.stdout.readline())
        self.base, self._control = str(addresses["base"]), urlsplit(addresses["control"]).netloc
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._process.communicate(timeout=10)  # it exits when its standard input closes

    def behave(self, **changes: float) -> None:
        """Change fields of its `Behaviour` from now on."""
        self._ask("POST", "/behaviour", json.dumps(changes))

    def report(self) -> OrdersReport:
        """Return everything that it received so far."""
        fields = self._ask("GET", "/report")
        arrivals = tuple(Arrival(**arrival) for arrival in fields.pop("arrivals"))
        return OrdersReport(arrivals=arrivals, strays=tuple(fields.pop("strays")), **fields)

    def _ask(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection(self._control, timeout=30)) as connection:
            connection.request(method, path, body)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
