"""The buttons of troubles: each command that the page can do has one."""

import pytest
from flask import Flask

from worker.admin.access import AccessControl
from worker.admin.site import make_site
from worker.admin.trouble_buttons import trouble_button
from worker.core.circuit_breaker import BY_OPERATOR
from worker.operations.remedies import DOCTOR, UP, Remedy, advice, for_filter, for_hold, for_jobs
from worker.settings import load


@pytest.fixture
def site() -> Flask:
    return make_site(load(), AccessControl("a long password", "127.0.0.1", lambda: 0.0))


def button_of(site: Flask, remedy: Remedy) -> tuple[str, str, tuple[tuple[str, str], ...]] | None:
    """Return label, target and fields of the button for a remedy."""
    with site.test_request_context("/"):
        button = trouble_button(remedy)
    return None if button is None else (button.label, button.target, tuple(button.fields))


def form(action: str, *fields: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    return (("action", action), *fields)


@pytest.mark.parametrize(
    ("remedy", "command", "button"),
    [
        (
            for_hold("account", "shop", BY_OPERATOR),
            "resume --account shop",
            ("Resume", "/accounts/act/", form("resume", ("scope", "account"), ("name", "shop"))),
        ),
        (
            for_filter("resume", "account", "a b"),
            "resume --account 'a b'",
            ("Resume", "/accounts/act/", form("resume", ("scope", "account"), ("name", "a b"))),
        ),
        (
            for_filter("resume", "host", "a:8"),
            "resume --host a:8",
            ("Resume", "/accounts/act/", form("resume", ("scope", "host"), ("name", "a:8"))),
        ),
        (
            for_filter("resume", "output-code", "storage"),
            "resume --output-code storage",
            ("Resume", "/jobs/matching/?output_code=storage", form("resume")),
        ),
        (
            for_jobs("resume", [7, 8, 7]),
            "resume 7 8",
            ("Resume", "/jobs/action/", form("resume", ("rowid", "7"), ("rowid", "8"))),
        ),
        (for_jobs("notify", [7]), "notify 7", ("Notify", "/jobs/action/", form("notify", ("rowid", "7")))),
        (for_jobs("show", [7]), "show 7", ("Show the job", "/jobs/details/?id=7", ())),
        (
            for_filter("list", "status", "downloading"),
            "list --status downloading",
            ("Show the jobs", "/jobs/?status=downloading", ()),
        ),
        (UP, "up", None),
        (DOCTOR, "doctor", None),
    ],
)
def test_a_command_that_the_page_can_do_has_a_button(
    site: Flask, remedy: Remedy, command: str, button: tuple[str, str, tuple[tuple[str, str], ...]] | None
) -> None:
    assert remedy.text == f"fetch-worker {command}"
    assert button_of(site, remedy) == button


def test_a_refused_key_has_a_button_beside_its_advice(site: Flask) -> None:
    remedy = for_hold("account", "shop", "key rejected: Invalid API key")

    assert remedy.text == (
        "put the right key of shop into SD_API_KEYS or SD_API_KEYS_FILE and restart the workers; "
        "if the API accepts the key again, fetch-worker resume --account shop"
    )
    assert button_of(site, remedy) == button_of(site, for_filter("resume", "account", "shop"))


@pytest.mark.parametrize("text", ["raise SD_API_RPS if the API allows it", "add api'test to SD_API_HOSTS"])
def test_advice_that_is_no_command_has_no_button(site: Flask, text: str) -> None:
    assert advice(text).text == text
    assert button_of(site, advice(text)) is None
