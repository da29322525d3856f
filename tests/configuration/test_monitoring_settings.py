"""Settings of logs."""

import io

import pytest

from worker.settings import load


@pytest.mark.parametrize(
    ("value", "as_json"), [("json", True), (' "JSON"\n', True), ("text", False), ("%(message)s\n%(name)s", True)]
)
def test_a_log_format_that_is_meant_for_the_web_app_counts_as_unset(
    value: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a format, logs are JSON where stderr is not a terminal."""
    monkeypatch.setenv("LOG_FORMAT", value)
    assert load().json_logs(io.StringIO()) is as_json
