"""Describe which jobs an action is about, as one would type it on the command line."""

import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any

from worker.core.circuit_breaker import Scope
from worker.core.humanize import iso_time
from worker.store.reports.search import JobFilter

# The options of the fields of a filter. `worker.cli.filters` reads them. `by_hand` has none: actions add it themselves.
OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "statuses": "--status",
        "accounts": "--account",
        "kinds": "--kind",
        "remote_ids": "--remote",
        "references": "--reference",
        "codes": "--code",
        "output_codes": "--output-code",
        "hosts": "--host",
        "submitted_since": "--since",
        "submitted_until": "--until",
        "finished_since": "--finished-since",
        "finished_until": "--finished-until",
        "late": "--late",
        "stuck": "--stuck",
        "past_deadline": "--past-deadline",
        "held": "--held",
        "holders": "--claimed-by",
    }
)


def filter_options(job_filter: JobFilter) -> str:
    """Return a filter as options of the command line.

    >>> filter_options(JobFilter(statuses=("failed",), references=("order 7",), late=60.0, held=True))
    "--status failed --reference 'order 7' --late 60 --held"
    """
    words = [str(job_id) for job_id in job_filter.ids]
    for field, option in OPTIONS.items():
        for value in _values(getattr(job_filter, field)):
            words += [option] if value is True else [option, _word(value)]
    return shlex.join(words)


def breaker_option(scope: Scope, name: str) -> str:
    """Return the option that selects a whole account or host.

    >>> breaker_option("host", "api.example:8443")
    '--host api.example:8443'
    """
    return shlex.join([f"--{scope}", name])


def _values(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple):
        return value
    return () if value is None or value is False else (value,)


def _word(value: Any) -> str:
    if isinstance(value, datetime):
        return iso_time(value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)
