"""A pool of threads that send poll requests. Jobs go in with the time to send at; answers come out as they arrive.

Threads that never wait compete for the interpreter lock, and each switch costs processor time: 128 such threads use a
third more for the same requests than 8. So the pool uses few threads while requests keep the processor busy, and more
while jobs wait and the processor is idle. After a pause it may use all of them again.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from worker.coordination.leases import LeaseLost
from worker.core.reply import ApiDown, ApiReply, RawAnswer, Reply
from worker.net.network_errors import describe
from worker.store.claims import ClaimedJob

log = logging.getLogger(__name__)

MIN_THREADS = 8
ADAPT_SECONDS = 0.25  # between changes of the number of threads
# Requests use 0.4 to 0.8 cores if answers come at once, and 0.15 at 128 in flight and 150 ms per answer.
SPARE, BUSY = 0.2, 0.3  # processor cores used by requests


class PollAnswer(NamedTuple):
    """The answer to a poll: its job, when it was sent by the monotonic clock, and whether it was a probe."""

    job: ClaimedJob
    reply: Reply
    probe: bool
    sent: float
    cpu_seconds: float = 0.0  # processor time of the request
    raw: RawAnswer | None = None  # the unparsed answer, if it may be stored


class _QueuedRequest(NamedTuple):
    job: ClaimedJob
    send_at: float
    probe: bool


class _Lane:
    """The requests to one host, so that a slow host delays no other."""

    def __init__(self, threads: int) -> None:
        self.queue: SimpleQueue[_QueuedRequest | None] = SimpleQueue()
        self.threads = 0
        self.max_threads = threads
        self.outstanding = 0
        self.cpu_seconds = 0.0  # of requests that ended since the last adaptation

    def limit_threads(self, count: int) -> None:
        """Limit the number of threads. Surplus threads end after their current request."""
        self.max_threads = count
        for _ in range(self.threads - count):
            self.queue.put(None)
        self.threads = min(self.threads, count)


class RequestPool:
    """Sends up to `threads` requests at once to each host. Only `wake` may be called from other threads."""

    def __init__(self, ask: Callable[[ClaimedJob], ApiReply], *, threads: int) -> None:
        self._ask = ask
        self._max_threads = threads
        self._lanes: defaultdict[str, _Lane] = defaultdict(lambda: _Lane(self._max_threads))
        self._inbox: SimpleQueue[PollAnswer | _QueuedRequest | None] = SimpleQueue()  # unsent requests come back
        self.outstanding = 0
        self._adapted_at = 0.0
        self._lost: list[ClaimedJob] = []  # jobs whose claim was lost before their request

    def outstanding_at(self, host: str) -> int:
        """Return how many requests to this host are queued or in flight."""
        return self._lanes[host].outstanding

    def start(self, job: ClaimedJob, moment: float, *, probe: bool = False) -> None:
        """Queue a poll of a job. It is not sent before `moment`, by the monotonic clock."""
        lane = self._lanes[job.address.host]
        if not lane.outstanding:
            lane.max_threads = self._max_threads
        lane.outstanding += 1
        self.outstanding += 1
        lane.queue.put(_QueuedRequest(job, moment, probe))
        self._start_threads(job.address.host, lane)

    def _start_threads(self, host: str, lane: "_Lane") -> None:
        """Start the threads that a host needs. If the machine has none left, the next call tries again."""
        while lane.threads < min(lane.max_threads, lane.outstanding):
            thread = threading.Thread(target=self._run, args=(lane.queue,), name=f"ask-{host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread could be started, the others go on count=%s reason=%s", lane.threads, error)
                return
            lane.threads += 1

    def wake(self) -> None:
        """End the wait in `answers`."""
        self._inbox.put(None)

    def answers(self, timeout: float, *, gather: float) -> list[PollAnswer]:
        """Return the answers that arrived. Wait up to `timeout` for the first one, then `gather` seconds for more."""
        self._adapt()
        for host, lane in self._lanes.items():
            self._start_threads(host, lane)
        try:
            first = self._inbox.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._inbox.get_nowait()
        except Empty:
            return []
        received = [] if first is None else [first]
        if received and self.outstanding > 1:
            time.sleep(gather)
        while not self._inbox.empty():  # no other thread reads from it
            item = self._inbox.get()
            if item is not None:
                received.append(item)
        self._count(received)
        answers = [item for item in received if isinstance(item, PollAnswer)]
        if len(answers) < len(received):
            self._lost += [item.job for item in received if isinstance(item, _QueuedRequest)]
        return answers

    def _count(self, finished: Sequence[PollAnswer | _QueuedRequest]) -> None:
        self.outstanding -= len(finished)
        for item in finished:
            lane = self._lanes[item.job.address.host]
            lane.outstanding -= 1
            if isinstance(item, PollAnswer):
                lane.cpu_seconds += item.cpu_seconds

    def _adapt(self) -> None:
        now = time.monotonic()
        passed = now - self._adapted_at
        if passed >= ADAPT_SECONDS:
            active = [lane for lane in self._lanes.values() if lane.outstanding or lane.cpu_seconds]
            busy = sum(lane.cpu_seconds for lane in active) / passed
            self._set_threads(busy, [lane for lane in active if lane.cpu_seconds / passed * len(active) < SPARE])
            self._adapted_at = now
            for lane in active:
                lane.cpu_seconds = 0.0

    def _set_threads(self, busy: float, light: Sequence[_Lane] = ()) -> None:
        """Change the number of threads. `busy` is how many processor cores the requests used lately.

        Requests of `light` lanes only wait. They slow down no other lane, so they keep their threads.
        """
        for lane in self._lanes.values():
            if lane not in light and busy > BUSY and lane.threads > MIN_THREADS:
                lane.limit_threads(max(lane.threads // 2, MIN_THREADS))
            elif (lane in light or busy < SPARE) and not lane.queue.empty():
                lane.limit_threads(min(2 * lane.max_threads, self._max_threads))

    def close(self) -> None:
        """End the threads, each after its current request. Nothing may be started afterwards."""
        for lane in self._lanes.values():
            for _ in range(lane.threads):
                lane.queue.put(None)

    def take_lost(self) -> list[ClaimedJob]:
        """Remove and return the jobs whose lease may have ended before their request, which was not sent."""
        lost, self._lost = self._lost, []
        return lost

    def take_back(self) -> list[ClaimedJob]:
        """Remove and return the jobs whose request no thread has started."""
        jobs: list[ClaimedJob] = []
        for lane in self._lanes.values():
            stop_signals = 0  # stop signals for threads, which are put back into the queue
            with suppress(Empty):
                while True:
                    request = lane.queue.get_nowait()
                    if request is None:
                        stop_signals += 1
                    else:
                        jobs.append(request.job)
                        lane.outstanding -= 1
            for _ in range(stop_signals):
                lane.queue.put(None)
        self.outstanding -= len(jobs)
        return jobs

    def _run(self, queue: "SimpleQueue[_QueuedRequest | None]") -> None:
        while (request := queue.get()) is not None:
            delay = request.send_at - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            sent, cpu_start = time.monotonic(), time.thread_time()
            try:
                reply, raw = self._ask(request.job)
            except LeaseLost:
                self._inbox.put(request)
                continue
            except Exception as error:  # a mounted adapter may raise any error
                log.exception("a request failed job=%s", request.job.id)
                reply, raw = ApiDown(f"no answer: {describe(error)}"), None
            self._inbox.put(PollAnswer(request.job, reply, request.probe, sent, time.thread_time() - cpu_start, raw))
