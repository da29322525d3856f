"""Where an order may be posted: the key goes only to the API's own hosts, and only with an order."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import NotTrackable, RefusedAddress
from worker.vendor.fetch_url import MAX_ADDRESS, AllowedApi
from worker.vendor.order_endpoint import order_target

API = AllowedApi("https://modelslab.com/api/v6", frozenset({"modelslab.com", "stablediffusionapi.com"}))
LOCAL = AllowedApi("http://127.0.0.1:8000/api/v3", frozenset({"127.0.0.1:8000", "[::1]:9000"}))
NEW, OLD = "https://modelslab.com/api/", "https://stablediffusionapi.com/api/"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("v6/images/text2img", NEW + "v6/images/text2img"),
        ("/api/v6/images/text2img", NEW + "v6/images/text2img"),
        ("api/v6/images/text2img", NEW + "v6/images/text2img"),
        (" v6/images/text2img/ \n", NEW + "v6/images/text2img"),
        ("//api//v6///images/text2img", NEW + "v6/images/text2img"),
        ("API/V6/Images/TEXT2IMG", NEW + "v6/images/text2img"),
        ("https://modelslab.com/api/v6/images/text2img", NEW + "v6/images/text2img"),
        ("HTTPS://ModelsLab.com:443/api/v6/images/text2img", NEW + "v6/images/text2img"),
        ("modelslab.com/api/v6/images/text2img", NEW + "v6/images/text2img"),
        ("https://stablediffusionapi.com/api/v3/text2img", OLD + "v3/text2img"),
        ("stablediffusionapi.com/api/v3/dreambooth", OLD + "v3/dreambooth"),
        ("v6/images/text2img.v2", NEW + "v6/images/text2img.v2"),
        ("v7/images/text-to-image", NEW + "v7/images/text-to-image"),
        ("v1/enterprise/flux/text2img", NEW + "v1/enterprise/flux/text2img"),
        ("v3/lora_fine_tune", NEW + "v3/lora_fine_tune"),
        ("v6/voice/speech_to_text", NEW + "v6/voice/speech_to_text"),
        ("V1/Workflows/Up-Scale/Run", NEW + "v1/workflows/Up-Scale/Run"),
        ("v1/workflows/delete-background/run", NEW + "v1/workflows/delete-background/run"),
        ("v1/workflows/fetch/run", NEW + "v1/workflows/fetch/run"),
    ],
)
def test_an_order_is_posted_to_its_path_however_the_app_writes_it(endpoint: str, url: str) -> None:
    target = order_target(endpoint, API)

    assert target.url == url
    assert f"https://{target.host}/api/{target.path}" == url


def test_the_target_knows_where_the_job_is_fetched() -> None:
    target = order_target("https://stablediffusionapi.com/api/v6/video/text2video", API)

    assert target.order.family.media == "video"
    assert target.order.fetch_url("7") == OLD + "v6/video/fetch/7"


@pytest.mark.parametrize(
    ("endpoint", "url", "host"),
    [
        ("v3/text2img", "http://127.0.0.1:8000/api/v3/text2img", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000/api/v3/text2img", "http://127.0.0.1:8000/api/v3/text2img", "127.0.0.1:8000"),
        ("127.0.0.1:8000/api/v3/text2img", "http://127.0.0.1:8000/api/v3/text2img", "127.0.0.1:8000"),
        ("http://[::1]:9000/api/v3/text2img", "http://[::1]:9000/api/v3/text2img", "[::1]:9000"),
    ],
)
def test_plain_http_is_allowed_on_loopback_only(endpoint: str, url: str, host: str) -> None:
    target = order_target(endpoint, LOCAL)

    assert (target.url, target.host) == (url, host)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://modelslab.com/api/v6/images/text2img",
        "https://evil.example/api/v6/images/text2img",
        "https://modelslab.com:8443/api/v6/images/text2img",
        "https://modelslab.com.evil.example/api/v6/images/text2img",
        "https://modelslab.com@evil.example/api/v6/images/text2img",
        "https://user:secret@modelslab.com/api/v6/images/text2img",
        "https://modelslab.com/api/v6/images/text2img?key=secret",
        "v6/images/text2img?key=secret",
        "v6/images/text2img?",
        "v6/images/text2img#top",
        "v6/images/%2e%2e/text2img",
        "v6\\images\\text2img",
        "v6/images/text 2img",
        "v6/images/text\n2img",
        "v6/imäges/text2img",
        "v6/images/" + "a" * MAX_ADDRESS,
    ],
)
def test_the_key_is_not_sent_to_another_host_or_with_more_than_a_path(endpoint: str) -> None:
    with pytest.raises(RefusedAddress) as refused:
        order_target(endpoint, API)

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            "v6/images/../text2img",
            "v6/./images/text2img",
            "../v6/images",
            "https://modelslab.com/api/v6/../v3/text2img",
        ),
        *("", " ", "/", "images/text2img", "v6", "https://modelslab.com/", "https://", "ftp://modelslab.com/api/v6/x"),
        *("text2img", "wallet_balance", None, 7, b"v6/images/text2img", ["v6/images/text2img"]),
    ],
)
def test_what_is_no_path_of_the_api_is_refused(endpoint: object) -> None:
    with pytest.raises(NotTrackable, match="endpoint"):
        order_target(endpoint, API)


@pytest.mark.parametrize(
    "endpoint",
    [
        *(
            "v3/fetch",
            "v3/fetch/7",
            "v3/dreambooth/fetch/7",
            "v4/dreambooth/fetch",
            "v6/images/fetch",
            "V6/Images/Fetch/7",
        ),
        *("v6/video/fetch/7", "v7/video-fusion/fetch/7", "v1/enterprise/fetch", "v1/enterprise/flux/fetch/a35-88"),
        *("v3/fine_tune_status/F5", "v3/fine_tune_status", "v6/llm/get_queued_response"),
        "https://modelslab.com/api/v6/images/fetch/7",
    ],
)
def test_a_fetch_path_is_no_endpoint_and_the_error_says_what_to_write(endpoint: str) -> None:
    with pytest.raises(NotTrackable, match=r"fetches a job.*v6/images/text2img.*call track"):
        order_target(endpoint, API)


def test_a_workflow_run_that_is_fetched_is_no_endpoint() -> None:
    with pytest.raises(NotTrackable, match=r"v1/workflows/ID/run"):
        order_target("v1/workflows/w-1/runs/12345", API)


@pytest.mark.parametrize(
    "endpoint",
    [
        *("v1/enterprise/flux/clear_queue", "v1/enterprise/clear_queue", "v1/enterprise/Flux/Clear_Queue"),
        *("v1/enterprise/flux/clear-queue", "v3/cancle_training/F5", "v3/cancel_training/F5", "v3/cancel_training"),
        *("v3/system_load", "v1/enterprise/flux/system_details", "v6/processing/request_count", "v6/wallet_balance"),
        *("v6/assets_generated", "v3/delete_image", "v6/delete_lora/7", "v1/enterprise/flux/delete"),
    ],
)
def test_a_call_that_creates_no_job_is_refused(endpoint: str) -> None:
    with pytest.raises(NotTrackable, match=r"creates no job.*v6/images/text2img"):
        order_target(endpoint, API)


PLAIN_URL = re.compile(
    r"https://(?:modelslab|stablediffusionapi)\.com/api/v[0-9]{1,3}(?:/[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*)+"
)
PIECES = ["https://", "http://", "modelslab.com", "evil.example", "api", "v6", "images", "text2img", "..", "//", "/"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "?", "#", "@", "%2e", ":", "\\", "[", "]", "\n"]) | st.text(max_size=3)))
def test_any_text_is_refused_or_gives_a_plain_url_of_an_allowed_host(pieces: list[str]) -> None:
    try:
        target = order_target("".join(pieces), API)
    except NotTrackable:
        return
    assert PLAIN_URL.fullmatch(target.url), target.url
