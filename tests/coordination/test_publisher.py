"""The courier: whoever hands it something goes on at once, whatever becomes of it."""

import threading
import time
from functools import partial

import pytest

from worker.coordination import publisher
from worker.coordination.publisher import Publisher

pytestmark = pytest.mark.every_python


def test_given_slow_and_failing_work_when_it_is_handed_over_then_nobody_waits_and_the_rest_is_done() -> None:
    opened, done = threading.Event(), list[int]()
    sender = Publisher()
    began = time.monotonic()
    sender.send("slow", lambda: opened.wait(10))
    sender.send("broken", lambda: 1 // 0)
    sender.send("good", lambda: done.append(1))
    handed_over = time.monotonic() - began
    assert not sender.finish(0.05)
    opened.set()

    assert sender.finish(10)
    assert done == [1]
    assert handed_over < 5.0


def test_given_more_than_it_has_room_for_when_handed_over_then_it_is_dropped_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publisher, "MAX_QUEUED", 2)
    opened, done = threading.Event(), list[int]()
    sender = Publisher()
    sender.send("slow", lambda: opened.wait(10))
    for number in range(9):
        sender.send("downloads", partial(done.append, number))
    opened.set()
    assert sender.finish(30), "what is there to be sent is waited for, though the queue was full"

    assert 1 <= len(done) < 9
    assert "the publisher's queue is full" in caplog.text
