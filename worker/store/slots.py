"""The learned number of slots of each account. The row of an account is also the lock for claims of its orders."""

from sqlalchemy import Connection, bindparam, select, update

from worker.core.slots import SlotLimit
from worker.store.bulk_write import insert_missing
from worker.store.schema import slots

_ONE = (
    select(
        slots.c.account,
        slots.c.slots,
        slots.c.refused_at,
        slots.c.raised_at,
        slots.c.paused_until,
        slots.c.paused_at_taken,
    )
    .where(slots.c.account == bindparam("of_account"))
    .with_for_update()
)


def locked_slots(connection: Connection, account: str) -> SlotLimit:
    """Return the slots of an account and lock its row until the transaction ends. Create the row if it is missing."""
    row = connection.execute(_ONE, {"of_account": account}).one_or_none()
    if row is None:
        insert_missing(connection, slots, {"account": account})
        row = connection.execute(_ONE, {"of_account": account}).one()
    return SlotLimit(*row)


def save_slots(connection: Connection, limit: SlotLimit) -> None:
    """Write the slots of an account that this transaction has locked."""
    values = limit._asdict()
    connection.execute(update(slots).where(slots.c.account == values.pop("account")).values(values))


def all_slots(connection: Connection) -> dict[str, SlotLimit]:
    """Return what is known about the slots, by account."""
    query = select(*_ONE.selected_columns)
    return {row.account: SlotLimit(*row) for row in connection.execute(query).all()}
