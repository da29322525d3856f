"""A clock that stands still until it is moved."""

from datetime import UTC, datetime


class Clock:
    """Starts at the real time, so that what an app writes beside it fits in. It never goes back."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)

    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return self._now

    def timestamp(self) -> float:
        """The time in seconds since 1970."""
        return self._now.timestamp()

    def move_to(self, moment: datetime) -> None:
        """Leaps to a moment; one that has passed changes nothing."""
        self._now = max(self._now, moment)
