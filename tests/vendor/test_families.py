"""Every family: the order path determines the fetch path and the fetch style."""

import pytest

from worker.errors import NotTrackable, RefusedAddress
from worker.vendor import families
from worker.vendor.families import FAMILIES, ApiFamily, family_of_order
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, call_for, fetch_address, order_at, order_of_response

SITE = "https://modelslab.com"
API = AllowedApi(f"{SITE}/api/v6", VENDOR_HOSTS)
LOCAL = AllowedApi("http://127.0.0.1:8000/api/v6", frozenset({"127.0.0.1:8000"}))
ID = "298"
IN_PATH, IN_BODY = ("POST", None), ("POST", "request_id")

# the order path below /api/, the fetch path, and the fetch style
ORDERS: list[tuple[str, str, tuple[str, str | None]]] = [
    ("v3/fine_tune", "v3/fine_tune_status/298", IN_PATH),
    ("v3/lora_fine_tune", "v3/fine_tune_status/298", IN_PATH),
    ("v3/fine_tune_v2", "v3/fine_tune_status/298", IN_PATH),
    ("v5/lora_fine_tune", "v3/fine_tune_status/298", IN_PATH),
    ("v3/lora_fine_tune_v2", "v3/fine_tune_status/298", IN_PATH),
    ("v5/lora_fine_tune_v2/flux", "v3/fine_tune_status/298", IN_PATH),
    ("v3/fine_tune_status/F5", "v3/fine_tune_status/298", IN_PATH),
    ("v3/dreambooth", "v3/dreambooth/fetch/298", IN_PATH),
    ("v3/dreambooth/img2img", "v3/dreambooth/fetch/298", IN_PATH),
    ("v3/text2video", "v3/fetch/298", IN_PATH),
    ("v3/text2img", "v3/fetch/298", IN_PATH),
    ("v3/inpaint", "v3/fetch/298", IN_PATH),
    ("v4/dreambooth", "v4/dreambooth/fetch", IN_BODY),
    ("v4/dreambooth/inpaint", "v4/dreambooth/fetch", IN_BODY),
    ("v4/super_resolution", "v3/fetch/298", IN_PATH),
    ("v5/text2video", "v3/fetch/298", IN_PATH),
    ("v5/controlnet", "v3/fetch/298", IN_PATH),
    ("v5/interior", "v3/fetch/298", IN_PATH),
    ("v5/removebg_mask", "v3/fetch/298", IN_PATH),
    ("v6/images/text2img", "v6/images/fetch/298", IN_PATH),
    ("v6/realtime/img2img", "v6/realtime/fetch/298", IN_PATH),
    ("v6/image_editing/qwen_edit", "v6/image_editing/fetch/298", IN_PATH),
    ("v6/image_editing/fashion", "v6/image_editing/fetch/298", IN_PATH),
    ("v6/fashion", "v6/fashion/fetch/298", IN_PATH),
    ("v6/interior/floor_planning", "v6/interior/fetch/298", IN_PATH),
    ("v6/deepfake/single_face_swap", "v6/deepfake/fetch/298", IN_PATH),
    ("v6/faceswap/single_video_swap", "v6/faceswap/fetch/298", IN_PATH),
    ("v6/video/text2video_ultra", "v6/video/fetch/298", IN_PATH),
    ("v6/video/watermark_remover", "v6/video/fetch/298", IN_PATH),
    ("v6/voice/speech_to_text", "v6/whisper/fetch/298", IN_PATH),
    ("v6/voice/speech-to-text", "v6/whisper/fetch/298", IN_PATH),
    ("v6/whisper/transcribe", "v6/whisper/fetch/298", IN_PATH),
    ("v6/voice/music_gen", "v6/voice/fetch/298", IN_PATH),
    ("v6/3d/image_to_3d", "v6/3d/fetch/298", IN_PATH),
    ("v6/llm/uncensored_chat", "v6/llm/get_queued_response", ("POST", "chat_id")),
    ("v7/images/text-to-image", "v7/images/fetch/298", IN_PATH),
    ("v7/video-fusion/image-to-video", "v7/video-fusion/fetch/298", IN_PATH),
    ("v7/voice/sound-generation", "v7/voice/fetch/298", IN_PATH),
    ("v1/enterprise/text2img", "v1/enterprise/fetch", IN_BODY),
    ("v1/enterprise/speech_to_text", "v1/enterprise/speech_to_text/fetch/298", IN_PATH),
    ("v1/enterprise/speech_to_text/transcribe", "v1/enterprise/speech_to_text/fetch/298", IN_PATH),
    ("v1/enterprise/flux/text2img", "v1/enterprise/flux/fetch/298", IN_PATH),
    ("v1/enterprise/ultra_video/text2video", "v1/enterprise/ultra_video/fetch/298", IN_PATH),
    ("v1/enterprise/images/text2img", "v1/enterprise/images/fetch/298", IN_PATH),
    ("v1/workflows/uuid-string/run", "v1/workflows/uuid-string/runs/298", ("GET", None)),
    ("v8/holograms/make", "v8/holograms/fetch/298", IN_PATH),
    ("v8/make", "v8/fetch/298", IN_PATH),
]


@pytest.mark.parametrize(("order", "fetch", "call"), ORDERS, ids=[order for order, _, _ in ORDERS])
def test_the_order_path_determines_fetch_path_and_style(order: str, fetch: str, call: tuple[str, str | None]) -> None:
    url = order_at(order, API).fetch_url(ID)
    address = fetch_address(url, ID, API)

    assert url == f"{SITE}/api/{fetch}"
    assert call_for(address) == call


