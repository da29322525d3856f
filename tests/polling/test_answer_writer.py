"""The transaction that writes answers."""

import threading
from typing import Any

import pytest

from tests.polling.polls import Polls, submitted
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.jobs import cancel


def test_given_a_cancelled_job_when_its_answer_comes_late_then_nothing_changes(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = polls.track(submitted(polls.sandbox, 1))
    sent, cancelled = threading.Event(), threading.Event()
    ask = polls.client.ask

    def held(*arguments: Any) -> Any:
        reply = ask(*arguments)
        sent.set()
        cancelled.wait(10)
        return reply

    monkeypatch.setattr(polls.client, "ask", held)
    run = threading.Thread(target=polls.run)
    run.start()
    assert sent.wait(10)
    with polls.engine.begin() as connection:
        assert cancel(connection, job, Tally(), now=database_now(connection))
    cancelled.set()
    run.join()

    assert polls.row(job).status == "cancelled"
    assert polls.queued == []
