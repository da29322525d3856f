"""Calls in threads: jobs go in with the moment to ask at, answers come out as they come. No barrier anywhere.

Threads that have nothing to wait for compete for the interpreter lock, and each switch between them costs processor
time: 128 of them take a third more for the same calls than 8. So while the calls keep the processor busy there are few
threads, while jobs wait and it has time to spare there are more, and after a rest there may be all of them.
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

FEWEST_THREADS = 8
ADAPT_SECONDS = 0.25  # between two changes of the number of threads
SPARE, BUSY = 0.2, 0.3  # cores that calls take: 0.4 to 0.8 where answers come at once, 0.15 at 128 in flight and 150 ms


class PollAnswer(NamedTuple):
    """An answer: what was asked, when by the monotonic clock, and whether the call was a probe."""

    job: ClaimedJob
    reply: Reply
    probe: bool
    sent: float
    cpu_seconds: float = 0.0  # that the call took of its thread
    raw: RawAnswer | None = None  # the answer as it came, where it may be kept


class _ToAsk(NamedTuple):
    job: ClaimedJob
    moment: float
    probe: bool


class _Lane:
    """The calls to one host: another that is slow or silent keeps none of them waiting."""

    def __init__(self, threads: int) -> None:
        self.to_ask: SimpleQueue[_ToAsk | None] = SimpleQueue()
        self.threads = 0
        self.most_threads = threads
        self.outstanding = 0
        self.cpu_seconds = 0.0  # of its calls that have ended since the last look

    def limit_threads(self, count: int) -> None:
        """Have at most so many threads; the others end, each after the call that it is at."""
        self.most_threads = count
        for _ in range(self.threads - count):
            self.to_ask.put(None)
        self.threads = min(self.threads, count)


class RequestPool:
    """Up to `threads` calls at once to each host. All but `wake` is for the one thread that runs the show."""

    def __init__(self, ask: Callable[[ClaimedJob], ApiReply], *, threads: int) -> None:
        self._ask = ask
        self._most = threads
        self._lanes: defaultdict[str, _Lane] = defaultdict(lambda: _Lane(self._most))
        self._inbox: SimpleQueue[PollAnswer | _ToAsk | None] = SimpleQueue()  # a call that was not made comes back
        self.outstanding = 0
        self._adapted_at = 0.0
        self.not_asked: list[ClaimedJob] = []  # claims that were lost before their call; the caller gives them back

    def outstanding_at(self, host: str) -> int:
        """Jobs that are being asked about at this host, or are to be."""
        return self._lanes[host].outstanding

    def start(self, job: ClaimedJob, moment: float, *, probe: bool = False) -> None:
        """Asks about a job, not before `moment` by the monotonic clock."""
        lane = self._lanes[job.address.host]
        if not lane.outstanding:
            lane.most_threads = self._most
        lane.outstanding += 1
        self.outstanding += 1
        lane.to_ask.put(_ToAsk(job, moment, probe))
        self._man(job.address.host, lane)

    def _man(self, host: str, lane: "_Lane") -> None:
        """Start threads where there is work for more. A machine that has none left may have one later."""
        while lane.threads < min(lane.most_threads, lane.outstanding):
            thread = threading.Thread(target=self._run, args=(lane.to_ask,), name=f"ask-{host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.error("no thread could be started, those there are go on count=%s reason=%s", lane.threads, error)
                return
            lane.threads += 1

    def wake(self) -> None:
        """Ends the wait of `answers`."""
        self._inbox.put(None)

    def answers(self, timeout: float, *, gather: float) -> list[PollAnswer]:
        """The answers that came; it waits for the first one up to `timeout`, and then for `gather` for its company."""
        self._adapt()
        for host, lane in self._lanes.items():
            self._man(host, lane)
        try:
            first = self._inbox.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._inbox.get_nowait()
        except Empty:
            return []
        found = [] if first is None else [first]
        if found and self.outstanding > 1:
            time.sleep(gather)
        while not self._inbox.empty():  # nobody else takes anything out
            one = self._inbox.get()
            if one is not None:
                found.append(one)
        self._count(found)
        answers = [one for one in found if isinstance(one, PollAnswer)]
        if len(answers) < len(found):
            self.not_asked += [one.job for one in found if isinstance(one, _ToAsk)]
        return answers

    def _count(self, ended: Sequence[PollAnswer | _ToAsk]) -> None:
        self.outstanding -= len(ended)
        for call in ended:
            lane = self._lanes[call.job.address.host]
            lane.outstanding -= 1
            if isinstance(call, PollAnswer):
                lane.cpu_seconds += call.cpu_seconds

    def _adapt(self) -> None:
        now = time.monotonic()
        passed = now - self._adapted_at
        if passed >= ADAPT_SECONDS:
            active = [lane for lane in self._lanes.values() if lane.outstanding or lane.cpu_seconds]
            busy = sum(lane.cpu_seconds for lane in active) / passed
            self._adapt_to(busy, [lane for lane in active if lane.cpu_seconds / passed * len(active) < SPARE])
            self._adapted_at = now
            for lane in active:
                lane.cpu_seconds = 0.0

    def _adapt_to(self, busy: float, light: Sequence[_Lane] = ()) -> None:
        """Change the number of threads: `busy` is how much of a core the calls took of late.

        Requests of `light` lanes only wait: they take nothing from the others, and keep their threads.
        """
        for lane in self._lanes.values():
            if lane not in light and busy > BUSY and lane.threads > FEWEST_THREADS:
                lane.limit_threads(max(lane.threads // 2, FEWEST_THREADS))
            elif (lane in light or busy < SPARE) and not lane.to_ask.empty():
                lane.limit_threads(min(2 * lane.most_threads, self._most))

    def close(self) -> None:
        """Ends the threads, each after the call that it is at. Nothing may be started afterwards."""
        for lane in self._lanes.values():
            for _ in range(lane.threads):
                lane.to_ask.put(None)

    def take_back(self) -> list[ClaimedJob]:
        """The jobs that no thread has begun with; nobody will."""
        back: list[ClaimedJob] = []
        for lane in self._lanes.values():
            ends = 0  # of threads, that are to come about nevertheless
            with suppress(Empty):
                while True:
                    waiting = lane.to_ask.get_nowait()
                    if waiting is None:
                        ends += 1
                    else:
                        back.append(waiting.job)
                        lane.outstanding -= 1
            for _ in range(ends):
                lane.to_ask.put(None)
        self.outstanding -= len(back)
        return back

    def _run(self, to_ask: "SimpleQueue[_ToAsk | None]") -> None:
        while (one := to_ask.get()) is not None:
            early = one.moment - time.monotonic()
            if early > 0:
                time.sleep(early)
            sent, used = time.monotonic(), time.thread_time()
            try:
                reply, raw = self._ask(one.job)
            except LeaseLost:
                self._inbox.put(one)
                continue
            except Exception as error:  # an adapter that somebody mounted may raise anything
                log.exception("a call failed job=%s", one.job.id)
                reply, raw = ApiDown(f"no answer: {describe(error)}"), None
            self._inbox.put(PollAnswer(one.job, reply, one.probe, sent, time.thread_time() - used, raw))
