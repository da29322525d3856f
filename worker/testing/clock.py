"""The test clock. It moves only when the test kit moves it."""

from datetime import UTC, datetime


class Clock:
    """A clock that starts at the real time, so that its times fit beside those the app writes. It never goes back."""

    def __init__(self) -> None:
        self._now = datetime.now(UTC)

    def now(self) -> datetime:
        """Return the current time, aware, in UTC."""
        return self._now

    def timestamp(self) -> float:
        """Return the current time in seconds since 1970."""
        return self._now.timestamp()

    def move_to(self, moment: datetime) -> None:
        """Move the clock forward to a moment. A moment in the past changes nothing."""
        self._now = max(self._now, moment)
