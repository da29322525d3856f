"""`fetch-worker compare-api`: compare the shape of answers of the API and of the stand-in. It submits no order."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import click
from pydantic import SecretStr

from worker.cli.output import json_option, print_json, print_table
from worker.core.answer_names import ANSWER_NAMES
from worker.core.identity import FetchAddress, checked_remote_id
from worker.errors import NotTrackable, Unavailable
from worker.polling.api_client import ApiClient
from worker.sandbox import Sandbox, SandboxOptions
from worker.settings import Settings, load
from worker.system.redaction import shared_scrubber
from worker.system.terminal import echo
from worker.vendor.families import is_training
from worker.vendor.fetch_url import AllowedApi, fetch_address, order_at
from worker.vendor.replies import Question, parse
from worker.vendor.shapes import shape_of
from worker.vendor.submissions import submission

UNKNOWN_ID = "9999999999999"  # far above every id that the API has assigned
WRONG_KEY = SecretStr("fetch-worker-compare-api-wrong-key")
DEFAULT_ORDER = "v3/text2img"


@dataclass(frozen=True, slots=True)
class ComparedRequest:
    """A request to both APIs. `finished` means that it is about a finished job, whose answer lists outputs."""

    name: str
    remote_id: str
    right_key: bool = True
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """The answers of the API and of the stand-in: how the worker classifies each of them, and its shape."""

    question: str
    api: str
    api_shape: str
    stand_in: str
    stand_in_shape: str
    same: bool


@click.command("compare-api")
@click.option("--job", "remote_id", help="The remote id of one of your finished jobs, to compare its answer too.")
@click.option("--endpoint", help="The URL or path that its order was posted to. Default: the API of SD_API_URL.")
@click.option("--account", default="default", show_default=True, help="The account whose key is used.")
@json_option
def compare_api(remote_id: str | None, endpoint: str | None, account: str, as_json: bool) -> int:
    """Compare answers of the API and of the stand-in.

    It sends two or three harmless requests. It polls an id that does not exist, once with the key of the account
    and once with a wrong key, and a finished job if you name one. It never submits an order. Without a key it only
    prints the requests. Exit code 1 if the API does not answer.
    """
    settings = load()
    questions = [
        ComparedRequest("an unknown id", UNKNOWN_ID),
        ComparedRequest("a wrong key", UNKNOWN_ID, right_key=False),
    ]
    try:
        if remote_id is not None:
            questions.append(ComparedRequest("a finished job", checked_remote_id(remote_id), finished=True))
        addresses = [_address(settings.api, question.remote_id, endpoint) for question in questions]
    except NotTrackable as error:
        raise click.UsageError(str(error)) from None
    key = settings.keys.get(account)
    if key is None:
        echo(
            f"account {account} has no key (SD_API_KEY, SD_API_KEYS, SD_API_KEYS_FILE), so no request is sent.",
            err=True,
        )
        for question, address in zip(questions, addresses, strict=True):
            echo(f"would request {question.name}: {address.url}", err=True)
        return 0
    try:
        compared = _compare(settings, questions, key, endpoint)
    except Unavailable as error:
        echo(f"fetch-worker: {settings.api.url}: {error}", err=True)
        return 1
    if as_json:
        print_json([asdict(row) for row in compared])
    else:
        _print(compared)
    return 0


def _address(api: AllowedApi, remote_id: str, endpoint: str | None) -> FetchAddress:
    url = None if endpoint is None else order_at(endpoint, api).fetch_url(remote_id)
    return fetch_address(url, remote_id, api)


@dataclass(frozen=True, slots=True)
class _Side:
    """The real API, or the stand-in."""

    api: AllowedApi
    client: ApiClient
    key: SecretStr
    status_words: Mapping[str, str]

    def ask(self, request: ComparedRequest, remote_id: str, endpoint: str | None) -> tuple[str, str]:
        """Return how the worker reads the answer to a request, and the shape of the answer."""
        address = _address(self.api, remote_id, endpoint)
        status, body = self.client.whole_answer(address, remote_id, self.key if request.right_key else WRONG_KEY)
        question = Question(remote_id, 0.0, is_training(address.base), self.status_words)
        return ANSWER_NAMES[type(parse(status, {}, body, question))].code, shape_of(status, body)


def _compare(
    settings: Settings, requests: Sequence[ComparedRequest], key: SecretStr, endpoint: str | None
) -> list[Compared]:
    scrubber, timeout, words = shared_scrubber(settings.secret_texts), settings.sd_api_timeout, settings.status_words
    client = ApiClient(
        settings.api,
        scrubber,
        timeout=timeout,
        connections=1,
        ca_bundle=settings.ca_bundle,
        proxy=settings.proxy,
        user_agent=settings.user_agent,
    )
    real = _Side(settings.api, client, key, words)
    path = _order_path(endpoint or DEFAULT_ORDER)
    compared = []
    with Sandbox(SandboxOptions(min_seconds=0, max_seconds=0)) as sandbox:
        api = AllowedApi(sandbox.url, frozenset({sandbox.url.split("/")[2]}))
        client = ApiClient(api, scrubber, timeout=timeout, connections=1)
        stand_in = _Side(api, client, SecretStr(sandbox.options.key), words)
        for request in requests:
            answer, shape = real.ask(request, request.remote_id, endpoint)
            own_id = _finished_in(sandbox, path) if request.finished else request.remote_id
            own_answer, own_shape = stand_in.ask(request, own_id, path)
            compared.append(Compared(request.name, answer, shape, own_answer, own_shape, shape == own_shape))
    return compared


def _order_path(endpoint: str) -> str:
    """Return the path of an endpoint below `/api/`."""
    return (endpoint.partition("/api/")[2] or endpoint).strip("/")


def _finished_in(sandbox: Sandbox, path: str) -> str:
    """Submit an order to the stand-in. Return the id of its job, which is ready at once."""
    try:
        answer = sandbox.submit("a lighthouse", family=path)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return submission(answer).remote_id


def _print(compared: Sequence[Compared]) -> None:
    rows = []
    for row in compared:
        rows.append((row.question, "real", row.api, row.api_shape))
        rows.append((row.question, "stand-in", row.stand_in, row.stand_in_shape))
    print_table(("request", "API", "read as", "shape of the answer"), rows, empty="")
    different = [row.question for row in compared if not row.same]
    echo(f"different shapes: {', '.join(different)}" if different else "the shapes are the same")
