"""The stand-in of the API as tests use it: each job answers as its test says, at the time that its test says it is."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from worker.sandbox.behaviour import Answer, SandboxOptions, fetch_target, json_answer, parse_body
from worker.sandbox.pictures import SMALLEST, draw, picture_name
from worker.sandbox.server import Sandbox
from worker.testing.clock import Clock

KEY = "key-of-the-stand-in"
READY_SECONDS = 5.0
PICTURES = "/generations/"


@dataclass(slots=True)
class _Step:
    """One answer, given so many times, or until a moment where `times` is None; the last one of all for ever."""

    answer: Callable[[str], Answer]
    times: int | None = 1
    until: float = 0.0

    def over(self, now: float) -> bool:
        """Whether it is the next one's turn."""
        return now >= self.until if self.times is None else self.times < 1


class Answers:
    """What the stand-in answers about a job, one after the other. The last answer is given for ever."""

    def __init__(self, api: "FetchApi", clock: Clock) -> None:
        self._api = api
        self._clock = clock
        self._steps: list[_Step] = []

    def processing(self, times: int = 1, *, eta: float | None = None) -> Self:
        """Not ready yet, so many times."""
        said = {} if eta is None else {"eta": eta}
        return self.body({"status": "processing", "message": "try again later.", "output": "", **said}, times=times)

    def processing_for(self, seconds: float) -> Self:
        """Not ready yet, for so many seconds from now on."""
        body = {"status": "processing", "message": "try again later.", "output": ""}
        until = self._clock.timestamp() + seconds
        return self._add(_Step(lambda _: json_answer(body), times=None, until=until))

    def success(self, pictures: int | Sequence[str | bytes] = 1) -> Self:
        """Ready: so many pictures, or these: addresses as they stand, or bytes that the stand-in serves."""
        return self._add(_Step(lambda remote_id: self._api.ready(remote_id, pictures)))

    def failed(self, message: str = "Processing failed: Invalid input dimensions", *, times: int = 1) -> Self:
        """The job failed."""
        return self.body({"status": "failed", "id": "", "message": message, "output": ""}, times=times)

    def not_found(self, *, times: int = 1) -> Self:
        """The API knows no such job."""
        return self.failed("Request not found", times=times)

    def error(self, message: str = "Something went wrong", *, times: int = 1) -> Self:
        """An error of the job."""
        return self.body({"status": "error", "message": message}, times=times)

    def rate_limited(self, seconds: int = 30, *, times: int = 1) -> Self:
        """Too many requests: the account has to pause."""
        body = {"status": "error", "message": "Rate limit exceeded", "retry_after": seconds}
        return self.body(body, status=429, times=times)

    def key_rejected(self, *, times: int = 1) -> Self:
        """The key is not accepted: the account is held."""
        return self.body({"status": "error", "message": "Invalid Api Key"}, times=times)

    def no_credits(self, *, times: int = 1) -> Self:
        """The account has no credits: it is held."""
        return self.body({"status": "error", "message": "Insufficient credits"}, status=402, times=times)

    def unavailable(self, *, times: int = 1) -> Self:
        """The API is down."""
        return self.body({"status": "error", "message": "Service temporarily unavailable."}, status=503, times=times)

    def body(self, content: Mapping[str, Any] | bytes, *, status: int = 200, times: int = 1) -> Self:
        """Anything else: a JSON object, or bytes as they stand."""
        if isinstance(content, bytes):
            fixed = Answer(status, {"Content-Type": "application/json"}, content)
        else:
            fixed = json_answer(content, status=status)
        return self._add(_Step(lambda _: fixed, times=times))

    def _add(self, step: _Step) -> Self:
        if step.times is not None and step.times < 1:
            raise ValueError(f"an answer is given once at least, not {step.times} times")
        self._steps.append(step)
        return self

    def copy(self) -> "Answers":
        """The same answers, none of them given yet."""
        made = Answers(self._api, self._clock)
        made._steps = [replace(step) for step in self._steps]
        return made

    def next(self, remote_id: str) -> Answer | None:
        """The answer whose turn it is; None where there is none at all."""
        now = self._clock.timestamp()
        while len(self._steps) > 1 and self._steps[0].over(now):
            self._steps.pop(0)
        if not self._steps:
            return None
        step = self._steps[0]
        if step.times is not None:
            step.times -= 1
        return step.answer(remote_id)


