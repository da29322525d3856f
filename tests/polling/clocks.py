"""A monotonic clock that tests set."""

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """It stands in for the `time` of a module."""

    now: float = 1_000.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now
