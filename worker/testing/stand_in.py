"""Stand-in of the hosted API for tests. A test decides what each job answers, and when."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Self

from worker.sandbox.answers import Answer, json_answer
from worker.sandbox.behaviour import DEFAULT_ORDER
from worker.sandbox.families import Target
from worker.sandbox.files import file_name
from worker.sandbox.options import SandboxOptions
from worker.sandbox.pictures import MIN_SIZE, draw
from worker.sandbox.scenarios import SCENARIOS, Scenario, ScenarioName, check_scenario
from worker.sandbox.server import Sandbox
from worker.testing.clock import Clock

KEY = "key-of-the-stand-in"
READY_SECONDS = 5.0
PICTURES = "/generations/"


@dataclass(slots=True)
class _Step:
    """One answer. It is given `times` times, or until a moment if `times` is None. The last step repeats forever."""

    answer: Callable[[str], Answer]
    times: int | None = 1
    until: float = 0.0

    def over(self, now: float) -> bool:
        """Return whether the next step takes over."""
        return now >= self.until if self.times is None else self.times < 1


class Answers:
    """The answers that the stand-in gives about a job, in order. The last answer repeats forever."""

    def __init__(self, api: "FetchApi", clock: Clock) -> None:
        self._api = api
        self._clock = clock
        self._steps: list[_Step] = []

    def processing(self, times: int = 1, *, eta: float | None = None) -> Self:
        """Answer that the job is not ready, this many times."""
        fields = {} if eta is None else {"eta": eta}
        return self.body({"status": "processing", "message": "try again later.", "output": "", **fields}, times=times)

    def processing_for(self, seconds: float) -> Self:
        """Answer that the job is not ready, for this many seconds from now."""
        body = {"status": "processing", "message": "try again later.", "output": ""}
        until = self._clock.timestamp() + seconds
        return self._add(_Step(lambda _: json_answer(body), times=None, until=until))

    def success(self, pictures: int | Sequence[str | bytes] = 1) -> Self:
        """Answer that the job is ready, with some pictures, or with given URLs or bytes that the stand-in serves."""
        return self._add(_Step(lambda remote_id: self._api.ready(remote_id, pictures)))

    def failed(self, message: str = "Processing failed: Invalid input dimensions", *, times: int = 1) -> Self:
        """Answer that the job failed."""
        return self.body({"status": "failed", "id": "", "message": message, "output": ""}, times=times)

    def not_found(self, *, times: int = 1) -> Self:
        """Answer that the API does not know the job."""
        return self.failed("Request not found", times=times)

    def error(self, message: str = "Something went wrong", *, times: int = 1) -> Self:
        """Answer with an error about the job."""
        return self.body({"status": "error", "message": message}, times=times)

    def rate_limited(self, seconds: int = 30, *, times: int = 1) -> Self:
        """Answer that there were too many requests. The account has to pause."""
        body = {"status": "error", "message": "Rate limit exceeded", "retry_after": seconds}
        return self.body(body, status=429, times=times)

    def key_rejected(self, *, times: int = 1) -> Self:
        """Answer that the key is not accepted. The account is held."""
        return self.body({"status": "error", "message": "Invalid Api Key"}, times=times)

    def no_credits(self, *, times: int = 1) -> Self:
        """Answer that the account has no credits. The account is held."""
        return self.body({"status": "error", "message": "Insufficient credits"}, status=402, times=times)

    def unavailable(self, *, times: int = 1) -> Self:
        """Answer that the API is down."""
        return self.body({"status": "error", "message": "Service temporarily unavailable."}, status=503, times=times)

    def body(self, content: Mapping[str, Any] | bytes, *, status: int = 200, times: int = 1) -> Self:
        """Answer with any JSON object, or with bytes that are sent unchanged."""
        if isinstance(content, bytes):
            fixed = Answer(status, {"Content-Type": "application/json"}, content)
        else:
            fixed = json_answer(content, status=status)
        return self._add(_Step(lambda _: fixed, times=times))

    def _add(self, step: _Step) -> Self:
        if step.times is not None and step.times < 1:
            raise ValueError(f"an answer is given at least once, not {step.times} times")
        self._steps.append(step)
        return self

    def copy(self) -> "Answers":
        """Return the same answers from the start."""
        answers = Answers(self._api, self._clock)
        answers._steps = [replace(step) for step in self._steps]
        return answers

    def next(self, remote_id: str) -> Answer | None:
        """Return the next answer, or None if no answers were set."""
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
    """Stand-in of the hosted API that runs on the test clock.

    A job submitted here, by the app or by `submit`, is ready after `READY_SECONDS` of the test clock, unless
    `ready_after`, `play` or `answers` says otherwise. Tests may make up ids: an id that the stand-in never issued is
    treated as one of its jobs, of the family whose fetch path is requested.

    Every family of the API is supported. Post a submission to `root_url` + `/api/` + its path, or use `submit`:
    pictures at `v3/text2img`, `v3/dreambooth`, `v6/images/text2img`, `v6/realtime/…`, `v6/interior/…`, `v7/images/…`;
    videos at `v6/video/text2video`, `v7/video-fusion/…`; sound at `v6/voice/…`; texts at `v6/voice/speech_to_text`;
    models at `v6/3d/…`; chats at `v6/llm/…`; trainings at `v3/fine_tune`; servers at `v1/enterprise/{server}/…`;
    workflows at `v1/workflows/{name}/run`. `fetch-worker sandbox --help` lists all paths and all scenarios.

    Webhooks named in submissions are not called, because they may belong to a real server. If your test runs the
    receiver itself, on this machine, set `calls_webhooks` to True before submitting.
    """

    def __init__(self, clock: Clock) -> None:
        self.submissions: list[dict[str, Any]] = []  # bodies that the app submitted, without the key
        self._time = clock
        self._answers: dict[str, Answers] = {}
        self._for_all: Answers | None = None
        self._copies: dict[str, Answers] = {}  # copies of `_for_all`: each job goes through them separately
        self._made_up: dict[str, float] = {}  # ids made up by the test -> submission time
        self._plays: dict[str, str] = {}  # scenarios by made-up id
        self._files: dict[str, bytes] = {}
        options = SandboxOptions(
            key=KEY, size=MIN_SIZE, min_outputs=1, max_outputs=1, min_seconds=READY_SECONDS, max_seconds=READY_SECONDS
        )
        super().__init__(options, clock=clock.timestamp)
        self.calls_webhooks = False

    def answers(self, remote_id: str | int | None = None) -> Answers:
        """Start a new list of answers for one job, or for every job that has no list of its own.

        `fetch_api.answers(12202888).processing(2).success(pictures=4)`
        """
        answers = Answers(self, self._time)
        with self._lock:
            if remote_id is None:
                self._for_all = answers
                self._copies.clear()
            else:
                self._answers[str(remote_id)] = answers
        return answers

    def submit(
        self,
        prompt: str = "a picture",
        *,
        samples: int | None = None,
        family: str = DEFAULT_ORDER,
        scenario: ScenarioName | Literal[""] = "",
        **fields: object,
    ) -> dict[str, Any]:
        """Submit a job without HTTP and return the API's answer. Pass the answer to `track`.

        `family` is the path below `/api/` to submit to (see the class for a list). `scenario` is what goes wrong with
        this job (see `play`). `fields` are further fields of the submission, such as `webhook`. Raises ValueError for
        an unknown path or scenario.

        `worker.track(fetch_api.submit(family="v6/video/text2video"), endpoint="v6/video/text2video")`
        """
        return super().submit(prompt, samples=samples, family=family, scenario=scenario, **fields)

    def play(self, *scenarios: ScenarioName, remote_id: str | int | None = None) -> None:
        """Use these scenarios in turn for new submissions, or one for a made-up id. Without arguments, stop using any.

        The most useful: `failed`, `try-again` (failed with the message Try Again, then ready), `forgotten` (Request not
        found, but its future links work), `empty` (three successes without an output), `only-future-links`, `new-words`
        (status done, links under assets), `late-links`, `dead-links` (only proxy_links work), `gone`, `busy`, `down`,
        `rate-limit`. For every call with a key: `monthly-limit`, `no-credits`, `wrong-key`. For submissions:
        `queue-full`, `refused-order`, and `lost-closed`, `lost-silent`, `lost-cut`, `lost-502`, `lost-504`, which take
        the submission and lose the answer. `fetch-worker sandbox --help` lists all of them. Raises ValueError for an
        unknown scenario.
        """
        if remote_id is None:
            self.options_now(scenarios=scenarios)
            return
        for name in scenarios:
            check_scenario(name)
        if len(scenarios) > 1 or self.job(remote_id) is not None:
            raise ValueError("remote_id takes one scenario, and an id that the stand-in did not issue")
        with self._lock:
            self._plays[str(remote_id)] = scenarios[0] if scenarios else ""

    def ready_after(self, seconds: float) -> None:
        """Make jobs that are submitted from now on ready after this many seconds of the test clock."""
        self.options_now(min_seconds=seconds, max_seconds=seconds)

    def loses_the_answer(self, times: int = 1) -> None:
        """Take this many of the next submissions, and close their connections without an answer.

        They are charged and their jobs exist, but the app never learns their ids. A submission that is refused, for
        example because the queue is full, does not count. Raises ValueError if `times` is less than 1.
        """
        self._next(SCENARIOS["lost-closed"], times)

    def refuses(self, message: str, *, status: int = 400, times: int = 1) -> None:
        """Refuse this many of the next submissions with an error and an HTTP status. Nothing is charged.

        Raises ValueError if `times` is less than 1.
        """
        refusal = json_answer({"status": "error", "message": message}, status=status)
        self._next(Scenario("refused by the test", order=lambda: refusal), times)

    @property
    def charged(self) -> int:
        """How many submissions were taken, also those whose answer was lost. Ids made up by the test don't count."""
        return self.charges.charged

    @property
    def last_id(self) -> str:
        """The id of the last job that was taken, also if its answer was lost. Raises LookupError if there is none."""
        job = self.newest_job()
        if job is None:
            raise LookupError("the stand-in has taken no order")
        return job.id

    def asked(self, remote_id: str | int) -> int:
        """Return how often the API was asked about a job."""
        return self.calls.fetches[str(remote_id)]

    def expect(self, jobs: Iterable[tuple[str, datetime]]) -> None:
        """Accept ids that the stand-in never issued as jobs that were submitted at these times."""
        with self._lock:
            for remote_id, submitted_at in jobs:
                if self.job(remote_id) is None:
                    self._made_up.setdefault(remote_id, submitted_at.timestamp())

    def ready(self, remote_id: str, pictures: int | Sequence[str | bytes]) -> Answer:
        """Return the answer about a ready job. Pictures that are not given as URLs are served here."""
        items: Sequence[str | bytes | None] = [None] * pictures if isinstance(pictures, int) else pictures
        output = [self._address(remote_id, index, picture) for index, picture in enumerate(items)]
        return json_answer({"status": "success", "id": _json_id(remote_id), "output": output})

    def _address(self, remote_id: str, index: int, picture: str | bytes | None) -> str:
        if isinstance(picture, str):
            return picture
        name = file_name("answers", remote_id, index=index, extension="png")
        content = draw("a picture", remote_id, index, MIN_SIZE) if picture is None else picture
        with self._lock:
            self._files[name] = content
        return f"{self.root_url}{PICTURES}{name}"

    def _next(self, scenario: Scenario, times: int) -> None:
        if times < 1:
            raise ValueError(f"at least one submission is affected, not {times}")
        self.next_orders(scenario, times)

    def _count_order(self, body: Mapping[str, Any]) -> None:
        self.submissions.append({name: value for name, value in body.items() if name != "key"})

    def _scripted_fetch(self, target: Target) -> Answer | None:
        """Return the next answer that the test set for a job. Without one, adopt an id that the test made up."""
        answers = self._answers.get(target.id) or self._copies.get(target.id)
        if answers is None and self._for_all is not None:
            answers = self._copies[target.id] = self._for_all.copy()
        answer = super()._scripted_fetch(target) or (None if answers is None else answers.next(target.id))
        submitted_at = self._made_up.get(target.id)
        if answer is None and submitted_at is not None and self.job(target.id) is None:
            self.adopt(target, submitted_at=submitted_at, scenario=self._plays.get(target.id, ""))
        return answer

    def _scripted(self, target: str) -> Answer | None:
        content = self._files.get(target)
        if content is not None:
            return Answer(200, {"Content-Type": "application/octet-stream"}, content)
        return super()._scripted(target)


def _json_id(remote_id: str) -> int | str:
    """Return the id as the API's own answers have it: a number where possible."""
    return int(remote_id) if remote_id.isascii() and remote_id.isdigit() and remote_id[0] != "0" else remote_id
