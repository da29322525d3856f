"""The command `simulate`: compute the effect of a policy, a price or a rate limit on a trace of jobs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from worker.cli.output import json_option, print_fields, print_json, print_table
from worker.client.connection import transaction
from worker.core.pacing.policy import POLICIES, Pace, Policy
from worker.core.pacing.simulation import Simulation, TraceJob, quantile, read_trace, simulate
from worker.core.slots import MAX_SLOTS
from worker.errors import TraceError
from worker.settings import load
from worker.store.jobs import measured_durations

MOST_JOBS = 1_000_000


@click.command("simulate")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True, exists=True), metavar="FILE",
              help='Lines of {"t": s, "duration": s or null, "kind": "…", "eta": s or null}.')  # fmt: skip
@click.option(
    "--from-database",
    is_flag=True,
    help="Replay the jobs in the database, with the durations that polls have measured.",
)
@click.option("--limit", type=click.IntRange(1, MOST_JOBS), default=10_000, show_default=True,
              help="With --from-database: the maximum number of jobs, newest first.")  # fmt: skip
@click.option(
    "--rps", type=click.FloatRange(0, min_open=True), help="The rate limit in requests per second. Default: no limit."
)
@click.option("--slots", type=click.IntRange(1, MAX_SLOTS),
              help="How many jobs may be at the API at once: others wait as orders. Default: no limit.")  # fmt: skip
@click.option("--price", type=click.FloatRange(0, 3_600, min_open=True), help="The price to use instead of POLL_PRICE.")
@click.option("--policy", type=click.Choice(POLICIES), help="The policy to use instead of POLL_POLICY.")
@click.option("--compare", is_flag=True, help="Compare all policies.")
@json_option
def simulate_command(
    trace: Path | None,
    from_database: bool,
    limit: int,
    rps: float | None,
    slots: int | None,
    price: float | None,
    policy: Policy | None,
    compare: bool,
    as_json: bool,
) -> None:
    """Simulate polls and delays of a trace of jobs.

    It uses the worker's own scheduling on a virtual clock. It starts without learned durations. POLL_MIN and
    JOB_DEADLINE apply. A delay is the time from ready to seen. With --slots, the jobs of the trace are orders, and the
    output has the time from an order to its start.
    """
    if (trace is None) != from_database or (compare and policy is not None):
        raise click.UsageError("give either --trace FILE or --from-database, and not both --policy and --compare")
    settings = load()
    if trace is None:
        with transaction(settings) as connection:
            jobs = [TraceJob(*row) for row in measured_durations(connection, limit=limit)]
    else:
        jobs = _read(trace)
    if not jobs:
        raise TraceError("there are no jobs to simulate")
    cost = settings.poll_price if price is None else price

    def run(name: Policy) -> dict[str, Any]:
        pace = Pace(name, cost, settings.poll_min)
        simulation = simulate(jobs, pace, deadline_for=settings.deadline_for, rps=rps, slots=slots)
        return _document(simulation) | ({} if slots is None else {"waited": _quantiles(simulation.waits)})

    results = {name: run(name) for name in (POLICIES if compare else [policy or settings.poll_policy])}
    document = next(iter(results.values()))
    if as_json:
        print_json(results if compare else document)
    elif compare:
        waited = () if slots is None else ("mean wait (s)",)
        columns = ("policy", "polls per job", "mean delay (s)", "p50", "p95", "p99", *waited)
        rows = [
            (name, result["polls_per_job"], *result["delay"].values(), *(result["waited"]["mean"] for _ in waited))
            for name, result in results.items()
        ]
        print_table(columns, rows, empty="")
    else:
        times = {name: document.pop(name) for name in ("delay", "waited") if name in document}
        print_fields(document | {f"{what} {name} (s)": value for what in times for name, value in times[what].items()})


def _read(trace: Path) -> list[TraceJob]:
    try:
        text = sys.stdin.read() if str(trace) == "-" else trace.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise TraceError(f"{trace} is not UTF-8 text") from None
    except OSError as error:
        raise TraceError(f"{trace} can't be read: {error.strerror}") from None
    return read_trace(text.splitlines())


def _document(simulation: Simulation) -> dict[str, Any]:
    return {
        "jobs": simulation.jobs,
        "polls": simulation.polls,
        "polls_per_job": round(simulation.polls / simulation.jobs, 4),
        "delay": _quantiles(simulation.delays),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    quantiles = {"mean": sum(ordered) / len(ordered) if ordered else 0.0}
    quantiles |= {name: quantile(ordered, share) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
    return {name: round(value, 4) for name, value in quantiles.items()}
