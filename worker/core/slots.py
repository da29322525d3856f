"""How many orders of an account may wait at the API at once, as its refusals show. Pure.

The API limits the orders that are queued or processed at the same time: 5, 10 or 15 by plan. The number starts at the
smallest plan, or at SD_API_SLOTS. A refusal lowers it at once. It grows by one after a long time in which all slots
were used and nothing was refused, because each attempt to grow may cost a refusal.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

DEFAULT_SLOTS = 5  # the smallest plan
MAX_SLOTS = 1_000
RAISE_AFTER = timedelta(minutes=10)  # of full use
RAISE_AFTER_REFUSAL = timedelta(hours=1)


class SlotLimit(NamedTuple):
    """What is known about the slots of an account. `slots` is None as long as nothing was learned.

    After a refusal, no order is sent before `paused_until`, unless fewer than `paused_at_taken` slots are taken.
    """

    account: str
    slots: int | None = None
    refused_at: datetime | None = None
    raised_at: datetime | None = None
    paused_until: datetime | None = None
    paused_at_taken: int = 0

    def total(self, configured: int | None) -> int:
        """Return how many orders may wait at the API. `configured` is SD_API_SLOTS, the upper limit if it is set."""
        learned = self.slots or configured or DEFAULT_SLOTS
        return min(learned, configured or MAX_SLOTS)

    def free(self, configured: int | None, taken: int, now: datetime) -> int:
        """Return how many more orders may be sent now, while `taken` slots are taken."""
        total = self.total(configured)
        if self.paused_until is not None and now < self.paused_until:
            total = min(total, self.paused_at_taken)
        return max(total - taken, 0)


def after_refusal(
    limit: SlotLimit, configured: int | None, *, taken: int, named: int | None, seconds: float, now: datetime
) -> SlotLimit:
    """Return the limit after the API refused an order because too many wait.

    `taken` is the number of other orders of this account that wait there, and `named` the number that the API allows,
    if it said so.
    """
    total = limit.total(configured)
    learned = min(total, named or max(taken, 1))
    return limit._replace(
        slots=learned, refused_at=now, paused_until=now + timedelta(seconds=seconds), paused_at_taken=taken
    )


def after_full_use(limit: SlotLimit, configured: int | None, now: datetime) -> SlotLimit:
    """Return the limit while all slots are taken and more orders wait. From time to time it grows by one."""
    total = limit.total(configured)
    if total >= (configured or MAX_SLOTS):
        return limit
    if limit.raised_at is None:
        return limit._replace(raised_at=now)  # the time of full use begins
    refused_lately = limit.refused_at is not None and now - limit.refused_at < RAISE_AFTER_REFUSAL
    if refused_lately or now - limit.raised_at < RAISE_AFTER:
        return limit
    return limit._replace(slots=total + 1, raised_at=now)
