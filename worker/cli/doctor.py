"""The command `doctor`: health checks."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from worker.cli.output import json_option, print_json, print_table
from worker.core.queues import DOWNLOADS, POLLS, QUEUE
from worker.operations.liveness import Check, check_liveness
from worker.settings import Settings, load

if TYPE_CHECKING:
    from worker.operations.health import Node

NODES_SECONDS = 1.5
QUEUES = {
    QUEUE: "tracking and sweeps: start a `worker` process",
    POLLS: "polls: start a `worker` process",
    DOWNLOADS: "downloads: start a `downloads` process",
}


@click.command()
@click.option("--liveness", is_flag=True, help="Only check whether due work is done; fast, for container probes.")
@json_option
def doctor(liveness: bool, as_json: bool) -> int:
    """Check everything that the worker depends on.

    Each failed check says what to do. Exit code 1 if a check fails.
    """
    settings = load()
    checks = [check_liveness(settings)] if liveness else list(_checks(settings))
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        print_table(("check", "", "result"), [(c.name, "ok" if c.ok else "WRONG", c.message) for c in checks], empty="")
    return 0 if all(check.ok for check in checks) else 1


def _checks(settings: Settings) -> Iterator[Check]:
    from worker.operations.health import run_checks  # imports kombu, which `--liveness` does not need

    return run_checks(settings, _nodes, queues=QUEUES)


def _nodes() -> "Mapping[str, Node]":
    from worker.app import app  # imports all of Celery; does not connect yet
    from worker.process.other_workers import ask_nodes

    return ask_nodes(app, NODES_SECONDS)
