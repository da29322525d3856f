"""The buttons of troubles: each command that the page can do has one."""

from datetime import UTC, datetime

import pytest
from flask import Flask

from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.admin.trouble_buttons import trouble_button
from worker.operations.troubles import Trouble
from worker.settings import load

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def site() -> Flask:
    return make_site(load(), AccessControl("a long password", "127.0.0.1", lambda: 0.0))


def button_of(site: Flask, command: str) -> tuple[str, str, tuple[tuple[str, str], ...]] | None:
    """Return label, target and fields of the button for a command."""
    with site.test_request_context("/"):
        button = trouble_button(Trouble("backlog", "text", command, 1, NOW))
    return None if button is None else (button.label, button.target, tuple(button.fields))


def form(action: str, *fields: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("action", action), *fields)


@pytest.mark.parametrize(
    ("command", "button"),
    [
        ("resume --account shop", ("Resume", "/accounts/act/", form("resume", ("scope", "account"), ("name", "shop")))),
        ("resume --account 'a b'", ("Resume", "/accounts/act/", form("resume", ("scope", "account"), ("name", "a b")))),
        ("resume --host a:8", ("Resume", "/accounts/act/", form("resume", ("scope", "host"), ("name", "a:8")))),
        ("resume --output-code storage", ("Resume", "/jobs/matching/?output_code=storage", form("resume"))),
        ("resume 7 8", ("Resume", "/jobs/action/", form("resume", ("rowid", "7"), ("rowid", "8")))),
        ("notify 7", ("Notify", "/jobs/action/", form("notify", ("rowid", "7")))),
        ("show 7", ("Show the job", "/jobs/details/?id=7", ())),
        ("list --status downloading", ("Show the jobs", "/jobs/?status=downloading", ())),
        ("up", None),
        ("doctor", None),
    ],
)  # fmt: skip
def test_a_command_that_the_page_can_do_has_a_button(
    site: Flask, command: str, button: tuple[str, str, tuple[tuple[str, str], ...]] | None
) -> None:
    assert button_of(site, f"fetch-worker {command}") == button


@pytest.mark.parametrize("advice", ["raise SD_API_RPS if the API allows it", "add api'test to SD_API_HOSTS"])
def test_advice_that_is_no_command_has_no_button(site: Flask, advice: str) -> None:
    assert button_of(site, advice) is None
