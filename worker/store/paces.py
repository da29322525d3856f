"""Paces: what all processes know of how long jobs take, a row per class, read often and written now and then."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select, tuple_, update

from worker.store.bulk_write import insert_missing
from worker.store.schema import paces

Class = tuple[str, str]  # account and kind; an empty kind stands for the account as a whole

_KEY = (paces.c.account, paces.c.kind)
_STATE = select(*_KEY, paces.c.state, paces.c.version)


def load_paces(connection: Connection, classes: Iterable[Class]) -> dict[Class, tuple[str, int]]:
    """State and version of these classes, of those that there are."""
    found = connection.execute(_STATE.where(tuple_(*_KEY).in_(list(classes)))).all()
    return {(account, kind): (state, version) for account, kind, state, version in found}


def add_pace(connection: Connection, one: Class, *, now: datetime) -> None:
    """Makes the row of a class, unless it is there."""
    new = {"account": one[0], "kind": one[1], "state": "", "version": 0, "learned_at": now}
    insert_missing(connection, paces, new)


def locked_pace(connection: Connection, one: Class, *, now: datetime) -> tuple[str, int]:
    """State and version of a class, held by this transaction until it ends; an empty state where it is new."""
    mine = _STATE.where(paces.c.account == one[0], paces.c.kind == one[1]).with_for_update()
    row = connection.execute(mine).one_or_none()
    if row is None:
        add_pace(connection, one, now=now)
        row = connection.execute(mine).one()
    return row.state, row.version


def save_pace(connection: Connection, one: Class, state: str, version: int, *, now: datetime) -> None:
    """Writes a class that this transaction holds."""
    connection.execute(
        update(paces)
        .where(paces.c.account == one[0], paces.c.kind == one[1])
        .values(state=state, version=version, learned_at=now)
    )


def newest_paces(connection: Connection, *, limit: int) -> Sequence[Any]:
    """The classes that were learned about last."""
    query = _STATE.where(paces.c.kind != "").order_by(paces.c.learned_at.desc()).limit(limit)
    return connection.execute(query).all()
