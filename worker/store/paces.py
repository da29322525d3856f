"""Learned paces: how long jobs of each class take. Shared by all processes, read often, written from time to time."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, tuple_, update

from worker.store.bulk_write import insert_missing
from worker.store.schema import paces

Class = tuple[str, str]  # account and kind; an empty kind means the account as a whole

_KEY = (paces.c.account, paces.c.kind)
_STATE = select(*_KEY, paces.c.state, paces.c.version)


def load_paces(connection: Connection, classes: Iterable[Class]) -> dict[Class, tuple[str, int]]:
    """Return state and version of these classes, if they exist."""
    rows = connection.execute(_STATE.where(tuple_(*_KEY).in_(list(classes)))).all()
    return {(account, kind): (state, version) for account, kind, state, version in rows}


def add_pace(connection: Connection, pace_class: Class, *, now: datetime) -> None:
    """Insert the row of a class unless it exists."""
    row = {"account": pace_class[0], "kind": pace_class[1], "state": "", "version": 0, "learned_at": now}
    insert_missing(connection, paces, row)


def locked_pace(connection: Connection, pace_class: Class, *, now: datetime) -> tuple[str, int]:
    """Lock the row of a class until the transaction ends, and return state and version. A new class has state ""."""
    query = _STATE.where(paces.c.account == pace_class[0], paces.c.kind == pace_class[1]).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        add_pace(connection, pace_class, now=now)
        row = connection.execute(query).one()
    return row.state, row.version


def save_pace(connection: Connection, pace_class: Class, state: str, version: int, *, now: datetime) -> None:
    """Write a class that this transaction has locked."""
    connection.execute(
        update(paces)
        .where(paces.c.account == pace_class[0], paces.c.kind == pace_class[1])
        .values(state=state, version=version, learned_at=now)
    )


def newest_paces(connection: Connection, *, limit: int) -> Sequence[Any]:
    """Return the classes that were updated last."""
    query = _STATE.where(paces.c.kind != "").order_by(paces.c.learned_at.desc()).limit(limit)
    return connection.execute(query).all()
