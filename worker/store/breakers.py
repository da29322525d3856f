"""Gates: what all processes know of accounts and API hosts, read often and written rarely."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.store.bulk_write import insert_missing
from worker.store.schema import breakers

_COLUMNS = (  # in the order of the fields of a Gate
    breakers.c.scope,
    breakers.c.name,
    breakers.c.proven,
    breakers.c.reason,
    breakers.c.since,
    breakers.c.until,
    breakers.c.probe_at,
    breakers.c.probes,
    breakers.c.troubles,
    breakers.c.released_at,
    breakers.c.ceiling,
    breakers.c.cut_at,
    breakers.c.paused_at,
)


_ALL = select(*_COLUMNS)
_ONE = _ALL.where(breakers.c.scope == bindparam("scope"), breakers.c.name == bindparam("name")).with_for_update()


def all_breakers(connection: Connection) -> dict[tuple[Scope, str], CircuitBreaker]:
    """Every gate there is, by scope and name."""
    return {(row.scope, row.name): _breaker(row) for row in connection.execute(_ALL).all()}


def locked_breaker(connection: Connection, scope: Scope, name: str) -> CircuitBreaker:
    """One gate, made where it is missing, and held by this transaction until it ends."""
    row = connection.execute(_ONE, {"scope": scope, "name": name}).one_or_none()
    if row is None:
        insert_missing(connection, breakers, {"scope": scope, "name": name})
        row = connection.execute(_ONE, {"scope": scope, "name": name}).one()
    return _breaker(row)


def save_breaker(connection: Connection, breaker: CircuitBreaker) -> None:
    """Writes a gate that this transaction holds."""
    values = asdict(breaker)
    scope, name = values.pop("scope"), values.pop("name")
    if values["reason"] is not None:
        values["reason"] = values["reason"][:600]
    connection.execute(update(breakers).where(breakers.c.scope == scope, breakers.c.name == name).values(values))


def mark_asked(connection: Connection, accounts: Iterable[str], *, now: datetime) -> None:
    """Notes that due work of these accounts was done just now."""
    connection.execute(
        update(breakers)
        .where(breakers.c.scope == "account", breakers.c.name.in_(sorted(accounts)))
        .values(asked_at=now)
    )


def last_asked(connection: Connection) -> datetime | None:
    """When any account's due work was last done."""
    query = (
        select(breakers.c.asked_at)
        .where(breakers.c.asked_at.is_not(None))
        .order_by(breakers.c.asked_at.desc())
        .limit(1)
    )
    at: datetime | None = connection.execute(query).scalar()
    return at


def _breaker(row: Any) -> CircuitBreaker:
    return CircuitBreaker(*row)
