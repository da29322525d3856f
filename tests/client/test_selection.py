"""A filter as options of the command line: what the audit trail says can be typed again."""

import shlex
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import click
import pytest

from tests.rows import NOW
from worker.cli import filters
from worker.client.selection import OPTIONS, breaker_option, filter_options
from worker.store.reports.search import JobFilter

MOMENT = datetime(2026, 3, 1, 12, 30, 15, 123_456, tzinfo=UTC)


def read(options: str) -> JobFilter:
    """Return the filter that the commands read from these options."""
    values: dict[str, Any] = {}
    command = click.command()(filters.filter_options(lambda **options: values.update(options)))
    command.main(shlex.split(options), standalone_mode=False)
    return filters.job_filter(values, NOW)


@pytest.mark.parametrize(
    "job_filter",
    [
        JobFilter(statuses=("failed", "expired"), accounts=("shop",)),
        JobFilter(references=("order 7; rm -rf ~", "'quoted\"", "-x", "")),
        JobFilter(submitted_since=MOMENT, finished_until=NOW, late=0.0),
        JobFilter(late=1_234_567.25, stuck=True),
        JobFilter(
            statuses=("pending",),
            accounts=("a", "b"),
            kinds=("text to image",),
            remote_ids=("12202888", "77"),
            references=("é",),
            codes=("api_failed",),
            output_codes=("gone",),
            hosts=("api.test:8443",),
            submitted_since=MOMENT,
            submitted_until=MOMENT,
            finished_since=MOMENT,
            finished_until=MOMENT,
            late=60.0,
            stuck=True,
            past_deadline=True,
            held=True,
            holders=("host.7.1",),
        ),
    ],
)
def test_the_options_of_a_filter_are_read_as_the_same_filter(job_filter: JobFilter) -> None:
    assert read(filter_options(job_filter)) == job_filter


def test_every_field_of_a_filter_has_its_option() -> None:
    """Except the ids, which are arguments, and what the actions themselves add."""
    assert set(OPTIONS) == {field.name for field in fields(JobFilter)} - {"ids", "by_hand"}


def test_an_empty_filter_and_ids_have_no_options() -> None:
    assert filter_options(JobFilter()) == ""
    assert filter_options(JobFilter(ids=(17, 18), by_hand=True)) == "17 18"


def test_an_account_and_a_host_are_one_option() -> None:
    assert (breaker_option("account", "shop"), breaker_option("host", "h:1")) == ("--account shop", "--host h:1")
