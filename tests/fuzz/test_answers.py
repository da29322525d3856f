"""Any answer at all, through the real parser, the real decisions and the real statements: it harms no job."""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import Engine, String, Table, Text, delete, select

from tests.fuzz.answers import BODIES, CODES, HEADERS, ID, KEY, key_forms
from tests.fuzz.effort import EFFORTS, tried
from tests.rows import add_job, add_output, job_values
from worker.core.circuit_breaker import BreakerInput, CircuitBreaker, RateMeasurement, after_replies
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts, Strikes
from worker.core.pacing.policy import Pace
from worker.core.plain_text import plain_text
from worker.core.reply import AnotherJob, Empty, Processing, RateLimited, RawAnswer, Ready, Reply
from worker.polling.kept_text import kept_text
from worker.polling.recorder import Recorder
from worker.polling.request_pool import PollAnswer
from worker.store.claims import ClaimedJob
from worker.store.schema import bodies, breakers, jobs, outputs
from worker.system.redaction import Scrubber
from worker.vendor.links import OUTPUT_FIELDS, stored_address
from worker.vendor.replies import FAILED_WORDS, WAITING, Question, parse

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # answers are long

SCRUBBER = Scrubber([KEY])
PACE = Pace("learned", 0.5, 3.0)
_PARTS = re.compile(r"[\s,]+")  # between several addresses in one text
MOST_TEXT_BYTES = 65_535  # what MariaDB's TEXT holds


def reply_to(code: int, headers: Mapping[str, str], body: bytes, *, training: bool = False) -> Reply:
    """What the product makes of an answer, scrubbed as it is before it is read."""
    return parse(code, headers, SCRUBBER.body(body), Question(ID, time.time(), training))


def read(body: bytes) -> dict[str, Any]:
    """The answer as somebody else would read it; empty where it is no object."""
    with suppress(ValueError, RecursionError):
        found = json.loads(body.decode("utf-8-sig"))
        return found if isinstance(found, dict) else {}
    return {}


def texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (list, dict)):
            waiting += one.values() if isinstance(one, dict) else one


def of_another_job(answer: Mapping[str, Any], field: str = "id") -> bool:
    """Whether an answer names an id that is not this job's."""
    named = answer.get(field)
    if isinstance(named, bool) or not isinstance(named, (str, int, float)):
        return False
    if isinstance(named, float):
        return math.isfinite(named) and named == int(named) and int(named) != int(ID)
    return str(named).strip() not in ("", ID) if isinstance(named, str) else named != int(ID)


@EFFORTS
def test_no_answer_makes_the_parser_fail_or_a_job_ready_without_an_output_of_that_very_answer(examples: int) -> None:
    @tried(examples)
    @given(code=CODES, headers=HEADERS, body=BODIES, training=st.booleans())
    @example(200, {}, b'{"status": "success", "id": 12202889, "output": ["https://h.example/a.png"]}', False)
    @example(200, {}, b'{"status": "success", "id": "x", "output": "", "links": ["https://h.example/a.png"]}', False)
    @example(200, {}, b'{"status": "success", "output": "", "future_links": ["https://h.example/a.png"]}', False)
    def check(code: int, headers: dict[str, str], body: bytes, training: bool) -> None:
        reply = reply_to(code, headers, body, training=training)

        answer = read(SCRUBBER.body(body))
        if isinstance(reply, RateLimited):
            assert 1 <= reply.seconds <= 900
        if isinstance(reply, Ready):
            assert 200 <= code < 300
            if training:
                assert str(answer.get("status", "")).strip().lower() not in {*WAITING, *FAILED_WORDS}
                assert reply.outputs == ()
                return
            assert answer["status"].strip().lower() == "success"
            assert not of_another_job(answer)
            listed = [text for name in (*OUTPUT_FIELDS, "meta") for text in texts(answer.get(name))]
            known = {stored_address(part) for text in listed for part in (text.strip(), *_PARTS.split(text))}
            assert reply.outputs
            for link in reply.outputs:
                assert link.body is not None or any(text.startswith(link.url.removesuffix("…")) for text in known)
                assert known.issuperset(link.proxies)
        elif isinstance(reply, AnotherJob):
            assert of_another_job(answer) or (training and of_another_job(answer, "training_id"))

    check()


