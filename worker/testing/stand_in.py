"""The stand-in of the API as tests use it: each job answers as its test says, at the time that its test says it is."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Self

from worker.sandbox.answers import Answer, json_answer, parse_body
from worker.sandbox.behaviour import DEFAULT_ORDER, fetch_target
from worker.sandbox.families import Target, family_of
from worker.sandbox.files import file_name
from worker.sandbox.options import SandboxOptions
from worker.sandbox.pictures import SMALLEST, draw
from worker.sandbox.scenarios import ScenarioName, check_scenario
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
    `ready_after`, `play` or `answers` says otherwise. An id that the stand-in never gave out is taken for one of its
    jobs, of the family at whose fetch path it is asked about, so that a test may make ids up.

    Every family of the API is there. An order is posted to `root_url` + `/api/` + its path, or handed in by `submit`:
    pictures at `v3/text2img`, `v3/dreambooth`, `v6/images/text2img`, `v6/realtime/…`, `v6/interior/…`, `v7/images/…`;
    videos at `v6/video/text2video`, `v7/video-fusion/…`; sound at `v6/voice/…`; texts at `v6/voice/speech_to_text`;
    models at `v6/3d/…`; chats at `v6/llm/…`; trainings at `v3/fine_tune`; servers at `v1/enterprise/{server}/…`;
    workflows at `v1/workflows/{name}/run`. `fetch-worker sandbox --help` lists all paths, and all scenarios.

    Webhooks that orders name are not called: a server of yours may listen there. Where your test has its own on this
    machine, set `calls_webhooks` to True before the order.
    """

    def __init__(self, clock: Clock) -> None:
        self.submissions: list[dict[str, Any]] = []  # what the app asked for, without the key
        self._time = clock
        self._answers: dict[str, Answers] = {}
        self._for_all: Answers | None = None
        self._copies: dict[str, Answers] = {}  # of those for all: each job goes through them by itself
        self._made_up: dict[str, float] = {}  # when their jobs were submitted
        self._plays: dict[str, str] = {}  # scenarios by made-up id
        self._files: dict[str, bytes] = {}
        self._telling = threading.RLock()
        options = SandboxOptions(
            key=KEY, size=SMALLEST, min_outputs=1, max_outputs=1, min_seconds=READY_SECONDS, max_seconds=READY_SECONDS
        )
        super().__init__(options, clock=clock.timestamp)
        self.calls_webhooks = False

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

    def submit(
        self,
        prompt: str = "a picture",
        *,
        samples: int | None = None,
        family: str = DEFAULT_ORDER,
        scenario: ScenarioName | Literal[""] = "",
        **fields: object,
    ) -> dict[str, Any]:
        """Order without HTTP; the answer is the one that the app would have got. Hand it to `track`.

        `family` is the path below `/api/` that the order would be posted to (the class lists them), `scenario` what
        goes wrong with this job (`play` says which there are), `fields` what else would be in the order, such as
        `webhook`. Raises ValueError for a path or scenario that there is not.

        `worker.track(fetch_api.submit(family="v6/video/text2video"), endpoint="v6/video/text2video")`
        """
        return super().submit(prompt, samples=samples, family=family, scenario=scenario, **fields)

    def play(self, *scenarios: ScenarioName, remote_id: str | int | None = None) -> None:
        """Let orders from now on take these scenarios in turn, or the job of a made-up id take one; none ends it.

        The most useful: `failed`, `try-again` (failed with the words Try Again, then ready), `forgotten` (Request not
        found, though its future links work), `empty` (three successes without an output), `only-future-links`,
        `new-words` (status done, links under assets), `late-links`, `dead-links` (only proxy_links work), `gone`,
        `busy`, `down`, `rate-limit`; for every keyed call `monthly-limit`, `no-credits`, `wrong-key`; for orders
        `queue-full`, `refused-order`. `fetch-worker sandbox --help` has all of them. Raises ValueError.
        """
        if remote_id is None:
            self.options_now(scenarios=scenarios)
            return
        for name in scenarios:
            check_scenario(name)
        if len(scenarios) > 1 or self.job(remote_id) is not None:
            raise ValueError("remote_id is for one scenario, and for an id that the stand-in did not give out")
        with self._telling:
            self._plays[str(remote_id)] = scenarios[0] if scenarios else ""

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
                    self._made_up.setdefault(remote_id, submitted_at.timestamp())

    def posted(self, path: str, content_type: str, raw: bytes) -> Answer:
        """Answers a POST: as it was told to, or else as the stand-in does."""
        body = parse_body(content_type, raw) or {}
        target = fetch_target(path, body)
        if target is not None:
            self._prepare(target)
        elif family_of(path.removeprefix("/api/")) is not None:
            self.submissions.append({name: value for name, value in body.items() if name != "key"})
        return super().posted(path, content_type, raw)

    def got(self, path: str, query: str, raw: bytes = b"", key: str = "") -> Answer:
        """Answers a GET: the outputs that answers named, or else as the stand-in does."""
        target = fetch_target(path, {}, "GET")
        if target is not None:
            self._prepare(target)
        name = path.removeprefix(PICTURES)
        with self._telling:
            content = self._files.get(name)
        if content is not None:
            self.script(name, [Answer(200, {"Content-Type": "application/octet-stream"}, content)])
        return super().got(path, query, raw, key)

    def ready(self, remote_id: str, pictures: int | Sequence[str | bytes]) -> Answer:
        """The answer about a job that is ready; what is no address of somebody else's is served here."""
        wanted: Sequence[str | bytes | None] = [None] * pictures if isinstance(pictures, int) else pictures
        output = [self._address(remote_id, index, picture) for index, picture in enumerate(wanted)]
        return json_answer({"status": "success", "id": _as_said(remote_id), "output": output})

    def _address(self, remote_id: str, index: int, picture: str | bytes | None) -> str:
        if isinstance(picture, str):
            return picture
        name = file_name("answers", remote_id, index=index, extension="png")
        content = draw("a picture", remote_id, index, SMALLEST) if picture is None else picture
        with self._telling:
            self._files[name] = content
        return f"{self.root_url}{PICTURES}{name}"

    def _prepare(self, target: Target) -> None:
        """Have the stand-in answer the next fetch of a job as the test says; take in an id that the test made up."""
        with self._telling:
            answers = self._answers.get(target.id) or self._copies.get(target.id)
            if answers is None and self._for_all is not None:
                answers = self._copies[target.id] = self._for_all.copy()
            told = None if answers is None else answers.next(target.id)
            submitted_at = self._made_up.get(target.id)
        if told is not None:
            self.script(target.id, [told])
        elif submitted_at is not None and self.job(target.id) is None:
            self.adopt(target, submitted_at=submitted_at, scenario=self._plays.get(target.id, ""))


def _as_said(remote_id: str) -> int | str:
    """Ids are numbers in the API's own answers, where they can be."""
    return int(remote_id) if remote_id.isascii() and remote_id.isdigit() and remote_id[0] != "0" else remote_id
