"""Commands and functions know orders: list, find, cancel and retry by filter, status, top, metrics."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, insert

import worker
from tests.metrics.exposition import open_metrics, parse, registry_of
from tests.planted_orders import add_at_api, add_order, add_uncertain, set_slots
from tests.rows import read_job
from worker.cli import main
from worker.store.counters import ORDERS, Tally
from worker.store.schema import slots

Run = Callable[..., Any]


@pytest.fixture
def database(engine: Engine, monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Engine:
    """A migrated database with DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("REDIS_URL", redis_url)
    return engine


@pytest.fixture
def run(database: Engine, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command and returns its JSON document."""

    def command(*arguments: str) -> Any:
        with pytest.raises(SystemExit):
            main([*arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    return command


def test_list_and_find_have_the_states_of_orders_and_no_remote_id(database: Engine, run: Run) -> None:
    with database.begin() as connection:
        waiting, lost = add_order(connection, "1", reference="order-1"), add_uncertain(connection, "2")
        add_at_api(connection, "3")

    (listed,) = run("list", "--status", "ordered")
    (job,) = worker.find(status="ordered")

    assert (listed["id"], listed["remote_id"], listed["status"]) == (waiting, None, "ordered")
    assert (job.id, job.as_json()["remote_id"]) == (waiting, None)
    assert [job.id for job in worker.find(status=("uncertain", "ordered"))] == [lost, waiting]
    assert [job["id"] for job in run("list", "--reference", "order-1")] == [waiting]


def test_orders_are_cancelled_and_sent_again_by_filter(database: Engine, run: Run) -> None:
    with database.begin() as connection:
        waiting = [add_order(connection, f"waits {number}") for number in range(3)]
        lost = [add_uncertain(connection, f"lost {number}") for number in range(2)]

    assert [row["changed"] for row in run("retry", "--status", "uncertain", "--yes")] == [True, True]
    assert {read_job(database, job_id).status for job_id in lost} == {"ordered"}
    assert len(run("cancel", "--status", "ordered", "--account", "default", "--yes")) == 5
    assert {read_job(database, job_id).status for job_id in (*waiting, *lost)} == {"cancelled"}


def test_a_filter_that_does_not_name_uncertain_orders_sends_none_again(database: Engine, run: Run) -> None:
    """The API may have taken them, and each would be paid twice."""
    with database.begin() as connection:
        lost = add_uncertain(connection)

    assert run("retry", "--account", "default", "--yes") == []
    assert read_job(database, lost).status == "uncertain"
    assert run("retry", str(lost)) == [{"id": lost, "changed": True, "status": "ordered"}]


def test_status_and_top_show_the_orders_and_slots_of_each_account(database: Engine, run: Run) -> None:
    with database.begin() as connection:
        set_slots(connection, 3)
        for number in range(2):
            add_at_api(connection, f"at the API {number}")
        for number in range(4):
            add_order(connection, f"waits {number}", ago=2)
        add_uncertain(connection)
        connection.execute(insert(slots).values(account="idle"))

    status, top = run("status"), run("top", "--once")

    assert (status["jobs"]["ordered"], status["jobs"]["uncertain"], status["jobs"]["pending"]) == (4, 1, 2)
    default, idle = status["accounts"]
    assert (default["ordered"], default["uncertain"], default["slots"]) == (4, 1, {"taken": 2, "total": 3})
    assert (idle["account"], idle["ordered"], idle["slots"]) == ("idle", 0, {"taken": 0, "total": 5})
    account = top["accounts"][0]
    assert [account[name] for name in ("ordered", "uncertain", "slots_taken", "slots")] == [4, 1, 2, 3]
    assert [trouble["code"] for trouble in top["troubles"]] == ["uncertain_orders"]


def test_the_metrics_count_orders_by_account(database: Engine) -> None:
    with database.begin() as connection:
        add_at_api(connection, "1")
        add_order(connection, "2")
        add_uncertain(connection, "3")
        tally = Tally()
        tally.add(ORDERS, "taken", account="default", times=3)
        tally.write(connection)

    metrics = parse(open_metrics(registry_of(database)))

    values = {
        name: metrics.all(name) for name in ("orders_waiting", "orders_at_api", "order_slots", "orders_uncertain")
    }
    assert values == {
        "orders_waiting": {("default",): 1},
        "orders_at_api": {("default",): 1},
        "order_slots": {("default",): 5},
        "orders_uncertain": {("default",): 1},
    }
    assert metrics.all("orders_total")["default", "taken"] == 3
    assert metrics.all("jobs")["ordered",] == 1
    assert metrics.all("jobs_unfinished")["default", "text2img", "uncertain"] == 1
