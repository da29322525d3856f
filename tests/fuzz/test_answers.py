"""Random answers with the real parser, the real decisions and the real SQL statements: no answer breaks a job."""

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
from tests.fuzz.effort import EFFORTS, with_effort
from tests.recorders import make_recorder
from tests.rows import add_job, add_output, job_values
from worker.core.circuit_breaker import BreakerInput, CircuitBreaker, RateMeasurement, after_replies
from worker.core.identity import FetchAddress
from worker.core.lifecycle import JobFacts, Strikes
from worker.core.pacing.policy import Pace
from worker.core.plain_text import plain_text
from worker.core.reply import AnotherJob, Empty, Processing, RateLimited, RawAnswer, Ready, Reply
from worker.polling.request_pool import PollAnswer
from worker.store.claims import ClaimedJob
from worker.store.schema import bodies, breakers, jobs, outputs
from worker.system.redaction import Scrubber
from worker.vendor.answer_links import OUTPUT_FIELDS, stored_address
from worker.vendor.replies import FAILED_WORDS, WAITING, Question, parse

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # answers are long

SCRUBBER = Scrubber([KEY])
PACE = Pace("learned", 0.5, 3.0)
_PARTS = re.compile(r"[\s,]+")  # between several URLs in one text
MOST_TEXT_BYTES = 65_535  # the limit of TEXT in MariaDB


def reply_to(code: int, headers: Mapping[str, str], body: bytes, *, training: bool = False) -> Reply:
    """Return the reply for an answer, which is scrubbed before it is read."""
    return parse(code, headers, SCRUBBER.body(body), Question(ID, time.time(), training))


def read(body: bytes) -> dict[str, Any]:
    """Parse the answer independently of the product. The result is empty if it is not an object."""
    with suppress(ValueError, RecursionError):
        parsed = json.loads(body.decode("utf-8-sig"))
        return parsed if isinstance(parsed, dict) else {}
    return {}


def texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value, also those of a list or an object that is written as a text."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
            with suppress(ValueError, RecursionError):
                parsed = json.loads(item)
                waiting += [parsed] if isinstance(parsed, (list, dict)) else []
        elif isinstance(item, (list, dict)):
            waiting += item.values() if isinstance(item, dict) else item


