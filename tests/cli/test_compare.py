"""`fetch-worker compare-api`, with a second stand-in in place of the API."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from worker.cli.compare import UNKNOWN_ID, WRONG_KEY, compare_api
from worker.sandbox import Sandbox, SandboxOptions

KEY = "sk-compare-0123456789abcdef"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    with Sandbox(SandboxOptions(key=KEY, min_seconds=0, max_seconds=0)) as sandbox:
        monkeypatch.setenv("SD_API_URL", sandbox.url)
        monkeypatch.setenv("SD_API_KEY", KEY)
        yield sandbox


def run(*arguments: str) -> Result:
    return CliRunner().invoke(compare_api, arguments, standalone_mode=False)


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.return_value == 0
    parsed: list[dict[str, Any]] = json.loads(result.stdout)
    return parsed


def test_given_an_api_that_answers_like_the_stand_in_when_compared_then_all_shapes_are_the_same(api: Sandbox) -> None:
    job = api.submit("a lighthouse")

    compared = rows("--job", str(job["id"]))

    assert [row["api"] for row in compared] == ["unknown_id", "account_refused", "ready"]
    assert all(row["same"] for row in compared)
    assert "the shapes are the same" in run().stdout


def test_given_another_family_when_compared_then_its_finished_job_is_polled_there(api: Sandbox) -> None:
    job = api.submit("a lighthouse", family="v6/video/text2video")

    compared = rows("--job", str(job["id"]), "--endpoint", "v6/video/text2video")

    assert [row["api"] for row in compared] == ["unknown_id", "account_refused", "ready"]


def test_given_an_api_with_new_words_when_compared_then_the_request_is_named(api: Sandbox) -> None:
    job = api.submit("a lighthouse", scenario="new-words")

    result = run("--job", str(job["id"]))

    assert result.stdout.rstrip().endswith("different shapes: a finished job")


def test_nothing_is_ever_submitted_and_the_key_is_never_shown(api: Sandbox) -> None:
    orders = dict(api.calls.orders)

    result = run()

    assert dict(api.calls.orders) == orders
    assert set(api.calls.fetches) == {UNKNOWN_ID}
    assert KEY not in result.output
    assert WRONG_KEY.get_secret_value() not in result.output


def test_given_no_key_when_compared_then_it_only_prints_the_requests(
    api: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SD_API_KEY")

    result = run("--job", "7")

    assert result.return_value == 0
    assert f"would request a finished job: {api.url}/fetch/7" in result.stderr
    assert not api.calls.fetches


def test_given_an_unreachable_api_when_compared_then_the_exit_code_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_URL", "http://127.0.0.1:9/api/v3")
    monkeypatch.setenv("SD_API_KEY", KEY)

    result = run()

    assert result.return_value == 1
    assert "no answer" in result.stderr
