"""What `up` writes of the lines of its processes: all of them with their names, or on a terminal those that matter."""

import json
import sys

import pytest

from worker.launch.output import KEPT_LINES, QuietWriter, ReadyLine, text_writer

LOGIN = "Flower: log in as admin with s3cret (set FLOWER_BASIC_AUTH to choose)"


def log_line(level: str, event: str, logger: str = "worker.polling.poller", **fields: object) -> str:
    """Return a JSON log line, as the processes write it."""
    frame = {"time": "2026-11-30T10:12:13.768Z", "level": level, "logger": logger, "event": event}
    return json.dumps(frame | fields | {"process": "worker", "pid": 7, "thread": "MainThread"})


class Terminal:
    """The quiet output of `up`, and the lines that it has written."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.say = QuietWriter(lambda name, text: self.lines.append((name, text)))


@pytest.fixture
def terminal() -> Terminal:
    """A terminal to which nothing has been written."""
    return Terminal()


def test_lines_are_prefixed_with_the_name_of_their_process(capsys: pytest.CaptureFixture[str]) -> None:
    say = text_writer(["worker", "downloads"], sys.stdout)

    say("worker", "one")
    say("up", "two")

    assert capsys.readouterr().out == "worker    | one\nup        | two\n"


@pytest.mark.parametrize(
    ("line", "written"),
    [
        (log_line("WARNING", "held", scope="account", name="default"),
         ["10:12:13 WARNING held scope=account name=default"]),
        (log_line("INFO", "the database answers again", seconds=3),
         ["10:12:13 INFO the database answers again seconds=3"]),
        (log_line("ERROR", "a tick failed", exception="Traceback:\n  File x\nKeyError: 7"),
         ["10:12:13 ERROR a tick failed", "Traceback:", "  File x", "KeyError: 7"]),
        (log_line("WARNING", "connection lost", "celery.worker", exception="Traceback:\n  File x\nKeyError: 7"),
         ["10:12:13 WARNING connection lost", "KeyError: 7"]),
        (log_line("INFO", "Task worker.poll[1] received", "celery.worker.strategy"), []),
        (log_line("INFO", "webhook delivered", "worker.notify.webhooks", job=7), []),
        (log_line("WARNING", "Inspect method stats failed", "flower.inspector"), []),
    ],
)  # fmt: skip
def test_given_a_log_line_when_it_comes_then_a_terminal_shows_trouble_and_changes_of_state(
    line: str, written: list[str], terminal: Terminal
) -> None:
    terminal.say("worker", line)

    assert [text for _, text in terminal.lines] == written


def test_given_a_banner_when_the_process_is_ready_then_it_is_never_shown(terminal: Terminal) -> None:
    terminal.say("worker", "SecurityWarning: You're running the worker with superuser privileges")
    terminal.say("worker", log_line("INFO", "worker@host ready.", "celery.apps.worker"))
    terminal.say("up", "worker was killed by SIGKILL; restart in 1 s")

    assert terminal.lines == [("up", "worker was killed by SIGKILL; restart in 1 s")]


def test_given_output_before_it_is_ready_when_the_process_ends_then_the_output_is_shown_first(
    terminal: Terminal,
) -> None:
    for number in range(KEPT_LINES + 5):
        terminal.say("worker", f"line {number}")
    terminal.say("downloads", "of another process")
    terminal.say("up", "worker ended with exit code 1; restart in 1 s")

    shown = [text for _, text in terminal.lines]
    assert shown == [
        *(f"line {number}" for number in range(5, KEPT_LINES + 5)),
        "worker ended with exit code 1; restart in 1 s",
    ]


def test_given_a_ready_process_when_it_writes_a_traceback_then_it_is_shown_at_once(terminal: Terminal) -> None:
    terminal.say("worker", log_line("INFO", "worker@host ready.", "celery.apps.worker"))
    terminal.say("worker", "Exception in thread poll:")
    terminal.say("worker", "worker: Warm shutdown (MainProcess)")
    terminal.say("redis", "* Ready to accept connections unix")
    terminal.say("redis", "* 1 changes in 3600 seconds. Saving...")

    assert terminal.lines == [("worker", "Exception in thread poll:")]


def test_given_a_random_password_when_flower_is_ready_then_one_line_has_address_and_login(terminal: Terminal) -> None:
    terminal.say("flower", LOGIN)
    terminal.say("flower", log_line("INFO", "Visit me at http://127.0.0.1:5555", "flower.command"))

    login = LOGIN.removeprefix("Flower: ")
    assert terminal.lines == [("flower", f"shows jobs and tasks at http://127.0.0.1:5555; {login}")]


@pytest.mark.parametrize(
    "ready",
    [
        {
            "worker": "[2026-11-30 10:12:13,800: INFO/MainProcess] worker@vm ready.",
            "beat": "[2026-11-30 10:12:13,027: INFO/MainProcess] beat: Starting...",
            "flower": "[I 261130 10:12:12 command:177] Visit me at http://127.0.0.1:5959",
        },
        {
            "worker": log_line("INFO", "worker@vm ready.", "celery.apps.worker"),
            "beat": log_line("INFO", "beat: Starting...", "celery.beat"),
            "flower": log_line("INFO", "Visit me at http://127.0.0.1:5959", "flower.command"),
        },
    ],
    ids=["text", "json"],
)
def test_given_lines_in_any_format_when_the_last_process_is_ready_then_up_says_so_and_again_after_a_restart(
    ready: dict[str, str],
) -> None:
    lines: list[tuple[str, str]] = []
    seconds = iter((100.0, 104.25))
    say = ReadyLine(lambda name, text: lines.append((name, text)), ready, note=" now", clock=lambda: next(seconds))

    for name, line in ready.items():
        assert not any(text.startswith("ready") for _, text in lines)
        say(name, line)
    say("worker", "Task received")
    say("worker", ready["worker"])

    own = [text for name, text in lines if name == "up"]
    assert own == ["ready after 4.2 s now", "worker is ready again"]
    assert [line for line in lines if line[0] != "up"] == [
        *ready.items(),
        ("worker", "Task received"),
        ("worker", ready["worker"]),
    ]
