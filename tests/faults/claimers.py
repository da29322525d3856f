"""Program that claims the same rows from several processes at once. Run it with `python -m` and a database URL.

All leases have expired when the next round begins. In each round all processes claim at the same time, and each of them
tries to record results for the claims of its previous round. Prints one JSON document: for each process and round, the
ids of the jobs and outputs that it claimed, and how many of its old claims were still accepted ("stale").
"""

import json
import multiprocessing
import random
import secrets
import sys
from functools import partial
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.engine import make_url

from tests.rows import LEASE, NOW, seconds
from worker.core.lifecycle import AskAgain, Strikes, TryAgain
from worker.core.pacing.policy import PollPlan
from worker.store.claims import ClaimedJob, ClaimedOutput, claim_jobs, claim_output
from worker.store.counters import Tally
from worker.store.due_groups import due_groups
from worker.store.engine import make_engine, transact
from worker.store.results import Outcome, record_answers, record_attempt
from worker.store.schema import outputs

PROCESSES, ROUNDS = 4, 3
LIMIT = 7

_fork = multiprocessing.get_context("fork")
_barrier = _fork.Barrier(PROCESSES)


def moment(number: int) -> Any:
    """Return the time of a round. All leases of the previous round have expired by then."""
    return NOW + number * (LEASE + seconds(1))


def _claim_jobs(engine: Engine, name: str, number: int) -> list[ClaimedJob]:
    claimed: list[ClaimedJob] = []
    now = moment(number)
    while True:
        with engine.begin() as connection:
            groups = [group for group in due_groups(connection, ["default"]) if group.due_at <= now]
            if not groups:
                return claimed
            around = (now, now) if random.random() < 0.5 else ()
            claimed += claim_jobs(
                connection,
                groups[0],
                limit=LIMIT,
                token=secrets.token_hex(8),
                holder=name,
                lease=LEASE,
                now=now,
                around=around,
            )


def _claim_outputs(engine: Engine, name: str, number: int, messages: list[int]) -> list[ClaimedOutput]:
    claimed = []
    for output_id in random.sample(messages, len(messages)):
        claim = partial(claim_output, output_id=output_id, holder=name, lease=LEASE, now=moment(number))
        output = transact(engine, partial(claim, token=secrets.token_hex(8)))
        claimed += [output] if output else []
    return claimed


def _record(engine: Engine, claimed_jobs: list[ClaimedJob], claimed_outputs: list[ClaimedOutput], number: int) -> int:
    """Record a result for each claim. Return how many claims were still valid."""
    batch = [Outcome(job, AskAgain(Strikes(), "processing"), "late", PollPlan(0.0)) for job in claimed_jobs]
    try_again = TryAgain(0.0, "unreachable", "no answer")
    valid = 0
    with engine.begin() as connection:
        valid += len(batch) - record_answers(connection, batch, Tally(), now=moment(number)).lost
    for output in claimed_outputs:
        record = partial(record_attempt, output=output, result=try_again, now=moment(number))
        valid += transact(engine, record)[0]
    return valid


def _run(name: str) -> list[dict[str, Any]]:
    engine = make_engine(make_url(sys.argv[1]))
    with engine.connect() as connection:
        messages = list(connection.execute(select(outputs.c.id)).scalars())
    rounds: list[dict[str, Any]] = []
    claimed_jobs: list[ClaimedJob] = []
    claimed_outputs: list[ClaimedOutput] = []
    for number in range(ROUNDS):
        _barrier.wait(60)
        old_jobs, old_outputs = claimed_jobs, claimed_outputs
        claimed_jobs = _claim_jobs(engine, name, number)
        stale = _record(engine, old_jobs, old_outputs, number)
        claimed_outputs = _claim_outputs(engine, name, number, messages)
        stale += _record(engine, old_jobs, old_outputs, number)
        job_ids, output_ids = [job.id for job in claimed_jobs], [output.id for output in claimed_outputs]
        rounds.append({"jobs": job_ids, "outputs": output_ids, "stale": stale})
    _barrier.wait(60)
    rounds[-1]["live"] = _record(engine, claimed_jobs, claimed_outputs, ROUNDS - 1)
    engine.dispose()
    return rounds


if __name__ == "__main__":
    with _fork.Pool(PROCESSES) as processes:
        print(json.dumps(processes.map(_run, [f"p{number}" for number in range(PROCESSES)], chunksize=1)))
