"""Answers that are stored while they are recorded, and reading stored answers again, on real databases."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Row, event, select

from tests.recorders import make_recorder
from tests.rows import NOW, add_job, add_output, claim_due_jobs, read_job, seconds
from worker.core.pacing.policy import Pace
from worker.core.reply import Link, RawAnswer, Ready
from worker.operations.unread import Reread, apply
from worker.polling.api_client import ApiClient, read_answer
from worker.polling.kept_text import MAX_BYTES, KeptText, kept_text
from worker.polling.request_pool import PollAnswer
from worker.settings import Settings
from worker.store.claims import ClaimedJob
from worker.store.counters import Tally
from worker.store.engine import database_now
from worker.store.jobs import finish_job_if_done
from worker.store.kept_answers import KeptAnswer, answers_of, keep_answers
from worker.store.late_looks import due_looks, look_of
from worker.store.promises import promise_row
from worker.store.revival import revive
from worker.store.schema import events, late_looks, outputs
from worker.system.redaction import Scrubber
from worker.vendor.replies import Question
from worker.vendor.shapes import TOO_LARGE

KEY = "sk-canary-7f3a9d2e-4b1c-a0f5"
LINK = "https://cdn.test/a.png"
DONE = {"status": "done", "assets": [LINK]}
HOUR = 3_600.0
AT_ITS_END: dict[str, Any] = {
    "failed_answers": 1, "unknown_answers": 2, "error_answers": 2, "empty_answers": 4, "struck_at": NOW,
}  # fmt: skip


# ── while recording ───────────────────────────────────────────────────────────────────────────────────────────────────


def _record(
    engine: Engine,
    answers: Mapping[str, object],
    *,
    status: int = 200,
    before_text: Callable[[], object] = int,
    **changes: Any,
) -> dict[str, int]:
    """Create a job for each name and record its answer. Return the ids of the jobs.

    `before_text` is called before the text of an answer is made.
    """
    scrubber = Scrubber([KEY])

    class Client(ApiClient):
        def kept_text(self, raw: RawAnswer) -> KeptText:
            before_text()
            return super().kept_text(raw)

    recorder = make_recorder(
        engine, scrubber, pace=Pace("learned", 0.5, 0.0), late_looks=(HOUR, 3 * HOUR), client=Client
    )
    ids: dict[str, int] = {}
    with engine.begin() as connection:
        now = database_now(connection)
        times = {"submitted_at": now, "tracked_at": now - timedelta(hours=1), "deadline_at": now + timedelta(hours=1)}
        for name in answers:
            ids[name] = add_job(connection, name, **({"due_at": now} | times | changes))
        claimed = {job.remote_id: job for job in claim_due_jobs(connection, limit=len(answers), now=now)}
    recorder.take([_poll_answer(claimed[name], answer, status, scrubber) for name, answer in answers.items()], {})
    assert recorder.write({}) == 0
    return ids


def _poll_answer(job: ClaimedJob, answer: object, status: int, scrubber: Scrubber) -> PollAnswer:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    reply, raw = read_answer(scrubber, status, {}, body, Question(job.remote_id, time.time()))
    return PollAnswer(job, reply, False, time.monotonic(), raw=raw)


def _kept(engine: Engine, job_id: int) -> Sequence[Row[Any]]:
    with engine.connect() as connection:
        return answers_of(connection, job_ids=[job_id])


def test_answers_that_no_rule_reads_are_stored_unchanged(engine: Engine) -> None:
    """Also answers that are not JSON. An answer that a rule reads is not stored while the job continues."""
    unread = {
        "word": DONE,
        "page": b"<html>hello</html>",
        "cut": b'{"status": "succ',
        "bytes": b"\xff\x00\xfe",
        "": b"",
    }
    unread = {name or "empty": answer for name, answer in unread.items()}
    read = {
        "processing": {"status": "processing"},
        "failed": {"status": "failed", "message": "no"},
        "ready": {"status": "success", "output": [LINK]},
    }
    ids = _record(engine, unread | read)

    stored = {name: _kept(engine, job_id) for name, job_id in ids.items()}
    assert {name: len(rows) for name, rows in stored.items()} == dict.fromkeys(unread, 1) | dict.fromkeys(read, 0)
    assert [(row.body, row.http_status, row.shape, row.recognised) for row in stored["word"]] == [
        (json.dumps(DONE), 200, "status=done; assets: [text]", False)
    ]
    assert [row.body for row in stored["page"]] == ["<html>hello</html>"]
    assert [row.body for row in stored["bytes"]] == ["\N{REPLACEMENT CHARACTER}" * 3]
    assert [row.body for row in stored["empty"]] == [""]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({"status": "failed", "message": "out of memory"}, "api_failed"),
        ({"status": "failed", "message": "Request not found"}, "not_found"),
        ({"status": "success", "output": [], "text": "a transcript"}, "no_output"),
        ({"status": "error", "message": "The prompt field is required."}, "api_error"),
    ],
)
def test_the_last_answer_of_a_job_that_ends_without_an_output_is_kept(
    engine: Engine, answer: object, code: str
) -> None:
    ids = _record(engine, {"7": answer}, **AT_ITS_END)

    assert read_job(engine, ids["7"]).error_code == code
    [row] = _kept(engine, ids["7"])
    assert (json.loads(row.body), row.recognised) == (answer, True)


def test_a_job_completed_by_a_promised_link_has_no_late_looks_left(engine: Engine) -> None:
    """They were planned when its deadline passed, in case the job expires."""
    with engine.connect() as connection:
        past = database_now(connection) - timedelta(minutes=1)
    ids = _record(engine, {"7": {"status": "processing", "future_links": [LINK]}}, deadline_at=past)
    with engine.begin() as connection:
        planned = look_of(connection, ids["7"])
        stored = {
            "location": "file:///a.png",
            "size_bytes": 1,
            "sha256": "0" * 64,
            "media_type": "image/png",
            "stored_at": past,
        }
        connection.execute(outputs.update().values(status="stored", due_at=None, **stored))

        assert finish_job_if_done(connection, ids["7"], Tally(), now=past) == "completed"
        assert (planned is None, look_of(connection, ids["7"])) == (False, None)


def test_a_job_whose_promised_links_are_tried_first_keeps_its_answer_and_its_late_looks(
    engine: Engine,
) -> None:
    """The job is downloading meanwhile. If nothing arrives, it expires and gets its late looks."""
    with engine.connect() as connection:
        past = database_now(connection) - timedelta(minutes=1)
    answer = {"status": "processing", "future_links": [LINK]}
    ids = _record(engine, {"7": answer}, deadline_at=past)

    row = read_job(engine, ids["7"])
    assert row.status == "downloading"
    assert [json.loads(stored.body) for stored in _kept(engine, ids["7"])] == [answer]
    with engine.begin() as connection:
        hour = past + timedelta(hours=1)
        assert due_looks(connection, ["default"], now=hour, limit=10) == []
        connection.execute(outputs.update().values(status="failed", error_code="gone", due_at=None))
        assert finish_job_if_done(connection, ids["7"], Tally(), now=hour) == "expired"
        assert [due.job_id for due in due_looks(connection, ["default"], now=hour, limit=10)] == [ids["7"]]

        ready = Ready((Link("https://cdn.test/other.png"),))
        revived = revive(connection, {ids["7"]: ready}, Tally(), now=hour, why="a test", queued=True)
        assert revived.jobs == {ids["7"]: "downloading"}
        assert due_looks(connection, ["default"], now=hour, limit=10) == []
    with engine.connect() as connection:
        [output] = connection.execute(select(outputs)).all()
        promise = promise_row(connection, ids["7"])
    assert (output.id, output.url, output.status) == (revived.outputs[0], "https://cdn.test/other.png", "pending")
    assert promise is not None
    assert promise.end_status is None


@pytest.mark.parametrize("answer", [{"status": "processing", "message": "soon"}, DONE], ids=["processing", "unread"])
def test_the_last_answer_of_a_job_that_expires_is_kept_and_its_late_looks_are_planned(
    engine: Engine, answer: object
) -> None:
    """In the transaction that ends the job."""
    with engine.connect() as connection:
        past = database_now(connection) - timedelta(minutes=1)
    ids = _record(engine, {"7": answer, "sha256:" + "0a" * 16: answer}, deadline_at=past)

    row = read_job(engine, ids["7"])
    assert row.status == "expired"
    assert [json.loads(stored.body) for stored in _kept(engine, ids["7"])] == [answer]
    with engine.connect() as connection:
        [look] = connection.execute(select(late_looks)).all()
    assert (look.job_id, look.due_at, look.looks) == (ids["7"], row.deadline_at + timedelta(hours=1), 0)


def test_stored_text_has_no_key_at_most_64_kib_and_whole_links(engine: Engine) -> None:
    """Keys are removed before the text is cut. A signed link that begins like a key is kept."""
    signed = f"https://cdn.test/a.png?token={KEY[:20]}"
    for cut in range(-len(KEY) - 2, 3):
        padding = "é" * ((MAX_BYTES + cut - len(json.dumps({"status": "done", "assets": [signed], "x": ""}))) // 2)
        answer = json.dumps(
            {"status": "done", "assets": [signed], "x": f"{padding}{KEY}", "y": KEY}, ensure_ascii=False
        )
        text = kept_text(RawAnswer(200, answer.encode()), Scrubber([KEY])).text
        assert len(text.encode()) <= MAX_BYTES
        assert KEY[:8] not in text.replace(signed, "")
        assert signed in text

    ids = _record(
        engine, {"7": {"status": "done", "assets": [signed], "echo": KEY, "head": KEY[:20], "x": "y" * 200_000}}
    )
    [row] = _kept(engine, ids["7"])
    assert len(row.body) == MAX_BYTES
    assert row.shape == "status=done; assets: [text]; echo: text; head: text; x: text"
    assert KEY[:8] not in row.body.replace(signed, "")
    assert signed in row.body


def test_the_texts_of_unread_answers_are_made_before_the_transaction_that_writes_them(engine: Engine) -> None:
    """It takes up to a second for large answers, and other processes would wait for the locked rows."""
    under_way: list[int] = []
    open_transactions: list[int] = []

    def begun(_: Connection) -> None:
        under_way.append(1)

    def ended(_: Connection) -> None:
        under_way.clear()

    listeners = (("begin", begun), ("commit", ended), ("rollback", ended))
    for name, listener in listeners:
        event.listen(engine, name, listener)
    ids = _record(engine, {"7": DONE, "8": b"<html>"}, before_text=lambda: open_transactions.append(len(under_way)))
    for name, listener in listeners:
        event.remove(engine, name, listener)

    assert open_transactions == [0, 0]
    assert [len(_kept(engine, job_id)) for job_id in ids.values()] == [1, 1]


def test_the_shape_of_a_long_processing_answer_is_not_computed() -> None:
    """Some answers repeat the whole order with its pictures each time."""
    order = {"meta": {"init_image": "x" * 200_000}}
    _, processing = read_answer(
        Scrubber([KEY]), 200, {}, json.dumps({"status": "processing"} | order).encode(), Question("7", 0.0)
    )
    _, unread = read_answer(
        Scrubber([KEY]), 200, {}, json.dumps({"status": "done"} | order).encode(), Question("7", 0.0)
    )

    assert processing is not None
    assert (processing.shape, len(processing.body)) == (TOO_LARGE, 128 * 1024)
    assert unread is not None
    assert str(unread.shape).startswith("status=done")


@pytest.mark.parametrize("size", [0, 200_000], ids=["short", "long"])
def test_a_shape_contains_no_part_of_a_key(engine: Engine, size: int) -> None:
    """Neither in the status word nor in a name, however long the answer is."""
    answer = {"status": f"no {KEY[:22]}", KEY: 1, KEY[:22]: 2, "x": "y" * size, "of": {"status": KEY}}
    ids = _record(engine, {"7": answer})
    [row] = _kept(engine, ids["7"])
    assert KEY[3:12] not in row.shape
    assert row.shape.startswith("status=no ")


def test_given_answers_that_a_rule_reads_when_they_are_recorded_then_no_statement_stores_them(
    engine: Engine,
) -> None:
    """Nearly all answers are of this kind."""
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    _record(engine, {str(number): {"status": "processing"} for number in range(5)})
    assert not [statement for statement in statements if "fetch_unread" in statement or "late_looks" in statement]


# ── reading again ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def word_settings(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with additional status words, for this database. No process is woken."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setattr("worker.operations.unread.wake", lambda _: None)
    return Settings(sd_api_status_words='{"done": "success", "burnt": "failed", "hot": "processing", "bad": "error"}')


def _keep(connection: Connection, job_id: int, answer: object, *, at: datetime = NOW, recognised: bool = False) -> None:
    body = answer if isinstance(answer, str) else json.dumps(answer)
    keep_answers(connection, [KeptAnswer(job_id, 200, "a shape", body, recognised)], now=at)


def _ended(status: str, code: str) -> dict[str, Any]:
    return {"status": status, "error_code": code, "error_message": "m", "due_at": None, "completed_at": NOW}


def _apply(settings: Settings, **options: Any) -> dict[int, Reread]:
    return {job.id: job for batch in apply(settings, **options) for job in batch}


@pytest.mark.parametrize("state", ["pending", "held", "claimed", "failed", "expired"])
def test_a_job_whose_stored_answer_lists_outputs_starts_downloading(
    engine: Engine, word_settings: Settings, state: str
) -> None:
    """As an answer does with a pending job, and `retry` with an ended one."""
    states: dict[str, dict[str, Any]] = {
        "pending": {},
        "held": {"held_at": NOW, "due_at": NOW + timedelta(days=9_999)},
        "claimed": {"claim_token": "t", "claim_holder": "h"},
        "failed": _ended("failed", "not_found"),
        "expired": _ended("expired", "expired"),
    }
    with engine.begin() as connection:
        job_id = add_job(connection, on_done="shop.done", told_at=NOW, last_answer="1.0 s: odd", **states[state])
        if state == "expired":
            connection.execute(late_looks.insert().values(job_id=job_id, due_at=NOW))
        _keep(connection, job_id, DONE)
        _keep(
            connection,
            job_id,
            {"status": "failed", "message": "Request not found"},
            at=NOW + seconds(9),
            recognised=True,
        )

    assert _apply(word_settings)[job_id] == Reread(job_id, True, "downloading", "ready", "ready, 1 output")

    row = read_job(engine, job_id)
    assert (row.status, row.error_code, row.completed_at, row.due_at, row.held_at) == (
        "downloading",
        None,
        None,
        None,
        None,
    )
    assert (row.claim_token, row.told_at) == (None, None)
    assert row.ready_at is not None
    assert row.last_answer.startswith(
        f"{row.last_answer.split(' s:')[0]} s: ready, 1 output (a kept answer, read again)"
    )
    assert row.last_answer.endswith("1.0 s: odd")
    with engine.connect() as connection:
        [output] = connection.execute(select(outputs)).all()
        assert look_of(connection, job_id) is None
    assert (output.job_id, output.position, output.url, output.status) == (job_id, 0, LINK, "pending")
    assert _apply(word_settings) == {}


def test_an_end_that_is_revoked_is_sent_as_an_event_first(engine: Engine, word_settings: Settings) -> None:
    """The job sends another notification for its next end."""
    with engine.begin() as connection:
        job_id = add_job(connection, webhook_url="https://app.test/hook", **_ended("expired", "expired"))
        _keep(connection, job_id, DONE)

    assert _apply(word_settings)[job_id].changed

    with engine.connect() as connection:
        [event] = connection.execute(select(events)).all()
    assert (event.type, event.job_id) == ("job.expired", job_id)
    assert read_job(engine, job_id).announced_at is None


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        ({"status": "burnt", "message": "too hot"}, "failed", "api_failed"),
        ({"status": "bad", "message": "The prompt field is required."}, "failed", "api_error"),
        ({"status": "bad", "message": "something"}, "pending", None),
        ({"status": "burnt", "message": "Failed, Try Again"}, "pending", None),
        ({"status": "hot"}, "pending", None),
        ({"status": "done"}, "pending", None),
        ({"status": "odd"}, "pending", None),
        ({"status": "done", "assets": [LINK], "id": 99}, "pending", None),
        ({"status": "error", "message": "Rate limit exceeded"}, "pending", None),
        ('{"status": "done", "assets": ["https://cdn.te', "pending", None),
    ],
)
def test_other_meanings_end_a_pending_job_or_change_nothing(
    engine: Engine, word_settings: Settings, answer: object, status: str, code: str | None
) -> None:
    with engine.begin() as connection:
        pending = add_job(connection, "1")
        expired = add_job(connection, "2", **_ended("expired", "expired"))
        for job_id in (pending, expired):
            _keep(connection, job_id, answer)

    read = _apply(word_settings)

    row = read_job(engine, pending)
    assert (row.status, row.error_code) == (status, code)
    assert (row.completed_at is None, row.due_at is None) == (status == "pending", status != "pending")
    assert (read[pending].changed, read[pending].status) == (status != "pending", status)
    assert (read[expired].changed, read_job(engine, expired).status) == (False, "expired")


def test_an_answer_from_before_a_retry_ends_nothing(engine: Engine, word_settings: Settings) -> None:
    """An answer that a rule read already, or one of a job that is being polled, also ends nothing."""
    burnt = {"status": "burnt", "message": "too hot"}
    with engine.begin() as connection:
        retried = add_job(connection, "1", deadline_at=NOW + seconds(2 * HOUR))
        read = add_job(connection, "2")
        claimed = add_job(connection, "3", claim_token="t", claim_holder="h")
        for job_id, recognised in ((retried, False), (read, True), (claimed, False)):
            _keep(connection, job_id, burnt, recognised=recognised)

    assert not any(job.changed for job in _apply(word_settings).values())
    assert {read_job(engine, job_id).status for job_id in (retried, read, claimed)} == {"pending"}


def test_a_job_that_has_outputs_already_stays_as_it_is(engine: Engine, word_settings: Settings) -> None:
    """Its outputs could not be stored; `retry` downloads them again."""
    with engine.begin() as connection:
        job_id = add_job(connection, ready_at=NOW, **_ended("failed", "output_failed"))
        add_output(connection, job_id, status="failed", due_at=None, error_code="gone")
        _keep(connection, job_id, DONE)

    read = _apply(word_settings)[job_id]
    assert (read.changed, read.status) == (False, "failed")
    assert read.note.endswith("the job already has outputs")


def test_with_a_shape_only_jobs_with_such_an_answer_are_read_again(engine: Engine, word_settings: Settings) -> None:
    with engine.begin() as connection:
        first, second = add_job(connection, "1"), add_job(connection, "2")
        _keep(connection, first, DONE)
        keep_answers(connection, [KeptAnswer(second, 200, "another", json.dumps(DONE), False)], now=NOW)

    assert set(_apply(word_settings, shape="another")) == {second}
    assert set(_apply(word_settings)) == {first}


def test_many_jobs_are_read_again_in_several_transactions(engine: Engine, word_settings: Settings) -> None:
    with engine.begin() as connection:
        ids = [add_job(connection, str(number)) for number in range(230)]
        for job_id in ids:
            _keep(connection, job_id, {"status": "done", "assets": [f"{LINK}?{job_id}"]})

    batches = list(apply(word_settings))
    assert [len(batch) for batch in batches] == [100, 100, 30]
    assert all(job.changed for batch in batches for job in batch)
    with engine.connect() as connection:
        assert len(connection.execute(select(outputs.c.url).distinct()).all()) == 230
