"""The state of the database server for `doctor`: autovacuum, dead rows, long transactions, default isolation."""

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from worker.operations.health import _transactions, _vacuum
from worker.store.reports import server_state as module
from worker.store.reports.server_state import HISTORY_MOST, OpenTransaction, ServerState, server_state
from worker.store.schema import paces


@pytest.mark.parametrize("engine", ["postgresql", "mariadb"], indirect=True)
def test_given_a_transaction_that_is_open_for_long_then_it_is_reported_with_its_age(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.begin() as forgotten:
        forgotten.execute(paces.delete())
        with engine.connect() as connection:
            assert server_state(connection).open == ()
        monkeypatch.setattr(module, "LONG_TRANSACTION", timedelta(seconds=-5))
        with engine.connect() as connection:
            state = server_state(connection)
    assert len(state.open) == 1
    assert 0 <= state.open[0].seconds < 60
    assert not _transactions(state).ok


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_given_a_table_without_autovacuum_then_doctor_names_it(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE fetch_paces SET (autovacuum_enabled = off)"))
    try:
        with engine.connect() as connection:
            state = server_state(connection)
    finally:
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE fetch_paces RESET (autovacuum_enabled)"))
    assert state.autovacuum_off == ("fetch_paces",)
    assert "fetch_paces" in _vacuum(state).message
    assert not _vacuum(state).ok


def test_doctor_has_advice() -> None:
    well = ServerState(isolation="read committed")
    assert _vacuum(well).ok
    assert _transactions(well).ok
    dead = _vacuum(replace(well, autovacuum=False, unvacuumed=(("fetch_jobs", 990_000, 1_000_000),)))
    assert (dead.ok, "VACUUM" in dead.message, "off for the whole server" in dead.message) == (False, True, True)
    assert not _vacuum(replace(well, history=HISTORY_MOST + 1)).ok
    long = _transactions(replace(well, open=(OpenTransaction("process 7", "psql", 1_800.0),)))
    assert (long.ok, "process 7 of psql for 30 min" in long.message) == (False, True)
    assert "serializable" in _transactions(replace(well, isolation="serializable")).message
