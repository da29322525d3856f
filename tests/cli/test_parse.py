"""`fetch-worker parse` shows how the worker reads an answer from a file or standard input."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from worker.cli.parse import parse

A, P = "https://pub-8b49.r2.dev/a.png", "https://cdn2.stablediffusionapi.com/a.png"
KEYS = ["class", "message", "outputs", "proxy_links", "promised", "retry_after", "eta", "job"]


@pytest.fixture(autouse=True)
def v6_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_URL", "https://modelslab.com/api/v6")


def run(answer: object, *arguments: str) -> Result:
    body = answer if isinstance(answer, bytes | str) else json.dumps(answer)
    return CliRunner().invoke(parse, ["-", *arguments], input=body, standalone_mode=False)


def document(answer: object, *arguments: str) -> dict[str, Any]:
    result = run(answer, *arguments, "--json")
    parsed: dict[str, Any] = json.loads(result.stdout)
    assert list(parsed) == KEYS
    return parsed


@pytest.mark.parametrize(
    ("answer", "arguments", "expected"),
    [
        ({"status": "processing", "eta": 12}, [], {"class": "processing", "eta": 12.0}),
        ({"status": "processing", "future_links": [A]}, [], {"class": "processing", "promised": [A]}),
        (
            {"status": "success", "output": [A], "proxy_links": [P]},
            [],
            {"class": "ready", "outputs": [A], "proxy_links": [P]},
        ),
        ({"status": "success", "output": []}, [], {"class": "empty", "outputs": []}),
        ({"status": "success", "id": 8, "output": [A]}, ["--remote-id", "7"], {"class": "another_job"}),
        ({"status": "success", "id": 8, "output": [A]}, [], {"class": "ready"}),
        ({"status": "failed", "message": "out of memory"}, [], {"class": "failed", "message": "out of memory"}),
        ({"status": "failed", "message": "Request not found"}, [], {"class": "unknown_id"}),
        ({"status": "error", "message": "The prompt field is required."}, [], {"class": "api_error"}),
        ({"status": "done"}, [], {"class": "unread", "message": "unknown status 'done'"}),
        ("<html>", [], {"class": "unread"}),
        ({}, ["--http-status", "429", "--header", "Retry-After: 7"], {"class": "rate_limited", "retry_after": 7.0}),
        ({"message": "x"}, ["--http-status", "402"], {"class": "account_refused"}),
        ("<html>", ["--http-status", "502"], {"class": "api_down"}),
        ({"message": "The route api/v6/x could not be found."}, ["--http-status", "404"], {"class": "api_down"}),
        ({"status": "success", "messege": "deploying_gpu"}, ["--endpoint", "v3/fine_tune"], {"class": "processing"}),
        ({"status": "success", "messege": "deploying_gpu"}, [], {"class": "empty"}),
    ],
)
def test_given_an_answer_when_parsed_then_it_has_its_class(
    answer: object, arguments: list[str], expected: dict[str, Any]
) -> None:
    parsed = document(answer, *arguments)

    assert {name: parsed[name] for name in expected} == expected
    assert parsed["job"] is None


@pytest.mark.parametrize(
    ("answer", "arguments", "job"),
    [
        ({"status": "processing", "id": 7}, [], ("7", "https://modelslab.com/api/v6/fetch/7", "image")),
        (
            {"status": "processing", "id": 7},
            ["--endpoint", "v7/video-fusion/text-to-video"],
            ("7", "https://modelslab.com/api/v7/video-fusion/fetch/7", "video-fusion"),
        ),
        (
            {"status": "success", "training_id": "F5", "messege": "deploying_gpu"},
            [],
            ("F5", "https://modelslab.com/api/v3/fine_tune_status/F5", "training"),
        ),
    ],
)
def test_given_a_submit_answer_when_parsed_then_its_job_is_shown(
    answer: object, arguments: list[str], job: tuple[str, str, str]
) -> None:
    parsed = document(answer, "--submit", *arguments)

    assert parsed["class"] == "tracked"
    assert tuple(parsed["job"].values()) == job


def test_given_an_order_that_was_ready_at_once_when_parsed_then_there_is_no_fetch_url() -> None:
    parsed = document({"status": "success", "id": 7, "output": [A]}, "--submit")

    assert (parsed["class"], parsed["outputs"], parsed["job"]["fetch_url"]) == ("ready", [A], None)


@pytest.mark.parametrize(
    ("answer", "arguments", "name"),
    [
        ({"status": "error", "message": "Your monthly limit exceeded"}, [], "refused"),
        ({"status": "failed", "message": "Failed, Try Again", "id": ""}, [], "refused"),
        ({"error": "Insufficient credits"}, ["--http-status", "400"], "refused"),
        ({"id": "chat-1", "object": "chat.completion", "choices": []}, [], "not_trackable"),
        ({"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": 1}, [], "not_trackable"),
        ("no JSON", [], "not_trackable"),
        ({}, [], "not_trackable"),
    ],
)
def test_given_an_answer_without_a_job_when_parsed_then_the_exit_code_is_1(
    answer: object, arguments: list[str], name: str
) -> None:
    result = run(answer, "--submit", *arguments, "--json")

    assert json.loads(result.stdout)["class"] == name
    assert result.return_value == 1


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--header", "nonsense"], "NAME:VALUE"),
        (["--endpoint", "nonsense"], "v6/video/text2video"),
        (["--submit", "--endpoint", "nonsense"], "v6/video/text2video"),
        (["--submit", "--endpoint", "https://evil.example/api/v6/video/x"], "SD_API_HOSTS"),
    ],
)
def test_given_a_wrong_option_when_parsed_then_the_error_says_what_to_write(arguments: list[str], advice: str) -> None:
    result = CliRunner().invoke(parse, ["-", *arguments], input="{}")

    assert result.exit_code == 2
    assert advice in result.output


def test_given_a_missing_file_when_parsed_then_it_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(parse, [str(tmp_path / "missing.json")])

    assert result.exit_code == 2
    assert "can't be read" in result.output


def test_given_a_key_in_an_answer_when_parsed_then_it_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_API_KEY", "sk-canary-0123456789abcdef")

    result = run({"status": "error", "message": "Model sk-canary-0123456789abcdef not found"}, "--json")

    assert "canary" not in result.output
    assert json.loads(result.stdout)["class"] == "api_error"
