"""Orders that wait for a slot make polls more valuable: a job that is seen ready early lets the next order start."""

from dataclasses import replace

from worker.core.pacing.policy import Pace

MAX_FACTOR = 60.0
COUNTED_MOST = 500  # waiting orders of an account: more make no difference


class OrderBacklog:
    """The number of waiting orders per slot, by account, as a process saw it last. Safe to use from several threads.

    While orders wait, each second in which a free slot is not noticed delays all of them: with `n` orders and `s`
    slots, by `n / s` seconds in sum, beside the second of the job itself. So a request is worth `1 + n / s` times as
    much delay as usual, and its price is divided by that, up to `MAX_FACTOR`.
    """

    def __init__(self) -> None:
        self._factors: dict[str, float] = {}
        self._paces: dict[tuple[Pace, float], Pace] = {}

    def set(self, account: str, waiting: int, slots: int) -> None:
        """Note how many orders of an account wait for one of its slots."""
        if not waiting:
            self._factors.pop(account, None)
        else:
            self._factors[account] = min(1.0 + round(waiting / max(slots, 1)), MAX_FACTOR)

    def pace(self, pace: Pace, account: str) -> Pace:
        """Return the pace for jobs of an account.

        >>> backlog, usual = OrderBacklog(), Pace("learned", 0.5, 3.0)
        >>> backlog.set("shop", 20, 5)
        >>> backlog.pace(usual, "shop").price, backlog.pace(usual, "default").price
        (0.1, 0.5)
        """
        factor = self._factors.get(account)
        if factor is None:
            return pace
        key = (pace, factor)
        cheaper = self._paces.get(key)
        if cheaper is None:
            cheaper = self._paces[key] = replace(pace, price=pace.price / factor)
        return cheaper

    @property
    def accounts(self) -> frozenset[str]:
        """The accounts of which orders wait."""
        return frozenset(self._factors)