def run_of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `execution` of an answer about a workflow, or the answer itself. An empty one says nothing."""
    execution = answer.get("execution")
    return execution if isinstance(execution, dict) and execution else answer


def succeeded(answer: Mapping[str, Any]) -> bool:
    """Return whether an answer says that the job is done."""
    states = [answer.get("status"), run_of(answer).get("status"), answer.get("success")]
    words = [state.strip().lower() if isinstance(state, str) else state for state in states]
    return words[0] in ("success", True) or words[1] == "completed" or (words[0] is None and words[2] is True)


def id_text(value: object) -> str:
    """Return an id as a text, or an empty text if the value is no id."""
    if isinstance(value, float):
        value = int(value) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    text = str(value).strip()
    return "" if text == "0" else text


def of_another_job(answer: Mapping[str, Any], field: str = "id") -> bool:
    """Return whether an answer has the id of another job, and no id of this one."""
    meta = answer.get("meta")
    chat = answer.get("chat_id") or (meta.get("chat_id") if isinstance(meta, dict) else None)
    named = run_of(answer).get(field)
    others = (answer.get("request_id"), chat)
    return id_text(named) not in ("", ID) and ID not in map(id_text, others)


@EFFORTS
def test_no_answer_breaks_the_parser_or_adds_outputs_that_it_does_not_list(examples: int) -> None:
    @with_effort(examples)
    @given(code=CODES, headers=HEADERS, body=BODIES, training=st.booleans())
    @example(200, {}, b'{"status": "success", "id": 12202889, "output": ["https://h.example/a.png"]}', False)
    @example(200, {}, b'{"status": "success", "id": "x", "output": "", "links": ["https://h.example/a.png"]}', False)
    @example(200, {}, b'{"status": "success", "output": "", "future_links": ["https://h.example/a.png"]}', False)
    @example(200, {}, b'{"links": ["https://h.example/a.png"], "execution": {"status": "completed"}}', False)
    @example(200, {}, b'{"status": "success", "output": "[\\"https://h/1.png\\", \\"https://h/2.png\\"]"}', False)
    @example(200, {}, b'{"status": "success", "output": ["https://h/1.png"], "id": "m", "chat_id": "12202888"}', False)
    @example(200, {}, b'{"status": "success", "output": ["https://h/1.png"], "id": 12202889, "execution": {}}', False)
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
            assert succeeded(answer)
            assert not of_another_job(answer)
            objects = (answer, run_of(answer))
            listed = [text for part in objects for name in (*OUTPUT_FIELDS, "meta") for text in texts(part.get(name))]
            listed_urls = {stored_address(part) for text in listed for part in (text.strip(), *_PARTS.split(text))}
            assert reply.outputs
            for link in reply.outputs:
                assert link.body is not None or any(text.startswith(link.url.removesuffix("…")) for text in listed_urls)
                assert listed_urls.issuperset(link.proxies)
        elif isinstance(reply, AnotherJob):
            assert of_another_job(answer) or (training and of_another_job(answer, "training_id"))

    check()


@EFFORTS
def test_no_form_of_the_key_gets_into_a_reply(examples: int) -> None:
    forms = key_forms()

    @with_effort(examples)
    @given(code=CODES, headers=HEADERS, body=BODIES, training=st.booleans())
    def check(code: int, headers: dict[str, str], body: bytes, training: bool) -> None:
        reply_text = json.dumps(
            astuple(reply_to(code, headers, body, training=training)), default=repr, ensure_ascii=False
        )

        assert not [form for form in forms if form in reply_text or form in reply_text.replace("\\\\", "\\")]

    check()


@EFFORTS
def test_any_answers_leave_a_breaker_that_can_be_stored_and_closed_again(examples: int) -> None:
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    trouble = st.sampled_from([(401, b"{}"), (503, b""), (429, b"{}"), (200, b'{"status": "processing"}'), (200, b"<")])
    answers = st.tuples(
        trouble | st.tuples(CODES, BODIES), HEADERS, st.booleans(), st.sampled_from([0.0, 1.0, 61.0, 950.0])
    )

    @with_effort(examples, of=4)
    @example("account", [((401, b"{}"), {}, True, 61.0)] * 8)
    @example("host", [((503, b""), {}, True, 61.0)] * 12)
    @given(scope=st.sampled_from(["account", "host"]), received=st.lists(answers, min_size=3, max_size=9))
    def check(scope: Any, received: list[tuple[tuple[int, bytes], dict[str, str], bool, float]]) -> None:
        breaker, now = CircuitBreaker(scope, "one"), moment
        for (code, body), headers, probe, wait in received:
            now += timedelta(seconds=wait)
            breaker_input = BreakerInput(reply_to(code, headers, body), now - timedelta(seconds=1), probe)
            breaker = after_replies(breaker, [breaker_input], RateMeasurement(10.0, 3.0), now=now)

            assert (breaker.reason is None) == (breaker.since is None)
            assert breaker.ceiling is None or 0 < breaker.ceiling <= 10.0
        assert breaker.allows(now + timedelta(seconds=1_000)) != "none"

    check()


# ── down to the rows ──────────────────────────────────────────────────────────────────────────────────────────────────

_AGES = st.sampled_from([0.0, 1.0, 10.0, 59.0, 61.0, 4_000.0])
_COUNTS = st.integers(0, 5)


@EFFORTS
def test_any_answer_gives_rows_within_columns_and_constraints(engine: Engine, examples: int) -> None:
    recorder = make_recorder(engine, Scrubber([KEY]), pace=PACE, late_looks=(3_600.0,))
    dialect = engine.dialect.name

    @with_effort(examples, of=1 if dialect == "sqlite" else 10)
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
            breaker_rows = connection.execute(select(breakers)).all()
            carried = set(connection.execute(select(bodies.c.output_id)).scalars())
        assert row.error_code != "unwritable"
        assert row.claim_token is None
        assert (row.remote_id, row.fetch_url, row.account) == (ID, f"{BASE}/{ID}", "default")
        assert row.status in ({"downloading"} if downloading else {"pending", "failed", "expired", *_ready(reply)})
        if row.status == "pending":
            assert row.due_at > row.asked_at
        elif not downloading and row.status == "downloading":
            assert [output.position for output in listed] == list(range(len(listed)))
            assert all(output.url.startswith("data:") for output in listed if output.id in carried)
        for table, output in [
            (jobs, row),
            *((outputs, output) for output in listed),
            *((breakers, output) for output in breaker_rows),
        ]:
            _check_texts(table, output)

    check()


BASE = "https://api.test/api/v3/fetch"


def _ready(reply: Reply) -> set[str]:
    if isinstance(reply, (Processing, Empty)) and reply.promised:
        return {"downloading"}  # at its deadline the promised links of the job are tried
    if not isinstance(reply, Ready):
        return set()
    return {"downloading"} if reply.outputs else {"completed"}


def _claimed(engine: Engine, downloading: bool, age: float, counts: tuple[int, int, int, int]) -> ClaimedJob:
    """Return a job that was just claimed, with these strikes, tracked `age` seconds ago. All other jobs are deleted."""
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
    """Check that texts fit their columns on every database, not only on this one."""
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
def test_the_key_is_removed_in_every_form(form: str) -> None:
    """It is removed from messages and links."""
    reply = reply_to(200, {}, f'{{"status": "failed", "message": "a {form} b"}}'.encode())
    ready = reply_to(200, {}, f'{{"status": "success", "output": ["https://h/?key={form}&b"]}}'.encode())

    assert "[key]" in repr(reply)
    assert "[key]" in repr(ready)