@pytest.mark.parametrize("row", FAMILIES, ids=[row.order for row in FAMILIES])
def test_every_family_row_is_needed(row: ApiFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is needed for one of the orders above; no other row gives the same result."""
    before = {order: family_of_order(order) for order, _, _ in ORDERS}
    remaining = [number for number, family in enumerate(FAMILIES) if family != row]
    monkeypatch.setattr(families, "FAMILIES", tuple(FAMILIES[number] for number in remaining))
    patterns = tuple(families._ORDERS[number] for number in remaining)
    monkeypatch.setattr(families, "_ORDERS", patterns)
    family_of_order.cache_clear()
    try:
        after = {order: family_of_order(order) for order, _, _ in ORDERS}
    finally:
        monkeypatch.undo()
        family_of_order.cache_clear()

    assert any(_without_name(before[order]) != _without_name(after[order]) for order in before)


def _without_name(family: ApiFamily | None) -> object:
    return None if family is None else family[1:]


@pytest.mark.parametrize(("order", "fetch", "call"), ORDERS, ids=[order for order, _, _ in ORDERS])
@pytest.mark.parametrize(
    "spelling",
    [
        "{}/",
        "/{}",
        "api/{}",
        "/api/{}",
        "//api//{}//",
        " {}\n",
        "{}?model_id=x&a=b#c",
        "https://modelslab.com/api/{}",
        "https://modelslab.com:443/api/{}/",
        "https://ModelsLab.com/api/{}?x=1#y",
        "modelslab.com/api/{}",
        "HTTPS://modelslab.com/api/{}",
    ],
)
def test_an_endpoint_may_be_a_path_or_a_url(
    spelling: str, order: str, fetch: str, call: tuple[str, str | None]
) -> None:
    written = spelling.format(order)

    assert order_at(written, API).fetch_url(ID) == f"{SITE}/api/{fetch}"


@pytest.mark.parametrize(("order", "fetch", "call"), ORDERS, ids=[order for order, _, _ in ORDERS])
def test_endpoints_are_case_insensitive(order: str, fetch: str, call: tuple[str, str | None]) -> None:
    expected = fetch if "workflows" not in fetch else fetch.replace("uuid-string", "UUID-STRING")

    assert order_at(order.upper(), API).fetch_url(ID) == f"{SITE}/api/{expected}"


@pytest.mark.parametrize(("order", "fetch", "call"), ORDERS, ids=[order for order, _, _ in ORDERS])
@pytest.mark.parametrize("end", ["", "/298", "/abc-7"])
def test_a_fetch_url_may_be_given_as_endpoint(end: str, order: str, fetch: str, call: tuple[str, str | None]) -> None:
    written = fetch.removesuffix("/298") + end

    assert order_at(written, API).fetch_url(ID) == f"{SITE}/api/{fetch}"


def test_a_shared_fetch_path_has_no_specific_media() -> None:
    assert order_at("v3/fetch/7", API).family.media == "any"
    assert order_at("v3/text2video", API).family.media == "video"


@pytest.mark.parametrize(
    "endpoint",
    [
        "", " ", "/", "text2img", "v6", "v6/", "api/v6", "x/v6/images/text2img", "v6/images/%2e%2e/x", "v6/images/a b",
        "v6/ímages/text2img", "v6/images/" + "x" * 200, "v6" + "/x" * 12, "ftp://modelslab.com/api/v6/images/text2img",
        "https:///api/v6/images/text2img", "https://modelslab.com",
        "https://[::1/api/v6/images/text2img", "v6/images/text2img\x00", b"v6/images/text2img", 6, None, ["v6/images"],
    ],
)  # fmt: skip
def test_an_invalid_endpoint_is_refused_with_an_example(endpoint: object) -> None:
    with pytest.raises(NotTrackable) as refused:
        order_at(endpoint, API)

    assert "endpoint" in str(refused.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://evil.example/api/v6/images/text2img",
        "https://modelslab.com.evil.example/api/v6/images/text2img",
        "https://user:pass@modelslab.com/api/v6/images/text2img",
        "https://modelslab.com:8443/api/v6/images/text2img",
        "http://modelslab.com/api/v6/images/text2img",
        "http://10.0.0.1/api/v6/images/text2img",
    ],
)
def test_an_endpoint_at_another_host_is_refused(endpoint: str) -> None:
    with pytest.raises(RefusedAddress):
        order_at(endpoint, API)


@pytest.mark.parametrize(
    ("url", "fetch"),
    [
        ("https://modelslab.com/api/v6/video/text2video", f"{SITE}/api/v6/video/fetch/298"),
        ("https://gateway.example/api/v6/video/text2video?u=1", f"{SITE}/api/v6/video/fetch/298"),
        ("http://10.0.0.5:8080/proxy/api/vendor/api/v6/video/text2video", f"{SITE}/api/v6/video/fetch/298"),
        ("https://user:pass@gateway.example/api/v6/video/text2video", f"{SITE}/api/v6/video/fetch/298"),
        ("https://gateway.example/generate", None),
        ("https://gateway.example/api/generate", None),
        ("about:blank", None),
        ("", None),
        ("https://[::1", None),
        (None, None),
        (5, None),
    ],
)
def test_the_url_of_a_response_determines_the_family(url: object, fetch: str | None) -> None:
    order = order_of_response(url, API)

    assert (None if order is None else order.fetch_url(ID)) == fetch


def test_an_endpoint_with_a_port_is_fetched_at_that_port() -> None:
    order = order_at("http://127.0.0.1:8000/api/v6/video/text2video", LOCAL)

    assert order.fetch_url(ID) == "http://127.0.0.1:8000/api/v6/video/fetch/298"
    assert order_at("127.0.0.1:8000/api/v6/video/text2video", AllowedApi(LOCAL.url, LOCAL.hosts)) == order
