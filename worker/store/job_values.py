"""Values of a job that are always set together."""

from typing import Any


def clear_end() -> dict[str, Any]:
    """Return the values of a job that leaves its final state: how it ended, and who was told of it, is forgotten."""
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
