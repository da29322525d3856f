"""Every recorded answer to a fetch or submit call is read as expected, and so are its variants."""

import json
import time

import pytest

from tests.vendor.recorded_fetches import FETCHES, Fetch
from tests.vendor.recorded_submits import SUBMITS, Submit
from worker.core.answer_names import ANSWER_NAMES
from worker.core.identity import READY
from worker.core.reply import (
    AccountRefused,
    ApiDown,
    ApiError,
    Empty,
    Failed,
    Processing,
    RateLimited,
    Ready,
    Reply,
)
from worker.errors import ApiRefused, NotTrackable
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi
from worker.vendor.replies import Question, parse
from worker.vendor.submissions import SubmitAnswer, planned_job

ID = "4711"
API = AllowedApi("https://modelslab.com/api/v6", VENDOR_HOSTS)


def describe(reply: Reply) -> str:
    """Return a reply in the notation of the tables."""
    name = ANSWER_NAMES[type(reply)].code
    match reply:
        case Ready(outputs):
            proxies = sum(len(link.proxies) for link in outputs)
            return f"ready:{len(outputs)}" + (f" proxies:{proxies}" if proxies else "")
        case Processing(eta, promised):
            return name + (f" eta:{eta:.6g}" if eta else "") + (f" promised:{len(promised)}" if promised else "")
        case Empty(promised):
            return name + (f" promised:{len(promised)}" if promised else "")
        case RateLimited(seconds):
            return f"{name} {seconds:g}"
        case AccountRefused(reason):
            return f"{name} {reason}"
        case Failed(may_recover=True):
            return f"{name} recoverable"
        case ApiError(vague=True):
            return f"{name} vague"
        case ApiDown(answered=True):
            return f"{name} answered"
    return name


def body_of(body: object) -> bytes:
    return (body if isinstance(body, str) else json.dumps(body)).replace("{ID}", ID).encode()


@pytest.mark.parametrize("row", FETCHES, ids=[row.name for row in FETCHES])
def test_recorded_fetch_answers_have_the_recorded_meaning(row: Fetch) -> None:
    reply = parse(row.status, row.headers, body_of(row.body), Question(ID, time.time(), row.training))

    assert describe(reply) == row.means, reply


def describe_job(row: Submit) -> str:
    """Return the result of an order in the notation of the table."""
    try:
        job = planned_job(SubmitAnswer(row.answer, row.status), API, endpoint=row.endpoint)
    except ApiRefused:
        return "refused"
    except NotTrackable:
        return "not_trackable"
    submitted = job.submission
    name = f"ready:{len(submitted.outputs)}" if submitted.outputs else "tracked"
    url = "-" if job.address.base.startswith(READY) else job.address.url.removeprefix("https://modelslab.com/api/")
    return f"{name} {submitted.remote_id.partition(':')[0]} at {url} ({job.kind})"


@pytest.mark.parametrize("row", SUBMITS, ids=[row.name for row in SUBMITS])
def test_recorded_submit_answers_give_the_recorded_job(row: Submit) -> None:
    assert describe_job(row) == row.means


def test_the_records_have_unique_names() -> None:
    assert len({row.name for row in FETCHES}) == len(FETCHES) >= 150
    assert len({row.name for row in SUBMITS}) == len(SUBMITS) >= 60
    assert {row.sure for row in FETCHES} == {row.sure for row in SUBMITS} == set("ABC")
