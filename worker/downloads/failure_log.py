"""Log lines about downloads that fail: one when a host or the storage begins to fail, then a count once a minute.

A host that fails may have hundreds of outputs, and each of them is tried again and again. The lines about each attempt
are at the level DEBUG; the rows of the outputs have the same facts.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from worker.core.lifecycle import GiveUp, TryAgain, address_index
from worker.store.claims import ClaimedOutput

log = logging.getLogger(__name__)

SUMMARY_SECONDS = 60.0
MAX_TROUBLES = 1_000  # the hosts come from answers of the API
STORAGE = "storage"  # the code of failures of the storage, and their source
IN_ANSWER = "answer"  # the source of outputs whose bytes came with the answer of the API
SOURCE_CODES = frozenset({"http_error", "unreachable", STORAGE})  # all others are about an output


@dataclass(slots=True)
class _Trouble:
    """A source that fails: its failures so far, how many of them ended an output, and the last code.

    `logged` is the number of failures at the last line.
    `announced`: the last line says that the source fails, and not that it works again.
    """

    began_at: float
    code: str
    count: int = 0
    given_up: int = 0
    logged: int = 1
    announced: bool = True
    recovered_at: float = 0.0


class FailureLog:
    """The lines of one process about downloads that fail. Thread-safe.

    A source is a host, or the storage. Failures that are about outputs, such as dead links, are counted for each host
    and code, and no line says that they are over.
    """

    def __init__(self, *, interval: float = SUMMARY_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock = interval, clock
        self._lock = threading.Lock()
        self._troubles: dict[tuple[str, str], _Trouble] = {}  # by source, and by code if they are about outputs
        self._timer: threading.Timer | None = None

    def failed(self, output: ClaimedOutput, result: TryAgain | GiveUp) -> None:
        """Log the first failure of a source, and count the others."""
        outcome = "gave up" if isinstance(result, GiveUp) else "again later"
        log.debug(
            "output not stored output=%s code=%s outcome=%s reason=%s", output.id, result.code, outcome, result.message
        )
        host = source = host_of(output) or IN_ANSWER
        if result.code == STORAGE:
            self._works(host)
            source = STORAGE
        if self._is_first((source, "" if result.code in SOURCE_CODES else result.code), result):
            log.warning(
                "downloads fail source=%s output=%s code=%s outcome=%s reason=%s",
                *(source, output.id, result.code, outcome, result.message),
            )

    def stored(self, output: ClaimedOutput) -> None:
        """Log that the host and the storage work again, if they have failed."""
        for source in (host_of(output), STORAGE):
            self._works(source)

    def summarise(self) -> None:
        """Log how often each source has failed. A thread calls this once per interval while there are failures."""
        lines = []
        with self._lock:
            self._timer = None
            for (source, about_outputs), trouble in list(self._troubles.items()):
                if trouble.count > trouble.logged:
                    trouble.logged, trouble.announced = trouble.count, True
                    seconds = self._clock() - trouble.began_at
                    lines.append((source, trouble.code, trouble.count, trouble.given_up, seconds))
                elif about_outputs or not trouble.announced:
                    del self._troubles[source, about_outputs]
            if lines:
                self._start_timer()
        for line in lines:
            log.warning("downloads still fail source=%s code=%s count=%s given_up=%s seconds=%.0f", *line)

    def _is_first(self, key: tuple[str, str], result: TryAgain | GiveUp) -> bool:
        """Count a failure. Return whether it is the first one of its source."""
        with self._lock:
            now = self._clock()
            self._start_timer()
            trouble = self._troubles.get(key)
            over = trouble is not None and not trouble.announced and now - trouble.recovered_at >= self._interval
            if trouble is None or over:
                if len(self._troubles) >= MAX_TROUBLES:
                    del self._troubles[next(iter(self._troubles))]
                trouble = self._troubles[key] = _Trouble(now, result.code)
            trouble.count += 1
            trouble.code = result.code
            trouble.given_up += isinstance(result, GiveUp)
            return trouble.count == 1

    def _works(self, source: str) -> None:
        if not self._troubles:
            return
        with self._lock:
            trouble = self._troubles.get((source, ""))
            if trouble is None or not trouble.announced:
                return
            trouble.announced, trouble.recovered_at, trouble.logged = False, self._clock(), trouble.count
            line = (source, trouble.count, trouble.given_up, trouble.recovered_at - trouble.began_at)
            self._start_timer()
        log.info("downloads work again source=%s count=%s given_up=%s seconds=%.0f", *line)

    def _start_timer(self) -> None:
        """Start the thread that calls `summarise`. The caller holds the lock."""
        if self._timer is None:
            self._timer = threading.Timer(self._interval, self.summarise)
            self._timer.daemon = True
            self._timer.start()


def host_of(output: ClaimedOutput) -> str:
    """Return the host of this attempt. Bytes that came with the answer have none."""
    if output.body is not None:
        return ""
    with suppress(ValueError):
        return (urlsplit(output.urls[address_index(output.facts)]).hostname or "").rstrip(".")
    return ""
