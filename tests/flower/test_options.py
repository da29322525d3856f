"""The options of Flower: the operator's variables count, wrong ones are named in one line, and a login is required."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.flowers import flower
from worker.errors import SettingsError
from worker.flower.options import check_flower, flower_options

SECRET = "oauth-secret-8c1f"
OAUTH = {
    "FLOWER_AUTH": "ann@shop.example",
    "FLOWER_AUTH_PROVIDER": "flower.views.auth.GithubLoginHandler",
    "FLOWER_OAUTH2_KEY": "client-7",
    "FLOWER_OAUTH2_SECRET": SECRET,
    "FLOWER_OAUTH2_REDIRECT_URI": "https://flower.shop.example/login",
}
COMMAND = ("celery", "-A", "worker.app", "flower")


def without(*names: str) -> dict[str, str]:
    """Return a complete login by OAuth without some of its variables."""
    return {name: value for name, value in OAUTH.items() if name not in names}


def refusal(environment: Mapping[str, str], *arguments: str) -> str:
    """Return the reason for which Flower would not start."""
    with pytest.raises(SettingsError) as refused:
        check_flower(environment, [*COMMAND, *arguments])
    return str(refused.value)


@pytest.mark.parametrize("missing", OAUTH)
def test_given_a_half_set_oauth_then_one_line_names_what_is_missing(missing: str) -> None:
    line = refusal(without(missing))

    assert line == f"{missing} must be set: a login by OAuth in Flower needs {', '.join(OAUTH)}"


def test_given_only_a_provider_then_all_others_are_named() -> None:
    line = refusal({"FLOWER_AUTH_PROVIDER": "flower.views.auth.GithubLoginHandler"})

    assert line.startswith(
        "FLOWER_AUTH and FLOWER_OAUTH2_KEY and FLOWER_OAUTH2_SECRET and FLOWER_OAUTH2_REDIRECT_URI must be set: "
    )


def test_okta_needs_its_address() -> None:
    okta = OAUTH | {"FLOWER_AUTH_PROVIDER": "flower.views.auth.OktaLoginHandler"}

    assert refusal(okta).startswith("FLOWER_OAUTH2_OKTA_BASE_URL must be set")
    check_flower(okta | {"FLOWER_OAUTH2_OKTA_BASE_URL": "https://shop.okta.example/oauth2"}, COMMAND)


def test_a_misspelt_provider_of_flower_is_refused_with_the_names_of_all() -> None:
    line = refusal(OAUTH | {"FLOWER_AUTH_PROVIDER": "flower.views.auth.GitHubLoginHandler"})

    assert line.startswith("FLOWER_AUTH_PROVIDER must be one of flower.views.auth.")
    assert "flower.views.auth.GithubLoginHandler" in line


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, ()),
        (OAUTH, ()),
        (
            without("FLOWER_AUTH", "FLOWER_AUTH_PROVIDER"),
            ("--auth=a@b.example", f"--auth-provider={OAUTH['FLOWER_AUTH_PROVIDER']}"),
        ),
        (without("FLOWER_AUTH"), ("-auth=a@b.example",)),
        ({"FLOWER_AUTH": "ann", "FLOWER_AUTH_PROVIDER": "shop.flower.HeaderLogin"}, ()),
        (without("FLOWER_AUTH") | {"FLOWER_CONF": "/etc/flower.py"}, ()),
        ({"FLOWER_OAUTH2_SECRET": " ", "FLOWER_BASIC_AUTH": "ops:secret"}, ()),
    ],
)
def test_a_complete_login_is_accepted_wherever_its_parts_are(
    environment: Mapping[str, str], arguments: tuple[str, ...]
) -> None:
    check_flower(environment, [*COMMAND, *arguments])


def test_flower_gets_the_variables_that_it_knows_without_quotation_marks() -> None:
    options = flower_options(
        {
            "FLOWER_TASKS_COLUMNS": '"name,uuid"\n',
            "FLOWER_MAX_TASKS": "5000",
            "FLOWER_GITLAB_AUTH_ALLOWED_GROUPS": "shop/operators",
            "FLOWER_JOBS": "50",
            "FLOWER_COLOUR": "blue",
            "OTHER": "1",
        }
    )

    assert options == {
        "tasks_columns": "name,uuid",
        "max_tasks": "5000",
        "gitlab_auth_allowed_groups": "shop/operators",
    }


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FLOWER_MAX_TASKS", "many", "must be a number"),
        ("FLOWER_INSPECT_TIMEOUT", "1,5", "must be a number"),
        ("FLOWER_PERSISTENT", "maybe", "must be true or false"),
        ("FLOWER_OAUTH2_KEY", "a\nb", "has a line break as character 2: remove it"),
    ],
)
def test_a_wrong_value_is_refused(variable: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"{variable} {reason}")):
        flower_options({variable: value})


# ── a real process ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (without("FLOWER_AUTH_PROVIDER"), "FLOWER_AUTH_PROVIDER must be set: "),
        ({"FLOWER_CONF": "/none/flower.py"}, "FLOWER_CONF names /none/flower.py, which cannot be read (No such file"),
        (
            OAUTH | {"FLOWER_GITHUB_OAUTH_DOMAIN": "'git.shop.example'"},
            "FLOWER_GITHUB_OAUTH_DOMAIN must be in the environment itself, without quotation marks",
        ),
    ],
)
def test_given_wrong_options_when_flower_starts_then_it_says_so_in_one_line(
    settings: Mapping[str, str], line: str, tmp_path: Path
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", *COMMAND],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert process.returncode == 2
    assert process.stderr.startswith(f"fetch-worker: {line}")
    assert len(process.stderr.splitlines()) == 1
    assert SECRET not in process.stderr


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, ["name", "uuid", "state", "args", "result", "received", "runtime"]),
        ({"FLOWER_TASKS_COLUMNS": "uuid, kwargs"}, ["uuid", "kwargs"]),
    ],
)
def test_the_tasks_page_has_our_columns_unless_the_operator_chooses_others(
    settings: Mapping[str, str], columns: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/worker.db")

    with flower(tmp_path, **settings, FLOWER_COLOUR="blue") as shown:
        page = shown.page("/tasks")

    assert re.findall(r'data-column="(\w+)"', page) == columns
    assert "fetch-worker: no option of Flower, ignored: FLOWER_COLOUR" in shown.log.read_text()
