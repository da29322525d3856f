"""Leave out Celery's lines about tasks that found nothing to do. At the level DEBUG they are all there.

Beat sends polls and sweeps as a safety net. Without this filter an idle system writes a line about each of them, and
each attempt to download from a host that fails writes two.
"""

import logging
from collections.abc import Mapping

HINTS = frozenset({"worker.poll", "worker.submit", "worker.sweep", "worker.prune", "worker.download"})
# How their results begin if there was nothing to do, or if a download is tried again.
NOTHING = ("'nothing ", "'another ", "'0 jobs pruned", "'again later", "'its host is busy")
SENT = "Scheduler: Sending due task"  # of beat
LOGGERS = ("celery.beat", "celery.worker.strategy", "celery.app.trace")


class IdleFilter(logging.Filter):
    """Drops lines of level INFO about the start of a hint, and about its end if there was nothing to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        if record.levelno != logging.INFO or logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
            return True
        context = record.args if isinstance(record.args, Mapping) else {}
        if context.get("name") in HINTS:
            result = str(context.get("return_value", NOTHING[0]))  # a line about the start has no result
            return not result.startswith(NOTHING)
        return not str(record.msg).startswith(SENT)


def leave_out_idle_lines() -> None:
    """Apply the filter to this process."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(IdleFilter())