@EFFORTS
def test_no_form_of_the_key_in_an_answer_gets_into_a_reply(examples: int) -> None:
    forms = key_forms()

    @tried(examples)
    @given(code=CODES, headers=HEADERS, body=BODIES, training=st.booleans())
    def check(code: int, headers: dict[str, str], body: bytes, training: bool) -> None:
        said = json.dumps(astuple(reply_to(code, headers, body, training=training)), default=repr, ensure_ascii=False)

        assert not [form for form in forms if form in said or form in said.replace("\\\\", "\\")]

    check()


@EFFORTS
def test_whatever_a_gate_hears_it_can_be_written_and_opens_again(examples: int) -> None:
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    trouble = st.sampled_from([(401, b"{}"), (503, b""), (429, b"{}"), (200, b'{"status": "processing"}'), (200, b"<")])
    answers = st.tuples(
        trouble | st.tuples(CODES, BODIES), HEADERS, st.booleans(), st.sampled_from([0.0, 1.0, 61.0, 950.0])
    )

    @tried(examples, of=4)
    @example("account", [((401, b"{}"), {}, True, 61.0)] * 8)
    @example("host", [((503, b""), {}, True, 61.0)] * 12)
    @given(scope=st.sampled_from(["account", "host"]), heard=st.lists(answers, min_size=3, max_size=9))
    def check(scope: Any, heard: list[tuple[tuple[int, bytes], dict[str, str], bool, float]]) -> None:
        breaker, now = CircuitBreaker(scope, "one"), moment
        for (code, body), headers, probe, wait in heard:
            now += timedelta(seconds=wait)
            one = BreakerInput(reply_to(code, headers, body), now - timedelta(seconds=1), probe)
            breaker = after_replies(breaker, [one], RateMeasurement(10.0, 3.0), now=now)

            assert (breaker.reason is None) == (breaker.since is None)
            assert breaker.ceiling is None or 0 < breaker.ceiling <= 10.0
        assert breaker.allows(now + timedelta(seconds=1_000)) != "none"

    check()


# ── down to the rows ──────────────────────────────────────────────────────────────────────────────────────────────────

_AGES = st.sampled_from([0.0, 1.0, 10.0, 59.0, 61.0, 4_000.0])
_COUNTS = st.integers(0, 5)


@EFFORTS
def test_whatever_is_answered_the_rows_hold_what_their_columns_and_constraints_allow(
    engine: Engine, examples: int
) -> None:
    recorder = Recorder(
        engine=engine,
        pace=PACE,
        rps=lambda _: 10.0,
        queue_downloads=lambda _: None,
        notify=lambda _: None,
        kept_text=lambda raw: kept_text(raw, Scrubber([KEY])),
        late_looks=(3_600.0,),
    )
    dialect = engine.dialect.name

    @tried(examples, of=1 if dialect == "sqlite" else 10)
    @given(
        code=CODES,
        headers=HEADERS,
        body=BODIES,
        training=st.booleans(),
        downloading=st.booleans(),
        probe=st.booleans(),
        age=_AGES,
        counts=st.tuples(_COUNTS, _COUNTS, _COUNTS, _COUNTS),
    )
    @example(200, {}, b'{"status": "failed", "message": "%s"}' % (b"x" * 600), False, False, False, 0.0, (0, 0, 0, 0))
    @example(401, {}, b'{"message": "%s"}' % ("é" * 600).encode(), False, False, True, 0.0, (0, 0, 0, 0))
    @example(200, {}, b'{"status": "%s"}' % (b"x" * 600), False, True, False, 4_000.0, (0, 0, 0, 0))
    def check(
        code: int,
        headers: dict[str, str],
        body: bytes,
        training: bool,
        downloading: bool,
        probe: bool,
        age: float,
        counts: tuple[int, int, int, int],
    ) -> None:
        job = _claimed(engine, downloading, age, counts)
        reply = reply_to(code, headers, body, training=training)

        recorder.take([PollAnswer(job, reply, probe, time.monotonic(), raw=RawAnswer(code, body))], {})
        lost = recorder.write({})

        assert (lost, recorder.unwritten) == (0, 0)
        with engine.connect() as connection:
            row = connection.execute(select(jobs)).one()
            listed = connection.execute(select(outputs).order_by(outputs.c.position)).all()
            held = connection.execute(select(breakers)).all()
            carried = set(connection.execute(select(bodies.c.output_id)).scalars())
        assert row.error_code != "unwritable"
        assert row.claim_token is None
        assert (row.remote_id, row.fetch_url, row.account) == (ID, f"{BASE}/{ID}", "default")
        assert row.status in ({"downloading"} if downloading else {"pending", "failed", "expired", *_ready(reply)})
        if row.status == "pending":
            assert row.due_at > row.asked_at
        elif not downloading and row.status == "downloading":
            assert [one.position for one in listed] == list(range(len(listed)))
            assert all(one.url.startswith("data:") for one in listed if one.id in carried)
        for table, one in [(jobs, row), *((outputs, one) for one in listed), *((breakers, one) for one in held)]:
            _check_texts(table, one)

    check()


