"""The command `status`: jobs by state, accounts, hosts and the learned pace."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from worker.cli.output import json_option, print_fields, print_json, print_table
from worker.client.connection import transaction
from worker.core.humanize import format_duration
from worker.operations.overview import KindState, Overview, overview, read_kinds
from worker.settings import load
from worker.store.reports.history import answered_lately
from worker.store.reports.order_state import AccountOrders
from worker.store.reports.work_state import AccountState
from worker.system.terminal import echo


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show jobs by state, accounts, holds and late work."""
    settings = load()
    with transaction(settings) as connection:
        state, kinds = overview(connection, settings), read_kinds(connection)
        asked = answered_lately(connection, now=state.work.now)
    if as_json:
        print_json(_status_document(state, kinds, asked))
        return
    print_fields({name: count for name, count in state.jobs.items() if count} or {"jobs": "none yet"})
    has_orders = bool(state.work.orders.accounts)
    rows = [
        (
            account.account,
            f"{account.rps:g}/s",
            f"{asked.get(account.account, 0.0):g}/s" if asked else "",
            *(_order_cells(state.orders_of(account.account)) if has_orders else ()),
            account.reason or "open",
            account.since,
            account.until,
        )
        for account in state.work.shown_accounts
    ]
    order_columns = ("ordered", "slots taken", "uncertain") if has_orders else ()
    columns = ("account", "rate limit", "asked", *order_columns, "state", "since", "until (UTC)")
    print_table(columns, rows, empty="no accounts yet")
    if state.work.hosts:
        hosts = [(host.host, host.reason, host.since, host.until) for host in state.work.hosts]
        print_table(("host", "held", "since", "until (UTC)"), hosts, empty="")
    if kinds:
        kind_columns = ("account", "kind", "jobs", "half ready (s)", "90 % (s)", "found ready", "expected",
                   "delay (s)", "planned")  # fmt: skip
        print_table(kind_columns, [_kind_row(kind) for kind in kinds], empty="")
    unstored = state.unstored
    if unstored.count:
        errors = "".join(f", {count} {code}" for code, count in sorted(unstored.trouble.items()))
        oldest = format_duration(unstored.oldest_seconds)
        echo(f"outputs not stored yet: {unstored.count:,}, the oldest for {oldest}{errors}")
    health = "healthy" if state.work.healthy else "NOT healthy: due work is not done"
    echo(f"oldest due work: {format_duration(state.work.oldest_due_seconds)}; {health}")
    if state.troubles:
        troubles = [(trouble.code, trouble.text, trouble.command) for trouble in state.troubles]
        print_table(("trouble", "", "what to do"), troubles, empty="")


def _status_document(state: Overview, kinds: Sequence[KindState], asked: Mapping[str, float]) -> dict[str, Any]:
    return {
        "jobs": dict(state.jobs),
        "accounts": [
            {
                "account": account.account,
                "hold": _hold(account),
                "rps": account.rps,
                **_order_counts(state.orders_of(account.account)),
            }
            for account in state.work.shown_accounts
        ],
        "asked_per_second": dict(asked),
        "hosts": [asdict(host) for host in state.work.hosts],
        "oldest_due_seconds": round(state.work.oldest_due_seconds, 3),
        "healthy": state.work.healthy,
        "troubles": [trouble.document() for trouble in state.troubles],
        "outputs": {
            "unstored": state.unstored.count,
            "oldest_seconds": state.unstored.oldest_seconds,
            "trouble": dict(state.unstored.trouble),
            "storage": state.unstored.storage,
        },
        "kinds": [asdict(kind) for kind in kinds],
    }


def _order_cells(orders: AccountOrders) -> tuple[object, ...]:
    return orders.ordered, f"{orders.taken} of {orders.slots}", orders.uncertain


def _order_counts(orders: AccountOrders) -> dict[str, Any]:
    return {
        "ordered": orders.ordered,
        "uncertain": orders.uncertain,
        "slots": {"taken": orders.taken, "total": orders.slots},
    }


def _hold(account: AccountState) -> dict[str, Any] | None:
    if account.reason is None:
        return None
    return {"reason": account.reason, "since": account.since, "until": account.until}


def _kind_row(kind: KindState) -> list[str]:
    times = (_or_never(kind.median), _or_never(kind.p90))
    shares = (f"{kind.ready:.0%}", f"{kind.expected:.0%}")
    delays = (f"{kind.seen_delay:.1f}", f"{kind.planned_delay:.1f}")
    return [kind.account, kind.kind, f"{kind.jobs:.0f}", *times, *shares, *delays]


def _or_never(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"
