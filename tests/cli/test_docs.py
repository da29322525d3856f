"""`fetch-worker docs`: it lists the pages of the manual and prints each of them."""

import sys

import pytest

from tests.docs.manual import PAGES
from worker.cli.commands import run_command
from worker.cli.docs import manual_pages


def test_without_a_topic_it_lists_every_page_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["docs"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(PAGES)
    assert lines[0].startswith("index ")
    assert lines[1].split(maxsplit=1) == ["web-apps", PAGES["web-apps"].splitlines()[2]]


@pytest.mark.parametrize("topic", ["retention", "retention.md", "Retention"])
def test_a_page_is_printed_as_it_is_where_stdout_is_no_terminal(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["docs", topic]) == 0

    assert capsys.readouterr().out == PAGES["retention"]


def test_a_terminal_gets_a_formatted_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")

    assert run_command(["docs", "retention"]) == 0

    printed = capsys.readouterr().out
    assert "Retention" in printed
    assert "# Retention" not in printed
    assert "`" not in printed


def test_an_unknown_topic_is_a_wrong_usage_that_names_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["docs", "setting"]) == 2

    assert "callbacks" in capsys.readouterr().err


def test_no_page_shows_the_marks_of_its_generated_parts() -> None:
    assert [topic for topic, text in manual_pages().items() if "<!--" in text] == []


def test_a_narrow_terminal_gets_every_character_of_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "60")

    assert run_command(["docs", "settings"]) == 0

    assert capsys.readouterr().out.count("…") == PAGES["settings"].count("…")  # else a word was cut off
