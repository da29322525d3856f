"""Column values of a job that are always set together."""

from typing import Any


def clear_end() -> dict[str, Any]:
    """Return the values for a job that leaves its final state: no end time, no error, no call or event sent."""
    return {
        "completed_at": None,
        "told_at": None,
        "on_done_attempts": 0,
        "on_done_due_at": None,
        "on_done_error": None,
        "announced_at": None,
        "error_code": None,
        "error_message": None,
    }
