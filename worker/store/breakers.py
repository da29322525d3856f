"""Circuit breakers of accounts and API hosts, shared by all processes. Read often, written rarely."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from worker.core.circuit_breaker import CircuitBreaker, Scope
from worker.store.bulk_write import insert_missing
from worker.store.schema import breakers

_COLUMNS = (  # in the order of the fields of CircuitBreaker
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
_LAST_ASKED = select(breakers.c.name, breakers.c.asked_at).where(
    breakers.c.scope == "account", breakers.c.asked_at.is_not(None)
)
_ONE = _ALL.where(breakers.c.scope == bindparam("scope"), breakers.c.name == bindparam("name")).with_for_update()


def all_breakers(connection: Connection) -> dict[tuple[Scope, str], CircuitBreaker]:
    """Return all circuit breakers by scope and name."""
    return {(row.scope, row.name): _breaker(row) for row in connection.execute(_ALL).all()}


def locked_breaker(connection: Connection, scope: Scope, name: str) -> CircuitBreaker:
    """Return one circuit breaker and lock its row until the transaction ends. Create the row if it is missing."""
    row = connection.execute(_ONE, {"scope": scope, "name": name}).one_or_none()
    if row is None:
        insert_missing(connection, breakers, {"scope": scope, "name": name})
        row = connection.execute(_ONE, {"scope": scope, "name": name}).one()
    return _breaker(row)


def save_breaker(connection: Connection, breaker: CircuitBreaker) -> None:
    """Write a circuit breaker that this transaction has locked."""
    values = asdict(breaker)
    scope, name = values.pop("scope"), values.pop("name")
    if values["reason"] is not None:
        values["reason"] = values["reason"][:600]
    connection.execute(update(breakers).where(breakers.c.scope == scope, breakers.c.name == name).values(values))


def mark_asked(connection: Connection, accounts: Iterable[str], *, now: datetime) -> None:
    """Record that jobs of these accounts were polled just now."""
    connection.execute(
        update(breakers)
        .where(breakers.c.scope == "account", breakers.c.name.in_(sorted(accounts)))
        .values(asked_at=now)
    )


def last_asked(connection: Connection) -> dict[str, datetime]:
    """Return when a job of each account was last polled, without the accounts that were never polled."""
    return {row.name: row.asked_at for row in connection.execute(_LAST_ASKED)}


def _breaker(row: Any) -> CircuitBreaker:
    return CircuitBreaker(*row)
