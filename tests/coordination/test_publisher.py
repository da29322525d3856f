"""The publisher: its callers never wait, whatever happens to the message."""

import threading
import time
from functools import partial

import pytest

from worker.coordination import publisher
from worker.coordination.publisher import Publisher

pytestmark = pytest.mark.every_python


def test_given_slow_and_failing_work_when_sent_then_the_caller_does_not_wait_and_other_work_is_done() -> None:
    release, finished = threading.Event(), list[int]()
    publisher_ = Publisher()
    began = time.monotonic()
    publisher_.send("slow", lambda: release.wait(10))
    publisher_.send("broken", lambda: 1 // 0)
    publisher_.send("good", lambda: finished.append(1))
    handed_over = time.monotonic() - began
    assert not publisher_.finish(0.05)
    release.set()

    assert publisher_.finish(10)
    assert finished == [1]
    assert handed_over < 5.0


def test_given_a_full_queue_when_work_is_sent_then_it_is_dropped_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(publisher, "MAX_QUEUED", 2)
    release, finished = threading.Event(), list[int]()
    publisher_ = Publisher()
    publisher_.send("slow", lambda: release.wait(10))
    for number in range(9):
        publisher_.send("downloads", partial(finished.append, number))
    release.set()
    assert publisher_.finish(30), "it waits for the queued work, although the queue was full"

    assert 1 <= len(finished) < 9
    assert "the publisher's queue is full" in caplog.text
