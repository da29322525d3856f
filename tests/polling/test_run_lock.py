"""One run at a time polls, and a preemptible run ends in favour of the next."""

import threading
import time

from tests.polling.polls import Polls


def test_given_an_active_run_when_another_starts_then_the_other_ends_at_once(polls: Polls) -> None:
    first = threading.Thread(target=polls.run, args=(1.0,))
    first.start()
    time.sleep(0.1)

    assert polls.poller.run() is None

    first.join()
