"""Insert orders directly: they wait, are at the API, or are uncertain. For tests of the reports."""

from typing import Any

from sqlalchemy import Connection, insert, update

from tests.planted import now
from tests.rows import BASE, seconds
from worker.store.orders import NewOrder, insert_order
from worker.store.schema import jobs, orders, slots

ENDPOINT = "v6/images/text2img"
PAYLOAD = '{"prompt":"a lake","samples":2}'
LOST = "sent whole (812 bytes), no answer within 100 s"


def add_order(connection: Connection, key: str = "1", *, ago: float = 300.0, **changes: Any) -> int:
    """Insert an order that was made `ago` seconds ago and waits to be sent. `changes` are for the order's row."""
    values: dict[str, Any] = {
        "key": key,
        "account": "default",
        "endpoint": ENDPOINT,
        "host": "api.test",
        "payload": PAYLOAD,
        "kind": "text2img",
        "eta": None,
        "priority": 0,
        "reference": None,
        "on_done": None,
        "webhook_url": None,
        "deadline": 3_600.0,
    }
    own = {name: changes.pop(name) for name in list(changes) if name in values}
    job_id = insert_order(connection, NewOrder(**(values | own)), now=now() - seconds(ago))
    if changes:
        connection.execute(update(orders).where(orders.c.id == job_id).values(changes))
    return job_id


def add_at_api(connection: Connection, key: str = "1", *, due: float = 5.0, **changes: Any) -> int:
    """Insert an order that the API has taken: its job is polled in `due` seconds, and takes a slot."""
    at = now()
    taken = {"due_at": None, "takes_slot": True, "attempted_at": at - seconds(10), "attempts": 1}
    job_id = add_order(connection, key, **(taken | changes))
    named = {"status": "pending", "remote_id": f"r{key}", "fetch_url": f"{BASE}/r{key}", "fetch_base": BASE}
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(named | {"due_at": at + seconds(due)}))
    return job_id


def add_uncertain(connection: Connection, key: str = "1", *, sent: float = 120.0, **changes: Any) -> int:
    """Insert an order that was sent `sent` seconds ago and whose answer is lost."""
    lost = {"due_at": None, "queue": None, "attempts": 1, "last_error": LOST}
    job_id = add_order(connection, key, **(lost | {"attempted_at": now() - seconds(sent)} | changes))
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(status="uncertain"))
    return job_id


def set_slots(connection: Connection, number: int, account: str = "default") -> None:
    """Record the learned number of slots of an account."""
    connection.execute(insert(slots).values(account=account, slots=number))
