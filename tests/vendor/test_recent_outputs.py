"""The API's list of recent outputs: where it is asked for, and the forms in which it is read."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vendor.test_replies import ANY_JSON, CODES, HEADERS
from worker.core.identity import REMOTE_ID
from worker.core.json_size import MAX_VALUES
from worker.errors import RefusedAddress
from worker.vendor.families import family_of_order
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi
from worker.vendor.recent_outputs import (
    LIST_FIELDS,
    LIST_PATHS,
    ListPage,
    ListRefused,
    ListReply,
    ListRequest,
    NoSuchList,
    RecentOutput,
    list_fields,
    list_url,
    output_type_of,
    read_recent_outputs,
)

API = AllowedApi("https://modelslab.com/api/v6", VENDOR_HOSTS)
REQUEST = ListRequest("https://modelslab.com", LIST_PATHS[0], "image")
NOW = 1_700_000_000.0
A, B = "https://h/a.png", "https://h/b.png"
TIME = datetime(2026, 5, 1, 10, tzinfo=UTC)
PAGE = "<!DOCTYPE html><html><head><title>{}</title></head></html>"


def read(body: object, status: int = 200, page: int = 1, headers: Mapping[str, str] | None = None) -> ListReply:
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return read_recent_outputs(status, headers or {}, raw, REQUEST._replace(page=page), now=NOW)


def listed(body: object) -> dict[str, tuple[str, ...]]:
    """Return the URLs of the outputs by remote id."""
    reply = read(body)
    assert isinstance(reply, ListPage)
    return {output.remote_id: output.urls for output in reply.outputs}


# ── the request ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_an_allowed_host_then_each_documented_path_is_below_api() -> None:
    urls = [list_url(REQUEST._replace(path=path), API) for path in LIST_PATHS]

    assert urls == ["https://modelslab.com/api/v6/assets_generated", "https://modelslab.com/api/assets_generated"]


@pytest.mark.parametrize("site", ["https://evil.test", "http://modelslab.com", "https://modelslab.com@evil.test", "x"])
def test_given_another_host_or_plain_http_then_the_key_is_not_sent_there(site: str) -> None:
    with pytest.raises(RefusedAddress):
        list_url(REQUEST._replace(site=site), API)


def test_given_the_first_page_then_only_the_documented_fields_are_sent() -> None:
    assert list_fields(REQUEST) == {"type": "image"}
    assert list_fields(REQUEST._replace(page=3)) == {"type": "image", "page": 3}


@pytest.mark.parametrize(
    ("order", "kind", "output_type"),
    [
        ("v6/images/text2img", "video of a customer", "image"),
        ("v6/video/text2video", "video", "video"),
        ("v6/voice/text_to_audio", "voice", "audio"),
        ("v6/voice/speech_to_text", "whisper", None),
        ("v6/3d/text_to_3d", "3d", None),
        ("v3/fine_tune", "training", None),
        ("v6/deepfake/single_video_swap", "deepfake", "video"),
        ("v1/enterprise/ultra_video/text2video", "own name", "video"),
        ("v7/voice/text-to-speech", "own name", "audio"),
        ("v1/workflows/7/run", "my music", "audio"),
        ("v6/faceswap/single_face_swap", "faceswap", "image"),
    ],
)
def test_given_an_order_then_its_family_decides_the_type_and_its_kind_if_the_family_is_open(
    order: str, kind: str, output_type: str | None
) -> None:
    family = family_of_order(order)
    assert family is not None

    assert output_type_of(family, kind) == output_type


# ── lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


ENTRY = {"id": 7, "output": [A]}


@pytest.mark.parametrize("name", LIST_FIELDS)
def test_given_a_list_in_any_field_then_it_is_read(name: str) -> None:
    assert listed({"status": "success", name: [ENTRY]}) == {"7": (A,)}


@pytest.mark.parametrize(
    "body",
    [
        [ENTRY],
        {"data": {"current_page": 1, "data": [ENTRY]}},
        {"data": {"0": ENTRY, "2": {"id": 7}}},
        {"success": True, "result": {"assets": [ENTRY]}},
        {"message": "Assets fetched", "data": [ENTRY]},
        {"status": "success", "message": "Invalid API key", "data": [ENTRY]},
        b"\xef\xbb\xbf" + json.dumps([ENTRY]).encode(),
        {
            "data": [
                ENTRY,
                None,
                7,
                "text",
                [],
                {},
                {"output": [B]},
                {"id": None},
                {"id": "../x"},
                {"id": 0},
                {"id": True},
            ]
        },
    ],
)
def test_given_a_list_in_another_form_then_it_is_read(body: object) -> None:
    assert listed(body) == {"7": (A,)}


@pytest.mark.parametrize(
    ("entry", "remote_id"),
    [
        ({"id": "12-ab"}, "12-ab"),
        ({"id": 12202888}, "12202888"),
        ({"id": "", "request_id": 9}, "9"),
        ({"id": 0, "job_id": "j"}, "j"),
    ],
)
def test_given_an_id_as_number_or_text_then_it_is_read_as_text(entry: dict[str, Any], remote_id: str) -> None:
    assert list(listed([entry])) == [remote_id]


@pytest.mark.parametrize(
    "output",
    [[A, B], f"{A},{B}", json.dumps([A, B]), {"first": A, "second": B}, [{"url": A}, {"url": B}]],
)
def test_given_outputs_as_list_text_or_object_then_all_urls_are_read(output: object) -> None:
    assert listed([{"id": 7, "output": output}]) == {"7": (A, B)}


def test_given_one_entry_for_each_output_then_those_with_the_same_id_are_one_job() -> None:
    assert listed([{"id": 7, "url": A}, {"id": "7", "url": B}, {"id": 7, "url": A}]) == {"7": (A, B)}


def test_given_a_list_without_entries_then_it_is_empty() -> None:
    bodies: list[object] = [[], {"data": []}, {"status": "success", "data": []}, {"message": "Nothing yet", "data": []}]
    for body in bodies:
        assert read(body) == ListPage(())


@pytest.mark.parametrize(
    ("created", "moment"),
    [
        ("2026-05-01T10:00:00.000000Z", TIME),
        ("2026-05-01 10:00:00", TIME),
        ("2026-05-01T12:00:00+02:00", TIME),
        (1777629600, TIME),
        ("1777629600", TIME),
        (1777629600000, TIME),
        (3.2, None),
        ("yesterday", None),
        ("0001-01-01T00:00:00+14:00", None),
        (10**400, None),
        (None, None),
        ([TIME.isoformat()], None),
        ("2026-05-01" * 1_000, None),
    ],
)
def test_given_a_time_then_it_is_read_as_utc_or_left_out(created: object, moment: datetime | None) -> None:
    assert read([{"id": 7, "created_at": created}]) == ListPage((RecentOutput("7", (), moment),))


@pytest.mark.parametrize(
    ("paging", "page", "is_last"),
    [
        ({}, 1, False),
        ({"last_page": 2}, 1, False),
        ({"last_page": 2}, 2, True),
        ({"meta": {"last_page": "1"}}, 1, True),
        ({"pagination": {"total_pages": 3}}, 2, False),
        ({"next_page_url": None}, 1, True),
        ({"next_page_url": "https://h/?page=2"}, 1, False),
        ({"has_more": False}, 1, True),
        ({"last_page": "many"}, 1, False),
    ],
)
def test_given_pages_then_the_last_one_is_recognised(paging: dict[str, object], page: int, is_last: bool) -> None:
    reply = read({"status": "success", "data": [ENTRY], **paging}, page=page)

    assert isinstance(reply, ListPage)
    assert reply.is_last is is_last


# ── no list ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, PAGE.format("Not Found")),
        (405, PAGE.format("Method Not Allowed")),
        (404, ""),
        (404, "Not Found"),
        (404, {"message": "The route api/v6/assets_generated could not be found."}),
        (405, {"message": "The POST method is not supported for this route."}),
        (200, PAGE.format("Welcome")),
    ],
)
def test_given_a_path_that_does_not_exist_then_there_is_no_list(status: int, body: object) -> None:
    assert isinstance(read(body, status), NoSuchList)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, {"status": "error", "message": "Invalid Api Key"}, "Invalid Api Key"),
        (401, {"message": "Unauthenticated."}, "Unauthenticated."),
        (200, {"status": "error", "message": "Invalid Api Key", "data": [ENTRY]}, "Invalid Api Key"),
        (200, {"message": "Invalid Api Key", "data": []}, "Invalid Api Key"),
        (429, {"message": "Too Many Attempts."}, "Too Many Attempts."),
        (200, {"status": "failed", "messege": "Try Again"}, "Try Again"),
        (422, {"message": "The selected type is invalid."}, "The selected type is invalid."),
        (404, {"status": "error", "message": "No user with this plan"}, "No user with this plan"),
        (403, PAGE.format("Just a moment..."), "HTTP 403 with an HTML page"),
        (502, PAGE.format("Bad Gateway"), "HTTP 502 with an HTML page"),
        (302, "", "HTTP 302: the API redirects"),
        (500, [ENTRY], "HTTP 500"),
        (200, {"status": "success"}, "an answer without a list: status=success"),
        (200, {"status": "processing", "message": "try again later"}, "an answer without a list (try again later)"),
        (200, {"status": "success", "id": 7, "links": [A]}, "an answer without a list"),
        (200, [A, B], "a list without ids: no JSON object: [text]"),
        (200, {"data": [{"output": [A]}]}, "a list without ids: data: [{output: [text]}]"),
        (200, "", "no JSON object"),
        (200, "[" * 50_000, "no JSON object"),
        (200, "[" + "{}," * MAX_VALUES + "{}]", f"JSON of more than {MAX_VALUES:,} values"),
        (200, b"\xff\xfe\x00", "no JSON object"),
        (200, "null", "no JSON object"),
        (200, {"data": {"data": {"data": {"data": {"data": [ENTRY]}}}}}, "an answer without a list"),
    ],
)  # fmt: skip
def test_given_no_list_then_the_refusal_has_the_words_of_the_api(status: int, body: object, words: str) -> None:
    reply = read(body, status)

    assert isinstance(reply, ListRefused)
    assert words in reply.message
    assert len(reply.message) < 1_000


def test_given_a_long_list_then_reading_takes_time_in_proportion() -> None:
    body = json.dumps([{"id": 7, "url": f"https://h/{number}.png"} for number in range(20_000)])
    started = time.process_time()

    assert len(listed(body)["7"]) == 20_000
    assert time.process_time() - started < 10


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["status", "message", "data", "assets", "id", "output", "meta"]), ANY_JSON)
    | ANY_JSON,
    CODES,
    HEADERS,
)
def test_given_any_answer_then_it_is_read_without_an_error(body: object, status: int, headers: dict[str, str]) -> None:
    reply = read(json.dumps(body), status, headers=headers)

    if isinstance(reply, ListPage):
        assert all(REMOTE_ID.fullmatch(output.remote_id) for output in reply.outputs)
    else:
        assert isinstance(reply.message, str)
