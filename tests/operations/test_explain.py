"""`show` explains why a job does not move: one finding per check, and one line of advice."""

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
from tests.rows import add_output, add_process, seconds
from worker.cli import main
from worker.coordination.rate_limiter import RateLimiter, redis_client
from worker.core.answer_history import NOTE_SEPARATOR
from worker.operations import job_context, request_findings
from worker.store.schema import HELD_UNTIL
from worker.system.process_identity import holder_name

NO_REDIS = "redis://127.0.0.1:1/0"


@dataclass(frozen=True)
class Case:
    """A job that does not move: how it is created, the finding that explains it, and the advice."""

    name: str
    plant: Callable[[Connection], int]
    step: str
    state: str
    detail: str
    advice: str


def awake(connection: Connection, name: str = "default") -> None:
    """Create an account that a worker polls for."""
    planted.add_breaker(connection, "account", name, asked_at=planted.now())


def waits(connection: Connection, **changes: Any) -> int:
    awake(connection)
    return planted.add_waiting_job(connection, "1", **({"due": 4.0} | changes))


def refused(reason: str, account: str = "default", **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.add_open_breaker(connection, "account", account, reason, **changes)
        return planted.add_waiting_job(connection, "1", account=account)

    return plant


def by_hand(scope: str, name: str) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.add_breaker(connection, scope, name, paused_at=planted.now() - seconds(75))
        return planted.add_waiting_job(connection, "1")

    return plant


def host_away(connection: Connection) -> int:
    awake(connection)
    planted.add_open_breaker(connection, "host", "api.test", "unreachable: no answer")
    return planted.add_waiting_job(connection, "1")


def no_process_probes(connection: Connection) -> int:
    at = planted.now()
    planted.add_open_breaker(connection, "account", "default", "key rejected: no", probe_at=at - seconds(600))
    return planted.add_waiting_job(connection, "1")


def without_key(connection: Connection) -> int:
    """Add a job of an account that no running worker serves."""
    add_process(connection)
    return planted.add_waiting_job(connection, "1", account="shop")


def behind(connection: Connection) -> int:
    awake(connection)
    for number in range(3):
        planted.add_waiting_job(connection, f"older{number}", due=-50.0)
    planted.add_waiting_job(connection, "younger", due=-1.0)
    planted.add_waiting_job(connection, "waits", due=60.0, priority=7)
    planted.add_waiting_job(connection, "higher", due=-1.0, priority=7)
    return planted.add_waiting_job(connection, "1", due=-10.0)


def claims(holder: str, over: float, *, asleep: bool = False) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        planted.add_breaker(connection, "account", "default", asked_at=planted.now() - seconds(900 if asleep else 1))
        return planted.add_claimed_job(connection, "1", holder, over=over)

    return plant


def output(code: str | None, *, due: float = 40.0, **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        message = None if code is None else "no answer: ConnectTimeout"
        at = {"due_at": planted.now() + seconds(due)}
        return planted.add_downloading_job(
            connection, "1", **(at | {"error_code": code, "error_message": message} | changes)
        )

    return plant


def receiving(over: float, holder: str = ELSEWHERE) -> Callable[[Connection], int]:
    return lambda connection: planted.add_receiving_job(
        connection, "1", over=over, claim_holder=holder, received_bytes=2_500_000
    )


def renewing(connection: Connection) -> int:
    job_id = planted.add_downloading_job(connection, "1", error_code="gone", error_message="HTTP 404", renewed=True)
    connection.exec_driver_sql("UPDATE fetch_jobs SET due_at = submitted_at")
    planted.add_open_breaker(connection, "account", "default", "no credits: none left")
    return job_id


def told(due: float, **changes: Any) -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        job_id = planted.add_failed_job(connection, "1", status="completed", error_code=None, ready_at=planted.now())
        planted.add_event(connection, job_id, due=due, **changes)
        return job_id

    return plant


def unannounced(connection: Connection) -> int:
    ended = {"completed_at": planted.now() - seconds(600), "webhook_url": "https://shop.test/hook"}
    return planted.add_failed_job(connection, "1", status="completed", error_code=None, ready_at=planted.now(), **ended)


def ended(code: str, output_code: str | None = None, status: str = "failed") -> Callable[[Connection], int]:
    def plant(connection: Connection) -> int:
        job_id = planted.add_failed_job(connection, "1", status=status, error_code=code)
        if output_code is not None:
            add_output(connection, job_id, status="failed", due_at=None, error_code=output_code)
        return job_id

    return plant


SWEEP = "nothing: the next sweep releases the claim within seconds"
RELEASES = "it releases the claims of dead processes"
CASES = [
    Case("waits", waits, "poll", "waits", r"in \d\.\d s", r"nothing: it is polled in \d\.\d s"),
    Case(
        "no worker",
        lambda c: planted.add_waiting_job(c, "1"),
        "poll",
        "due",
        r"for 10\d s",
        "start a `worker` process: .*",
    ),
    Case("due just now", lambda c: waits(c, due=-1), "poll", "due", r"for .*", "nothing: it is polled next"),
    Case("forgotten", lambda c: waits(c, due=-90), "queue", "first", ".*", "run fetch-worker doctor: .*"),
    Case("behind", behind, "queue", "behind", "4 due jobs .*", "nothing: 4 due jobs are ahead .*"),
    Case(
        "no key",
        without_key,
        "account",
        "no key",
        "no key for account shop",
        "put the key of shop into SD_API_KEYS or SD_API_KEYS_FILE and restart the workers",
    ),
    Case(
        "wrong key",
        refused("key rejected: Invalid API key"),
        "account",
        "held",
        "account default: held for 6. s, key rejected: Invalid API key; it is tried again in .*",
        "put the right key of default into SD_API_KEY or SD_API_KEYS_FILE and restart the workers; if .*",
    ),
    Case(
        "credits",
        refused("no credits: 0"),
        "account",
        "held",
        ".*no credits.*",
        "buy credits for default, then fetch-worker resume --account default, or wait: .*",
    ),
    Case(
        "rate limit",
        refused("rate limited", until=planted.now() + seconds(3_000), probe_at=None),
        "account",
        "held",
        ".*it continues in .*",
        "nothing: it continues in .*",
    ),
    Case(
        "no process probes",
        no_process_probes,
        "account",
        "held",
        ".*should have been tried.*",
        "start a `worker` process: no process .*",
    ),
    Case(
        "account by hand",
        by_hand("account", "default"),
        "account",
        "held by an operator",
        "account default: held for 7. s.*",
        "fetch-worker resume --account default",
    ),
    Case(
        "host by hand",
        by_hand("host", "api.test"),
        "host",
        "held by an operator",
        "api.test: held for 7. s.*",
        "fetch-worker resume --host api.test",
    ),
    Case(
        "job by hand",
        lambda c: waits(c, due_at=HELD_UNTIL, held_at=planted.now() - seconds(65)),
        "hold",
        "held by an operator",
        "for 6. s",
        r"fetch-worker resume \d+",
    ),
    Case(
        "host away",
        host_away,
        "host",
        "held",
        "api.test: held for .*unreachable.*",
        "fetch-worker resume --host api.test, or wait: it is tried again by itself",
    ),
    Case(
        "request in flight",
        claims(holder_name(), -20),
        "claim",
        "held",
        f"by {re.escape(holder_name())}, which is running, for 1. s; its lease ends in .*",
        "nothing: a request about it is in flight",
    ),
    Case("dead, swept", claims(DEAD, -20), "claim", "stuck", ".*which is dead.*lease ends.*", SWEEP),
    Case(
        "dead, no worker",
        claims(DEAD, -20, asleep=True),
        "claim",
        "stuck",
        ".*which is dead.*",
        f"start a `worker` process: {RELEASES}",
    ),
    Case(
        "stuck lease",
        claims(ELSEWHERE, 70),
        "claim",
        "stuck",
        f"by {ELSEWHERE}, which is not on this host, for 10. s; its lease ended 7. s ago",
        f"start a `worker` process: {RELEASES}",
    ),
    Case(
        "past deadline",
        lambda c: waits(c, deadline_at=planted.now() - seconds(65)),
        "deadline",
        "over",
        "for 6. s; the job expires on the next answer that is not ready",
        "nothing: it is polled in .*, and it expires then unless it is ready",
    ),
    Case(
        "past deadline, polled in hours",
        lambda c: waits(c, deadline_at=planted.now() - seconds(65), due_at=planted.now() + seconds(7_300)),
        "deadline",
        "over",
        ".*",
        r"fetch-worker resume \d+ polls it at once; otherwise it is polled in 2.0 h, and it expires then unless .*",
    ),
    Case(
        "a lease without end",
        lambda c: planted.add_claimed_job(c, "1", ELSEWHERE, over=-20_000, asked_at=planted.now() - seconds(81)),
        "claim",
        "stuck",
        f"by {ELSEWHERE}, which is not on this host, for 8. s; its lease ends in .*",
        r"fetch-worker resume \d+: no work takes this long, so the process must be dead",
    ),
    Case(
        "dead download host, tried again in a while",
        output("unreachable", due=300),
        "output 0",
        "unreachable",
        "again in .*",
        r"nothing on your side: .* in 5 min, until .*; when .* works again, fetch-worker resume \d+ tries at once",
    ),
    Case(
        "dead download host",
        output("unreachable"),
        "output 0",
        "unreachable",
        "again in .*, 3 attempts, link of cdn.dead.test:8443, 4 min old; unreachable: no answer: ConnectTimeout",
        "nothing on your side: cdn.dead.test:8443 does not deliver it; it is .*, until OUTPUT_DEADLINE in 23.9 h",
    ),
    Case("storage", output("storage"), "output 0", "storage", ".*", r"repair the storage \(STORAGE_URL\) .*"),
    Case("no downloads", output(None, due=-70), "output 0", "waits", "due for 7.*", "start a `downloads` process: .*"),
    Case("next download", output(None, due=-1), "output 0", "waits", "due for .*", "nothing: it is downloaded next"),
    Case("bad body", output("not_media"), "output 0", "not_media", "again in .*", "nothing: it is tried again in .*"),
    Case(
        "receiving",
        receiving(-20),
        "output 0",
        "receiving",
        f"2.5 MB received, by {ELSEWHERE}, which is not on this host, for 1. s; its lease ends in .*",
        "nothing: the download is running",
    ),
    Case(
        "download stuck",
        receiving(60),
        "output 0",
        "stuck",
        ".*its lease ended 6. s ago.*",
        f"start a `downloads` process: {RELEASES}",
    ),
    Case(
        "fresh link held",
        renewing,
        "output 0",
        "gone",
        ".*a fresh link was requested.*",
        "buy credits for default, then fetch-worker resume --account default, or wait: .*",
    ),
    Case(
        "webhook refused",
        told(300, error_message="it answered 500 to ann@shop.test"),
        "webhook",
        "refused",
        r"again in 5 min; job.failed to shop.test, 4 attempts; it answered 500 to \[e-mail\]",
        "check the receiver shop.test: the event is sent again in 5 min",
    ),
    Case(
        "webhook late",
        told(-300),
        "webhook",
        "late",
        "due for 5 min; .*",
        ".*`worker` process with WEBHOOK_SECRET set",
    ),
    Case("event not made", unannounced, "webhook", "not made", "for 10 min", ".*process with WEBHOOK_SECRET set"),
    Case("failed", ended("api_failed"), "job", "failed", ".*api_failed: no paint left", r"fetch-worker retry \d+"),
    Case(
        "expired",
        ended("expired", status="expired"),
        "job",
        "expired",
        ".*",
        r"fetch-worker retry \d+, if the output may .*",
    ),
    Case(
        "refused address",
        ended("output_failed", "refused_address"),
        "output 0",
        "failed",
        ".*refused_address.*",
        r"add the network of that address to OUTPUT_ALLOWED_NETWORKS .*, then fetch-worker retry \d+",
    ),
    Case(
        "too large",
        ended("output_failed", "too_large"),
        "output 0",
        "failed",
        ".*",
        r"set a larger OUTPUT_MAX_BYTES, then fetch-worker retry \d+",
    ),
]

Show = Callable[[int], tuple[dict[str, Any], str]]


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A migrated database that the commands use; Redis is not reachable."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", NO_REDIS)
    monkeypatch.setenv("SD_API_KEY", "sk-canary-7f3a")
    return engine


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Return a function that runs `show` for a job and returns its JSON document and its text."""

    def command(job_id: int) -> tuple[dict[str, Any], str]:
        return json.loads(_output_of_show(capsys, str(job_id), "--json")), _output_of_show(capsys, str(job_id))

    return command


def _output_of_show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def _finding(findings: Sequence[dict[str, str]], step: str) -> dict[str, str]:
    return next(finding for finding in findings if finding["step"] == step)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_problem_is_explained_with_advice(database: Engine, show: Show, case: Case) -> None:
    with database.begin() as connection:
        job_id = case.plant(connection)

    document, text = show(job_id)

    finding = _finding(document["chain"], case.step)
    assert set(finding) == {"step", "state", "detail"}
    assert (finding["state"], bool(re.fullmatch(case.detail, finding["detail"]))) == (case.state, True), finding
    assert re.fullmatch(case.advice, document["advice"]), document["advice"]
    assert re.sub(r"\d", "", text.splitlines()[-1]) == re.sub(r"\d", "", f"what to do: {document['advice']}")
    assert "sk-canary" not in text
    assert not re.search(
        r"sk-canary|secret|hidden|users/ann|ann@shop", json.dumps(document["chain"]) + document["advice"]
    )


def test_a_completed_job_needs_no_action(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = planted.add_failed_job(connection, "1", status="completed", error_code=None, ready_at=planted.now())

    assert show(job_id)[0]["advice"] == "nothing: all outputs are stored"


def test_the_last_answers_are_shown_with_their_ages_and_without_personal_data(database: Engine, show: Show) -> None:
    last_answer = NOTE_SEPARATOR.join(
        ['12.3 s: odd answer: {"prompt": "Ann in a lake"} for ann@shop.test', "4.0 s: processing"]
    )
    with database.begin() as connection:
        job_id = waits(connection, last_answer=last_answer)

    document, text = show(job_id)

    assert _finding(document["chain"], "answers") == {
        "step": "answers",
        "state": "2 kept",
        "detail": 'at 12 s: odd answer: {"prompt": "[text]"} for [e-mail]; at 4.0 s: processing',
    }
    assert "Ann" not in text + document["why"]


def test_the_curve_shows_when_jobs_of_this_kind_are_ready(database: Engine, show: Show) -> None:
    teach(database, seconds=20.0)
    with database.begin() as connection:
        at = planted.now()
        job_id = waits(connection, submitted_at=at - seconds(5), not_ready_at=at - seconds(1))

    curve = _finding(show(job_id)[0]["chain"], "curve")

    assert curve["state"] == "by age"
    match = re.fullmatch(
        r"ready now (\d+)%, in 5 s (\d+)%, in 15 s (\d+)%, in 60 s (\d+)%, in 300 s (\d+)%; "
        r"half in (\d+) s, 90 % in (\d+) s; from 40 jobs of this kind",
        curve["detail"],
    )
    assert match, curve
    chances = [int(match[place]) for place in range(1, 6)]
    assert chances == sorted(chances)
    assert chances[0] < 20 < 80 < chances[3]
    assert 8 < int(match[6]) <= int(match[7]) < 40


def test_the_rate_limit_is_read_without_using_it(
    database: Engine, show: Show, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SD_API_RPS", "0.5")
    redis_client(redis_url, seconds=2).flushall()  # a server of these tests: remove the requests of the previous test
    with database.begin() as connection:
        planted.add_breaker(connection, "account", "default", ceiling=0.3, cut_at=planted.now())
        job_id = planted.add_waiting_job(connection, "1")
    limiter = RateLimiter(redis_url)

    free_finding = [_finding(show(job_id)[0]["chain"], "budget") for _ in range(3)][-1]
    while limiter.take("default", 1, rate=0.2).send_times:
        pass
    spent_finding = _finding(show(job_id)[0]["chain"], "budget")

    prefix = r"0\.2 requests per second allowed now, 0\.5 configured, learned from the last refusal: 0\.3; "
    assert free_finding["state"] == "free"
    assert re.fullmatch(prefix + r"\d can be sent now, 0 were made in the last second", free_finding["detail"]), (
        free_finding
    )
    assert spent_finding["state"] == "used up"
    assert re.fullmatch(
        prefix + r"the next can be sent in \d\.\d s, 0 were made in the last second", spent_finding["detail"]
    ), spent_finding


def test_without_redis_the_rate_limit_is_unknown(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = waits(connection)

    finding = _finding(show(job_id)[0]["chain"], "budget")

    assert finding["state"] == "unknown"
    assert "Redis is not reachable" in finding["detail"]


def test_the_jobs_ahead_are_counted_up_to_a_limit(
    database: Engine, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_context, "MAX_JOBS_AHEAD", 3)
    monkeypatch.setattr(request_findings, "MAX_JOBS_AHEAD", 3)
    with database.begin() as connection:
        job_id = behind(connection)

    assert (
        _finding(show(job_id)[0]["chain"], "queue")["detail"] == "more than 3 due jobs of its account are ahead of it"
    )


def test_why_reports_a_claim_that_is_older_than_any_request(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = planted.add_claimed_job(
            connection, "1", ELSEWHERE, over=-20_000, asked_at=planted.now() - seconds(900)
        )

    document, _ = show(job_id)

    claimed = f"claimed by {ELSEWHERE}, which is not on this host, for 15 min; its lease ends in .*"
    advice = f"fetch-worker resume {job_id}: no work takes this long, so the process must be dead"
    assert re.fullmatch(f"{claimed}; {advice}", document["why"]), document["why"]


def test_why_and_the_last_line_give_the_same_cause(database: Engine, show: Show) -> None:
    with database.begin() as connection:
        job_id = planted.add_waiting_job(connection, "1")

    document, text = show(job_id)

    assert re.fullmatch(r"due for 1.* s: no worker polls.*|due for 1\.. min: no worker polls.*", document["why"])
    assert "start a `worker` process: no worker polls" in text
