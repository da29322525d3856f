"""Gates: what all processes know of accounts and API hosts, read often and written rarely."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from worker.core.circuit_breaker import Gate, Scope
from worker.store.bulk_write import insert_missing
from worker.store.schema import gates

_COLUMNS = (  # in the order of the fields of a Gate
    gates.c.scope,
    gates.c.name,
    gates.c.proven,
    gates.c.reason,
    gates.c.since,
    gates.c.until,
    gates.c.probe_at,
    gates.c.probes,
    gates.c.troubles,
    gates.c.released_at,
    gates.c.ceiling,
    gates.c.cut_at,
    gates.c.paused_at,
)


_ALL = select(*_COLUMNS)
_ONE = _ALL.where(gates.c.scope == bindparam("scope"), gates.c.name == bindparam("name")).with_for_update()


def all_gates(connection: Connection) -> dict[tuple[Scope, str], Gate]:
    """Every gate there is, by scope and name."""
    return {(row.scope, row.name): _gate(row) for row in connection.execute(_ALL).all()}


def locked_gate(connection: Connection, scope: Scope, name: str) -> Gate:
    """One gate, made where it is missing, and held by this transaction until it ends."""
    row = connection.execute(_ONE, {"scope": scope, "name": name}).one_or_none()
    if row is None:
        insert_missing(connection, gates, {"scope": scope, "name": name})
        row = connection.execute(_ONE, {"scope": scope, "name": name}).one()
    return _gate(row)


def save_gate(connection: Connection, gate: Gate) -> None:
    """Writes a gate that this transaction holds."""
    values = asdict(gate)
    scope, name = values.pop("scope"), values.pop("name")
    if values["reason"] is not None:
        values["reason"] = values["reason"][:600]
    connection.execute(update(gates).where(gates.c.scope == scope, gates.c.name == name).values(values))


def mark_asked(connection: Connection, accounts: Iterable[str], *, now: datetime) -> None:
    """Notes that due work of these accounts was done just now."""
    connection.execute(
        update(gates).where(gates.c.scope == "account", gates.c.name.in_(sorted(accounts))).values(asked_at=now)
    )


def last_asked(connection: Connection) -> datetime | None:
    """When any account's due work was last done."""
    query = select(gates.c.asked_at).where(gates.c.asked_at.is_not(None)).order_by(gates.c.asked_at.desc()).limit(1)
    at: datetime | None = connection.execute(query).scalar()
    return at


def _gate(row: Any) -> Gate:
    return Gate(*row)
