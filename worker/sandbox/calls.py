"""Counters of the requests that the stand-in received."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field

from worker.sandbox.answers import Answer
from worker.sandbox.families import Target

MAX_FETCH_TIMES = 100_000


@dataclass(slots=True)
class Calls:
    """The requests that the stand-in received so far."""

    by_path: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)  # by path below /api/, for any answer
    fetches: Counter[str] = field(default_factory=Counter)  # by job id, for any answer
    fetches_after_success: Counter[str] = field(default_factory=Counter)  # by job id, after an answer with success
    fetch_answers: Counter[str] = field(default_factory=Counter)  # by status field of the answer
    fetch_moments: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_FETCH_TIMES))
    """Time of each fetch by the clock of the stand-in, and the job id."""
    pictures: Counter[str] = field(default_factory=Counter)  # GETs that returned the output, by name
    pictures_missing: Counter[str] = field(default_factory=Counter)  # GETs that did not, by name
    succeeded: set[tuple[str, str]] = field(default_factory=set)  # store and id of jobs answered with success
    webhooks: list[tuple[str, int]] = field(default_factory=list)  # URLs that were called, with the HTTP status

    def count_fetch(self, target: Target, moment: float, answer: Answer) -> None:
        """Count a fetch and its answer. The status of trainings and workflows is always `success`."""
        key, status = (target.store, target.id), _status_text(answer.body)
        self.fetches[target.id] += 1
        self.fetch_moments.append((moment, target.id))
        if key in self.succeeded:
            self.fetches_after_success[target.id] += 1
        self.fetch_answers[status] += 1
        if status == "success" and answer.status == 200 and target.family.shape not in ("training", "workflow"):
            self.succeeded.add(key)


def _status_text(body: bytes) -> str:
    """Return the status field of an answer, or `unreadable`."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "unreadable"
    return str(content.get("status")) if isinstance(content, dict) else "unreadable"