BASE = "https://api.test/api/v3/fetch"


def _ready(reply: Reply) -> set[str]:
    if isinstance(reply, (Processing, Empty)) and reply.promised:
        return {"downloading"}  # at the end of its time a job is looked for where it was promised
    if not isinstance(reply, Ready):
        return set()
    return {"downloading"} if reply.outputs else {"completed"}


def _claimed(engine: Engine, downloading: bool, age: float, counts: tuple[int, int, int, int]) -> ClaimedJob:
    """A job that was just claimed, with so many strikes, tracked so many seconds ago; all others are gone."""
    now = datetime.now(UTC)
    since = now - timedelta(seconds=age)
    strikes = Strikes(*counts, last=since)
    claim = {"claim_token": "t", "claim_holder": "h", "due_at": now + timedelta(seconds=300), "asked_at": now}
    values = {"tracked_at": since, "submitted_at": since, "deadline_at": since + timedelta(seconds=3_600)}
    struck = dict(zip(("failed_answers", "unknown_answers", "error_answers", "empty_answers"), counts, strict=True))
    state: dict[str, Any] = {"status": "downloading", "ready_at": now} if downloading else {}
    with engine.begin() as connection:
        for table in (bodies, outputs, jobs, breakers):
            connection.execute(delete(table))
        if engine.dialect.name in ("mysql", "mariadb"):
            connection.execute(jobs.insert().values(job_values(ID, **claim, **values, **struck, **state)))
            job_id = connection.execute(select(jobs.c.id)).scalar_one()
        else:
            job_id = add_job(connection, ID, **claim, **values, **struck, **state)
        if downloading:
            add_output(connection, job_id, renewed=True)
    status: Any = "downloading" if downloading else "pending"
    facts = JobFacts(status, since, values["deadline_at"], strikes)
    address = FetchAddress(f"{BASE}/{ID}", BASE, "api.test")
    return ClaimedJob(job_id, "t", "default", ID, "image", address, None, 1, since, facts)


def _check_texts(table: Table, row: Any) -> None:
    """Texts fit their columns on every database, whether or not this one would have said so."""
    for column in table.c:
        value = row._mapping[column.name]
        if isinstance(value, str):
            assert value.isprintable() or plain_text(value) == value
            assert KEY not in value
            if isinstance(column.type, Text):
                assert len(value.encode()) <= MOST_TEXT_BYTES, f"{table.name}.{column.name}"
            elif isinstance(column.type, String):
                assert len(value) <= (column.type.length or 0), f"{table.name}.{column.name}"


@pytest.mark.parametrize("form", key_forms())
def test_the_key_is_found_in_every_form_that_is_planted(form: str) -> None:
    """In a message, and in a link."""
    said = reply_to(200, {}, f'{{"status": "failed", "message": "a {form} b"}}'.encode())
    ready = reply_to(200, {}, f'{{"status": "success", "output": ["https://h/?key={form}&b"]}}'.encode())

    assert "[key]" in repr(said)
    assert "[key]" in repr(ready)
