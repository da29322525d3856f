"""Inserts of rows that may exist already."""

from sqlalchemy import Engine

from worker.store.bulk_write import insert_missing
from worker.store.schema import slots


def test_it_is_known_whether_a_row_was_inserted(engine: Engine) -> None:
    """Several processes insert the same row, and only one of them may do what follows."""
    with engine.begin() as connection:
        inserted = [insert_missing(connection, slots, {"account": name}) for name in ("shop", "shop", "Shop", "Shop")]

    assert inserted == [True, False, True, False]
