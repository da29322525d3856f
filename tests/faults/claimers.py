"""Several processes that claim from the same rows as fast as they can, lease after lease: `python -m` with a URL.

In each round every lease of the round before is over, all claim at once, and each tries to record what it had claimed
before. Prints one JSON document: for each process and round the jobs and outputs it got, and what of old claims stood.
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
from worker.store.claims import ClaimedJob, ClaimedOutput, claim_jobs, claim_output, due_groups
from worker.store.counters import Tally
from worker.store.engine import make_engine, transact
from worker.store.results import Outcome, record_answers, record_attempt
from worker.store.schema import outputs

PROCESSES, ROUNDS = 4, 3
LIMIT = 7

_fork = multiprocessing.get_context("fork")
_together = _fork.Barrier(PROCESSES)


def moment(number: int) -> Any:
    """When a round is: after all leases of the round before."""
    return NOW + number * (LEASE + seconds(1))


def _jobs(engine: Engine, name: str, number: int) -> list[ClaimedJob]:
    claimed: list[ClaimedJob] = []
    now = moment(number)
    while True:
        with engine.begin() as connection:
            levels = [level for level in due_groups(connection, ["default"]) if level.due_at <= now]
            if not levels:
                return claimed
            around = (now, now) if random.random() < 0.5 else ()
            claimed += claim_jobs(
                connection,
                levels[0],
                limit=LIMIT,
                token=secrets.token_hex(8),
                holder=name,
                lease=LEASE,
                now=now,
                around=around,
            )


def _outputs(engine: Engine, name: str, number: int, messages: list[int]) -> list[ClaimedOutput]:
    claimed = []
    for output_id in random.sample(messages, len(messages)):
        taking = partial(claim_output, output_id=output_id, holder=name, lease=LEASE, now=moment(number))
        found = transact(engine, partial(taking, token=secrets.token_hex(8)))
        claimed += [found] if found else []
    return claimed


def _recorded(engine: Engine, found: list[ClaimedJob], taken: list[ClaimedOutput], number: int) -> int:
    """How many of these claims still stood."""
    batch = [Outcome(job, AskAgain(Strikes(), "processing"), "late", PollPlan(0.0)) for job in found]
    again = TryAgain(0.0, "unreachable", "no answer")
    stood = 0
    with engine.begin() as connection:
        stood += len(batch) - record_answers(connection, batch, Tally(), now=moment(number)).lost
    for output in taken:
        recording = partial(record_attempt, output=output, result=again, now=moment(number))
        stood += transact(engine, recording)[0]
    return stood


def _run(name: str) -> list[dict[str, Any]]:
    engine = make_engine(make_url(sys.argv[1]))
    with engine.connect() as connection:
        messages = list(connection.execute(select(outputs.c.id)).scalars())
    rounds: list[dict[str, Any]] = []
    found: list[ClaimedJob] = []
    taken: list[ClaimedOutput] = []
    for number in range(ROUNDS):
        _together.wait(60)
        old = found, taken
        found = _jobs(engine, name, number)
        stood = _recorded(engine, old[0], old[1], number)
        taken = _outputs(engine, name, number, messages)
        stood += _recorded(engine, old[0], old[1], number)
        rounds.append({"jobs": [one.id for one in found], "outputs": [one.id for one in taken], "stale": stood})
    _together.wait(60)
    rounds[-1]["live"] = _recorded(engine, found, taken, ROUNDS - 1)
    engine.dispose()
    return rounds


if __name__ == "__main__":
    with _fork.Pool(PROCESSES) as processes:
        print(json.dumps(processes.map(_run, [f"p{number}" for number in range(PROCESSES)], chunksize=1)))