class FetchApi(Sandbox):
    """The stand-in of the hosted API, on the test's clock.

    Jobs that were submitted here, by the app or by `submit`, are ready after `READY_SECONDS` of that clock, unless
    `ready_after` or `answers` says otherwise. An id that the stand-in never gave out is taken for one of its jobs, so
    that a test may make ids up.
    """

    def __init__(self, clock: Clock) -> None:
        self.submissions: list[dict[str, Any]] = []  # what the app asked for, without the key
        self._time = clock
        self._answers: dict[str, Answers] = {}
        self._for_all: Answers | None = None
        self._copies: dict[str, Answers] = {}  # of those for all: each job goes through them by itself
        self._made_up: dict[str, float] = {}
        self._files: dict[str, bytes] = {}
        self._telling = threading.RLock()
        options = SandboxOptions(
            key=KEY, size=SMALLEST, min_outputs=1, max_outputs=1, min_seconds=READY_SECONDS, max_seconds=READY_SECONDS
        )
        super().__init__(options, clock=clock.timestamp)

    def answers(self, remote_id: str | int | None = None) -> Answers:
        """Begins anew what is answered about a job, or about every job that has no answers of its own.

        `fetch_api.answers(12202888).processing(2).success(pictures=4)`
        """
        made = Answers(self, self._time)
        with self._telling:
            if remote_id is None:
                self._for_all = made
                self._copies.clear()
            else:
                self._answers[str(remote_id)] = made
        return made

    def ready_after(self, seconds: float) -> None:
        """Jobs that are submitted from now on are ready after so many seconds of the test's clock."""
        self.options_now(min_seconds=seconds, max_seconds=seconds)

    def asked(self, remote_id: str | int) -> int:
        """How often the API was asked about a job."""
        return self.calls.fetches[str(remote_id)]

    def expect(self, waiting: Iterable[tuple[str, datetime]]) -> None:
        """Takes the ids that it never gave out for jobs of its own, submitted at these times."""
        with self._telling:
            for remote_id, submitted_at in waiting:
                if self.job(remote_id) is None:
                    ready_at = submitted_at.timestamp() + self.options.min_seconds
                    self._made_up.setdefault(remote_id, ready_at)

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answers a POST: as it was told to, or else as the stand-in does."""
        body = parse_body(content_type, raw) or {}
        target = fetch_target(path, body)
        if target is None:
            if "prompt" in body:
                self.submissions.append({name: value for name, value in body.items() if name != "key"})
            return super().posted(path, content_type, raw)
        told = self._told(target[1])
        if told is not None:
            self.script(target[1], [told])
        return super().posted(path, content_type, raw)

    def got(self, path: str, query: str) -> Answer:
        """Answers a GET: the pictures that answers named, or else as the stand-in does."""
        name = path.removeprefix(PICTURES)
        with self._telling:
            content = self._files.get(name)
        if content is not None:
            self.script(name, [Answer(200, {"Content-Type": "application/octet-stream"}, content)])
        return super().got(path, query)

    def ready(self, remote_id: str, pictures: int | Sequence[str | bytes]) -> Answer:
        """The answer about a job that is ready; what is no address of somebody else's is served here."""
        wanted: Sequence[str | bytes | None] = [None] * pictures if isinstance(pictures, int) else pictures
        output = [self._address(remote_id, index, picture) for index, picture in enumerate(wanted)]
        return json_answer({"status": "success", "id": _as_said(remote_id), "output": output})

    def _address(self, remote_id: str, index: int, picture: str | bytes | None) -> str:
        if isinstance(picture, str):
            return picture
        name = picture_name(-1, remote_id, index)
        content = draw("a picture", remote_id, index, SMALLEST) if picture is None else picture
        with self._telling:
            self._files[name] = content
        return f"{self.root_url}{PICTURES}{name}"

    def _told(self, remote_id: str) -> Answer | None:
        with self._telling:
            wanted = self._answers.get(remote_id) or self._copies.get(remote_id)
            if wanted is None and self._for_all is not None:
                wanted = self._copies[remote_id] = self._for_all.copy()
            found = None if wanted is None else wanted.next(remote_id)
            if found is None and self.job(remote_id) is None and remote_id in self._made_up:
                found = self._as_one_of_ours(remote_id)
            return found

    def _as_one_of_ours(self, remote_id: str) -> Answer:
        if self._time.timestamp() < self._made_up[remote_id]:
            return json_answer({"status": "processing", "message": "try again later.", "output": ""})
        return self.ready(remote_id, self.options.min_outputs)


def _as_said(remote_id: str) -> int | str:
    """Ids are numbers in the API's own answers, where they can be."""
    return int(remote_id) if remote_id.isascii() and remote_id.isdigit() and remote_id[0] != "0" else remote_id
