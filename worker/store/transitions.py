"""Which columns change together when a job or an output changes its state. Statements take their values from here.

A claim and a due time never outlive a state that has none: see the CHECK constraints in `worker.store.schema`.
"""

from datetime import datetime
from types import MappingProxyType
from typing import Any

Values = dict[str, Any]

NO_CLAIM = MappingProxyType({"claim_token": None, "claim_holder": None})
AT_REST = MappingProxyType({"due_at": None, **NO_CLAIM})

# Columns of an order, beside its job: it waits to be sent (with a due time), is uncertain, or needs no more work.
SLOT_FREE = MappingProxyType({"queue": None, "takes_slot": False, "slot_until": None})
ORDER_DUE = MappingProxyType({"takes_slot": False, "slot_until": None, "attempt_token": None, **NO_CLAIM})
AT_API = MappingProxyType({"attempt_token": None, "last_error": None, **AT_REST})
ORDER_DONE = MappingProxyType({"attempt_token": None, **SLOT_FREE, **AT_REST})


def job_downloading(now: datetime) -> Values:
    """Return the values for a job that is ready and has outputs."""
    return {"status": "downloading", "ready_at": now, **AT_REST}


def job_ended(status: str, now: datetime) -> Values:
    """Return the values for a job in this final state. The caller adds the error code and message."""
    return {"status": status, "completed_at": now, "held_at": None, **AT_REST}


def clear_end() -> Values:
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


def output_failed(code: str, message: str) -> Values:
    """Return the values for an output that is not tried again."""
    return {"status": "failed", "error_code": code, "error_message": message, **AT_REST}


def fresh_output(now: datetime) -> Values:
    """Return the values for an output that is tried again as if it were new. Its attempts are still counted."""
    return {
        "status": "pending",
        "due_at": now,
        "queued_at": None,
        "listed_at": now,
        "bad_bodies": 0,
        "dead_since": None,
        "dead_attempts": 0,
        "renewed": False,
        "error_code": None,
        "error_message": None,
    }
