"""`show`: why a job does not move, link by link, and the one line that says what to do about it."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from tests import planted
from tests.cli.test_commands import teach
from tests.planted import DEAD, ELSEWHERE
from tests.rows import add_output, seconds
from worker.cli import main
from worker.coordination.rate_limiter import RateLimiter, redis_client
from worker.core.answer_history import NOTE_SEPARATOR
from worker.operations import explain
from worker.store.schema import HELD_UNTIL
from worker.system.process_identity import holder_name

NOBODY = "redis://127.0.0.1:1/0"


@dataclass(frozen=True)
class Case:
    """A job that does not move: how it is planted, which link says so, in which words, and what is to be done."""

    name: str
    plant: Callable[[Connection], int]
    step: str
    state: str
    detail: str
    advice: str


def awake(connection: Connection, name: str = "default") -> None:
    """An account that somebody asks for."""
    planted.breaker(connection, "account", name, asked_at=planted.now())


def waits(connection: Connection, **changes: Any) -> int:
    awake(connection)
    return planted.waiting(connection, "1", **({"due": 4.0} | changes))


def refused(reason: str, account: str = "default", **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.held(connection, "account", account, reason, **changes)
        return planted.waiting(connection, "1", account=account)

    return plant


def by_hand(scope: str, name: str) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.breaker(connection, scope, name, paused_at=planted.now() - seconds(75))
        return planted.waiting(connection, "1")

    return plant


def host_away(connection: Connection) -> int:
    awake(connection)
    planted.held(connection, "host", "api.test", "unreachable: no answer")
    return planted.waiting(connection, "1")


def nobody_probes(connection: Connection) -> int:
    at = planted.now()
    planted.held(connection, "account", "default", "key rejected: no", probe_at=at - seconds(600))
    return planted.waiting(connection, "1")


def behind(connection: Connection) -> int:
    awake(connection)
    for number in range(3):
        planted.waiting(connection, f"older{number}", due=-50.0)
    planted.waiting(connection, "younger", due=-1.0)
    planted.waiting(connection, "waits", due=60.0, priority=7)
    planted.waiting(connection, "higher", due=-1.0, priority=7)
    return planted.waiting(connection, "1", due=-10.0)


def claims(holder: str, over: float, *, asleep: bool = False) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.breaker(connection, "account", "default", asked_at=planted.now() - seconds(900 if asleep else 1))
        return planted.claimed(connection, "1", holder, over=over)

    return plant


def output(code: str | None, *, due: float = 40.0, **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        message = None if code is None else "no answer: ConnectTimeout"
        at = {"due_at": planted.now() + seconds(due)}
        return planted.delivered(connection, "1", **(at | {"error_code": code, "error_message": message} | changes))

    return plant


def receiving(over: float, holder: str = ELSEWHERE) -> Callable[[Connection], int]:
    return lambda connection: planted.received(
        connection, "1", over=over, claim_holder=holder, received_bytes=2_500_000
    )


def renewing(connection: Connection) -> int:
    job_id = planted.delivered(connection, "1", error_code="gone", error_message="HTTP 404", renewed=True)
    connection.exec_driver_sql("UPDATE fetch_jobs SET due_at = submitted_at")
    planted.held(connection, "account", "default", "no credits: none left")
    return job_id


def told(due: float, **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        job_id = planted.failed(connection, "1", status="completed", error_code=None, ready_at=planted.now())
        planted.event(connection, job_id, due=due, **changes)
        return job_id

    return plant


def unannounced(connection: Connection) -> int:
    ended = {"completed_at": planted.now() - seconds(600), "webhook_url": "https://shop.test/hook"}
    return planted.failed(connection, "1", status="completed", error_code=None, ready_at=planted.now(), **ended)


def ended(code: str, output_code: str | None = None, status: str = "failed") -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        job_id = planted.failed(connection, "1", status=status, error_code=code)
        if output_code is not None:
            add_output(connection, job_id, status="failed", due_at=None, error_code=output_code)
        return job_id

    return plant


SWEEP = "nothing: the next sweep gives it back within seconds"
TAKEN_UP = "it takes up what a process that is gone has left"
CASES = [
    Case("waits", waits, "poll", "waits", r"in \d\.\d s", r"nothing: it is asked in \d\.\d s"),
    Case("no worker", lambda c: planted.waiting(c, "1"), "poll", "due", r"for 10\d s", "start a `worker` process: .*"),
    Case("due just now", lambda c: waits(c, due=-1), "poll", "due", r"for .*", "nothing: it is asked next"),
    Case("forgotten", lambda c: waits(c, due=-90), "queue", "first", ".*", "fetch-worker doctor: .*"),
    Case("behind", behind, "queue", "behind", "before it: 4 due jobs .*", "nothing: it waits for 4 due jobs .*"),
    Case(
        "no key",
        lambda c: planted.waiting(c, "1", account="shop"),
        "account",
        "no key",
        "shop has none.*",
        r'put the key of account shop into SD_API_KEYS\["shop"\] and restart the worker',
    ),
    Case(
        "wrong key",
        refused("key rejected: Invalid API key"),
        "account",
        "held",
        "account default: since 6. s, key rejected: Invalid API key; it is tried again in .*",
        "put the right key into SD_API_KEY and restart the worker",
    ),
    Case(
        "credits",
        refused("no credits: 0"),
        "account",
        "held",
        ".*no credits.*",
        "buy credits for account default, then fetch-worker resume --account default, .*",
    ),
    Case(
        "rate limit",
        refused("rate limited", until=planted.now() + seconds(3_000), probe_at=None),
        "account",
        "held",
        ".*it goes on in .*",
        "nothing: account default goes on in .*",
    ),
    Case(
        "nobody probes", nobody_probes, "account", "held", ".*was to be tried.*", "start a `worker` process: nobody.*"
    ),
    Case(
        "account by hand",
        by_hand("account", "default"),
        "account",
        "held by an operator",
        "account default: since 7. s.*",
        "fetch-worker resume --account default",
    ),
    Case(
        "host by hand",
        by_hand("host", "api.test"),
        "host",
        "held by an operator",
        "api.test: since 7. s.*",
        "fetch-worker resume --host api.test",
    ),
    Case(
        "job by hand",
        lambda c: waits(c, due_at=HELD_UNTIL, held_at=planted.now() - seconds(65)),
        "hold",
        "held by an operator",
        "since 6. s",
        r"fetch-worker resume \d+",
    ),
    Case(
        "host away", host_away, "host", "held", "api.test: since .*unreachable.*", "nothing here: api.test does not .*"
    ),
    Case(
        "asked now",
        claims(holder_name(), -20),
        "claim",
        "held",
        f"by {re.escape(holder_name())}, which runs, since 1. s; its lease ends in .*",
        "nothing: it is asked about now",
    ),
    Case("dead, swept", claims(DEAD, -20), "claim", "stuck", ".*which is dead.*lease ends.*", SWEEP),
    Case(
        "dead, no worker",
        claims(DEAD, -20, asleep=True),
        "claim",
        "stuck",
        ".*which is dead.*",
        f"start a `worker` process: {TAKEN_UP}",
    ),
    Case(
        "stuck lease",
        claims(ELSEWHERE, 70),
        "claim",
        "stuck",
        f"by {ELSEWHERE}, of which this host knows nothing, since 10. s; its lease is over for 7. s",
        f"start a `worker` process: {TAKEN_UP}",
    ),
    Case(
        "past deadline",
        lambda c: waits(c, deadline_at=planted.now() - seconds(65)),
        "deadline",
        "over",
        "for 6. s; it ends on the next answer that says it is not ready, not before",
        "nothing: it is asked in .*, and ends then unless it is ready",
    ),
    Case(
        "past deadline, asked in hours",
        lambda c: waits(c, deadline_at=planted.now() - seconds(65), due_at=planted.now() + seconds(7_300)),
        "deadline",
        "over",
        ".*",
        r"fetch-worker resume \d+ asks at once; else it is asked in 2.0 h, and ends then unless it is ready",
    ),
    Case(
        "a lease without end",
        lambda c: planted.claimed(c, "1", ELSEWHERE, over=-20_000, asked_at=planted.now() - seconds(81)),
        "claim",
        "stuck",
        f"by {ELSEWHERE}, of which this host knows nothing, since 8. s; its lease ends in .*",
        r"fetch-worker resume \d+: no work takes that long, so its process must be gone",
    ),
    Case(
        "dead download host, tried again in a while",
        output("unreachable", due=300),
        "output 0",
        "unreachable",
        "again in .*",
        r"nothing here: .* in 5 min, until .*; once it does, fetch-worker resume \d+ tries at once",
    ),
    Case(
        "dead download host",
        output("unreachable"),
        "output 0",
        "unreachable",
        "again in .*, 3 attempts, link of cdn.dead.test:8443, 4 min old; unreachable: no answer: ConnectTimeout",
        "nothing here: cdn.dead.test:8443 does not give it; tried again in .*, until OUTPUT_DEADLINE in 23.9 h",
    ),
    Case("storage", output("storage"), "output 0", "storage", ".*", r"put the storage right \(STORAGE_URL\).*"),
    Case("no downloads", output(None, due=-70), "output 0", "waits", "due for 7.*", "start a `downloads` process: .*"),
    Case("next download", output(None, due=-1), "output 0", "waits", "due for .*", "nothing: it is fetched next"),
    Case("bad body", output("not_media"), "output 0", "not_media", "again in .*", "nothing: tried again in .*"),
    Case(
        "receiving",
        receiving(-20),
        "output 0",
        "receiving",
        f"2.5 MB so far, by {ELSEWHERE}, of which this host knows nothing, since 1. s; its lease ends in .*",
        "nothing: it is being received",
    ),
    Case(
        "download stuck",
        receiving(60),
        "output 0",
        "stuck",
        ".*its lease is over for 6. s.*",
        f"start a `downloads` process: {TAKEN_UP}",
    ),
    Case(
        "fresh link held",
        renewing,
        "output 0",
        "gone",
        ".*asked for afresh.*",
        "buy credits for account default, then fetch-worker resume --account default, .*",
    ),
    Case(
        "webhook refused",
        told(300, error_message="it answered 500 to ann@shop.test"),
        "webhook",
        "refused",
        r"again in 5 min; job.failed to shop.test, 4 attempts; it answered 500 to \[e-mail\]",
        "look at the receiver shop.test: it is told again in 5 min",
    ),
    Case(
        "webhook late", told(-300), "webhook", "late", "due for 5 min; .*", ".*`worker` process that has WEBHOOK_SECRET"
    ),
    Case("event not made", unannounced, "webhook", "not made", "for 10 min", ".*process that has WEBHOOK_SECRET"),
    Case("failed", ended("api_failed"), "job", "failed", ".*api_failed: no paint left", r"fetch-worker retry \d+"),
    Case(
        "expired", ended("expired", status="expired"), "job", "expired", ".*", r"fetch-worker retry \d+, if it may .*"
    ),
    Case(
        "refused address",
        ended("output_failed", "refused_address"),
        "output 0",
        "failed",
        ".*refused_address.*",
        r"fetch-worker retry \d+, once OUTPUT_ALLOWED_NETWORKS has .*",
    ),
    Case(
        "too large",
        ended("output_failed", "too_large"),
        "output 0",
        "failed",
        ".*",
        r"fetch-worker retry \d+, with a larger OUTPUT_MAX_BYTES",
    ),
]

Show = Callable[[int], tuple[dict[str, Any], str]]


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The database that the commands use, with our tables in it; and no Redis."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", NOBODY)
    monkeypatch.setenv("SD_API_KEY", "sk-canary-7f3a")
    return engine


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """What `show` says of a job: its document, and its text."""

    def command(job_id: int) -> tuple[dict[str, Any], str]:
        return json.loads(_said(capsys, str(job_id), "--json")), _said(capsys, str(job_id))

    return command


def _said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["show", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def _step(links: Sequence[dict[str, str]], name: str) -> dict[str, str]:
    return next(link for link in links if link["step"] == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_trouble_is_named_with_what_to_do(database: Engine, show: Show, case: Case) -> None:
    with database.begin() as connection:
        job_id = case.plant(connection)

    document, text = show(job_id)

    link = _step(document["chain"], case.step)
    assert set(link) == {"step", "state", "detail"}
    assert (link["state"], bool(re.fullmatch(case.detail, link["detail"]))) == (case.state, True), link
    assert re.fullmatch(case.advice, document["advice"]), document["advice"]
    assert re.sub(r"\d", "", text.splitlines()[-1]) == re.sub(r"\d", "", f"what to do: {document['advice']}")
    assert "sk-canary" not in text
    assert not re.search(
        r"sk-canary|secret|hidden|users/ann|ann@shop", json.dumps(document["chain"]) + document["advice"]
    )


def test_a_job_that_is_done_has_nothing_to_be_done(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = planted.failed(connection, "1", status="completed", error_code=None, ready_at=planted.now())

    assert show(job_id)[0]["advice"] == "nothing: all is stored"


def test_the_last_answers_are_told_with_their_ages_and_without_what_is_personal(database: Engine, show: Show) -> None:
    said = NOTE_SEPARATOR.join(
        ['12.3 s: odd answer: {"prompt": "Ann in a lake"} for ann@shop.test', "4.0 s: processing"]
    )
    with database.begin() as connection:
        job_id = waits(connection, last_answer=said)

    document, text = show(job_id)

    assert _step(document["chain"], "answers") == {
        "step": "answers",
        "state": "2 kept",
        "detail": 'at 12 s: odd answer: {"prompt": "[text]"} for [e-mail]; at 4.0 s: processing',
    }
    assert "Ann" not in text + document["why"]


def test_the_curve_tells_when_such_jobs_are_ready(database: Engine, show: Show) -> None:
    teach(database, seconds=20.0)
    with database.begin() as connection:
        at = planted.now()
        job_id = waits(connection, submitted_at=at - seconds(5), not_ready_at=at - seconds(1))

    curve = _step(show(job_id)[0]["chain"], "curve")

    assert curve["state"] == "by age"
    found = re.fullmatch(
        r"ready now (\d+)%, in 5 s (\d+)%, in 15 s (\d+)%, in 60 s (\d+)%, in 300 s (\d+)%; "
        r"half in (\d+) s, 90 % in (\d+) s; of 40 such jobs",
        curve["detail"],
    )
    assert found, curve
    chances = [int(found[place]) for place in range(1, 6)]
    assert chances == sorted(chances)
    assert chances[0] < 20 < 80 < chances[3]
    assert 8 < int(found[6]) <= int(found[7]) < 40


def test_the_budget_is_looked_at_and_nothing_is_taken(
    database: Engine, show: Show, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_RPS", "0.5")
    redis_client(redis_url, seconds=2).flushall()  # our own: what the test before it took
    with database.begin() as connection:
        planted.breaker(connection, "account", "default", ceiling=0.3, cut_at=planted.now())
        job_id = planted.waiting(connection, "1")
    budget = RateLimiter(redis_url)

    free = [_step(show(job_id)[0]["chain"], "budget") for _ in range(3)][-1]
    while budget.take("default", 1, rate=0.2).send_times:
        pass
    spent = _step(show(job_id)[0]["chain"], "budget")

    begins = r"0\.2 requests per second in force of 0\.5, the API took 0\.3 when it refused one; "
    assert free["state"] == "free"
    assert re.fullmatch(begins + r"\d could go out now, 0 were made in the last second", free["detail"]), free
    assert spent["state"] == "used up"
    assert re.fullmatch(begins + r"the next can go out in \d\.\d s, 0 were made in the last second", spent["detail"]), (
        spent
    )


def test_without_redis_the_budget_is_unknown(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = waits(connection)

    budget = _step(show(job_id)[0]["chain"], "budget")

    assert budget["state"] == "unknown"
    assert "Redis is away" in budget["detail"]


def test_the_jobs_ahead_are_counted_up_to_a_bound(
    database: Engine, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "AHEAD_MOST", 3)
    with database.begin() as connection:
        job_id = behind(connection)

    assert _step(show(job_id)[0]["chain"], "queue")["detail"] == "before it: more than 3 due jobs of its account"


def test_why_does_not_say_of_a_claim_without_end_that_it_is_being_asked_about(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = planted.claimed(connection, "1", ELSEWHERE, over=-20_000, asked_at=planted.now() - seconds(900))

    document, _ = show(job_id)

    said = f"{ELSEWHERE} took it 90. s ago, longer than any request takes: `resume` has it go on"
    assert re.fullmatch(said, document["why"]), document["why"]
