"""The transaction that writes answers."""

import threading
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.polling.answers import answer_about, claimed_job
from tests.polling.polls import Polls, submitted
from worker.core.reply import ApiDown, Processing, Reply, Unread
from worker.polling.answer_writer import count_answers
from worker.store.counters import Tally, read_counters
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


def test_given_a_batch_of_answers_then_they_are_counted_by_account_and_class(engine: Engine) -> None:
    replies: list[tuple[str, Reply]] = [
        ("ann", Processing(eta=3.0)),
        ("ann", Processing()),
        ("ann", Unread("no JSON")),
        ("bob", Processing()),
        ("bob", ApiDown("HTTP 502")),
    ]
    answers = [answer_about(claimed_job(account=account), reply) for account, reply in replies]
    tally = Tally()

    count_answers(tally, answers)

    with engine.begin() as connection:
        tally.write(connection)
        totals = {(total.key.account, total.key.label): total.times for total in read_counters(connection)}
    assert totals == {("ann", "processing"): 2, ("ann", "odd"): 1, ("bob", "processing"): 1, ("bob", "apidown"): 1}
