"""Fetch URLs: the rules for the hosts and paths to which the key may be sent."""

from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.identity import FetchAddress, checked_remote_id
from worker.errors import NotTrackable, RefusedAddress
from worker.vendor.families import is_training, kind_of
from worker.vendor.fetch_url import MAX_ADDRESS, AllowedApi, api_host, fetch_address, order_at, path_of

ID = "298"
VENDOR = AllowedApi("https://stablediffusionapi.com/api/v3", frozenset({"stablediffusionapi.com", "modelslab.com"}))
LOCAL = AllowedApi("http://127.0.0.1:8000/api/v3", frozenset({"127.0.0.1:8000", "[::1]:8000", "localhost"}))
OLD, NEW = "https://stablediffusionapi.com", "https://modelslab.com"
# fmt: off
SERVERS = [
    "flux", "flux_klein", "flux_kontext_dev", "flux_headshot", "z_image_turbo", "qwen", "realtime",
    "image_editing", "interior", "face_gen", "super_resolution", "deepfake", "faceswap", "video",
    "ultra_video", "image_to_video_ultra", "voice", "text_to_speech", "speech_to_text", "3d",
]
V6 = [
    "images", "realtime", "image_editing", "fashion", "interior", "video", "voice", "whisper", "3d",
    "deepfake", "faceswap",
]
# fmt: on

# the path without the id, and the kind of its jobs
FAMILIES: list[tuple[str, str]] = [
    ("/api/v3/fetch", "image"),
    ("/api/v3/dreambooth/fetch", "dreambooth"),
    ("/api/v4/dreambooth/fetch", "dreambooth"),
    ("/api/v5/images/fetch", "images"),
    *[(f"/api/v6/{name}/fetch", name) for name in V6],
    *[(f"/api/v7/{name}/fetch", name) for name in ("images", "video-fusion", "voice")],
    ("/api/v1/enterprise/fetch", "enterprise"),
    *[(f"/api/v1/enterprise/{name}/fetch", f"enterprise-{name}") for name in SERVERS],
    ("/api/v10/fetch", "image"),
]


@pytest.mark.parametrize(("path", "kind"), FAMILIES)
@pytest.mark.parametrize("site", [OLD, NEW])
def test_every_family_can_be_fetched_with_the_id_in_path_or_body(site: str, path: str, kind: str) -> None:
    in_path = fetch_address(f"{site}{path}/{ID}", ID, VENDOR)
    in_body = fetch_address(f"{site}{path}", ID, VENDOR)

    host = site.removeprefix("https://")
    assert in_path == FetchAddress(f"{site}{path}/{ID}", f"{site}{path}", host)
    assert in_body == FetchAddress(f"{site}{path}", f"{site}{path}", host)
    assert (in_path.id_in_body, in_body.id_in_body) == (False, True)
    assert kind_of(path_of(in_path.base)) == kind_of(path_of(in_body.base)) == kind
    assert not is_training(in_path.base)


def test_trainings_have_their_own_path() -> None:
    address = fetch_address(f"{NEW}/api/v3/fine_tune_status/F5jvdzGnYi", "F5jvdzGnYi", VENDOR)

    assert address.base == f"{NEW}/api/v3/fine_tune_status"
    assert kind_of(path_of(address.base)) == "training"
    assert is_training(address.base)
    assert not address.id_in_body


@pytest.mark.parametrize("missing", [None, ""])
def test_a_job_without_fetch_url_uses_the_configured_url(missing: str | None) -> None:
    address = fetch_address(missing, ID, VENDOR)

    assert address == fetch_address(f"{OLD}/api/v3/fetch/{ID}", ID, VENDOR)
    assert address.url == f"{OLD}/api/v3/fetch/{ID}"


@pytest.mark.parametrize(
    "configured",
    [
        "https://stablediffusionapi.com/api/v3/",
        "https://StableDiffusionAPI.com/api/v3",
        "https://stablediffusionapi.com:443/api/v3",
    ],
)
def test_the_same_job_has_one_fetch_address_for_every_spelling(configured: str) -> None:
    """Otherwise a job that is tracked with and without its fetch_result would become two jobs."""
    api = AllowedApi(configured, VENDOR.hosts)

    assert fetch_address(None, ID, api) == fetch_address(f"{OLD}/api/v3/fetch/{ID}", ID, api)


def test_a_job_may_name_any_configured_url() -> None:
    api = AllowedApi("http://127.0.0.1:8000/mirror", frozenset({"127.0.0.1:8000"}))

    assert fetch_address("http://127.0.0.1:8000/mirror/fetch/298", ID, api) == fetch_address(None, ID, api)
    with pytest.raises(RefusedAddress):
        fetch_address("http://127.0.0.1:8000/mirror/clear_queue/298", ID, api)


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        (f"https://ModelsLab.COM/api/v3/fetch/{ID}", f"{NEW}/api/v3/fetch/{ID}"),
        (f"https://modelslab.com:443/api/v3/fetch/{ID}", f"{NEW}/api/v3/fetch/{ID}"),
    ],
)
def test_a_fetch_url_is_normalised(url: str, normal: str) -> None:
    assert fetch_address(url, ID, VENDOR).url == normal


@pytest.mark.parametrize(
    "url",
    [
        f"http://127.0.0.1:8000/api/v3/fetch/{ID}",
        f"http://[::1]:8000/api/v3/fetch/{ID}",
        f"http://localhost/api/v3/fetch/{ID}",
        f"http://localhost:80/api/v3/fetch/{ID}",
        f"https://127.0.0.1:8000/api/v3/fetch/{ID}",
    ],
)
def test_plain_http_is_allowed_only_for_this_machine(url: str) -> None:
    assert fetch_address(url, ID, LOCAL).url in (url, url.replace(":80/", "/"))


HOSTILE = [
    # other hosts, and hosts that look similar
    f"https://evil.example/api/v3/fetch/{ID}",
    f"https://modelslab.com.evil.example/api/v3/fetch/{ID}",
    f"https://xmodelslab.com/api/v3/fetch/{ID}",
    f"https://www.modelslab.com/api/v3/fetch/{ID}",
    f"https://modelslab.com./api/v3/fetch/{ID}",
    f"https://.modelslab.com/api/v3/fetch/{ID}",
    f"https://modelslab\u3002com/api/v3/fetch/{ID}",
    f"https://mod\u0435lslab.com/api/v3/fetch/{ID}",
    f"https://modelsla\uff42.com/api/v3/fetch/{ID}",
    f"https://127.0.0.1/api/v3/fetch/{ID}",
    f"https://[::1]/api/v3/fetch/{ID}",
    f"https://2130706433/api/v3/fetch/{ID}",
    f"http://sdapi_backend.test/api/v3/fetch/{ID}",
    # userinfo
    f"https://modelslab.com@evil.example/api/v3/fetch/{ID}",
    f"https://user:pass@modelslab.com/api/v3/fetch/{ID}",
    f"https://@modelslab.com/api/v3/fetch/{ID}",
    f"https://evil.example\\@modelslab.com/api/v3/fetch/{ID}",
    f"https://modelslab.com\\.evil.example/api/v3/fetch/{ID}",
    # ports
    f"https://modelslab.com:8443/api/v3/fetch/{ID}",
    f"https://modelslab.com:80/api/v3/fetch/{ID}",
    f"https://modelslab.com:0443/api/v3/fetch/{ID}",
    f"https://modelslab.com:/api/v3/fetch/{ID}",
    f"https://modelslab.com:0/api/v3/fetch/{ID}",
    f"https://modelslab.com:99999/api/v3/fetch/{ID}",
    f"https://modelslab.com:443:443/api/v3/fetch/{ID}",
    f"https://modelslab.com:-443/api/v3/fetch/{ID}",
    # schemes
    f"http://modelslab.com/api/v3/fetch/{ID}",
    f"http://modelslab.com:443/api/v3/fetch/{ID}",
    f"ftp://modelslab.com/api/v3/fetch/{ID}",
    f"file:///api/v3/fetch/{ID}",
    f"//modelslab.com/api/v3/fetch/{ID}",
    f"/api/v3/fetch/{ID}",
    f"modelslab.com/api/v3/fetch/{ID}",
    f"https:/modelslab.com/api/v3/fetch/{ID}",
    f"https:///modelslab.com/api/v3/fetch/{ID}",
    "javascript:alert(1)",
    "x",
    " ",
    # query and fragment
    f"{NEW}/api/v3/fetch/{ID}?x=1",
    f"{NEW}/api/v3/fetch/{ID}?",
    f"{NEW}/api/v3/fetch/{ID}#x",
    f"{NEW}/api/v3/fetch/{ID}#",
    f"{NEW}/api/v3/fetch/{ID};x",
    f"{NEW}?/api/v3/fetch/{ID}",
    # dot segments, percent signs, backslashes, doubled and trailing slashes
    f"{NEW}/api/v3/fetch/../v1/enterprise/flux/clear_queue/fetch/{ID}",
    f"{NEW}/api/v3/./fetch/{ID}",
    f"{NEW}/api/v3/fetch/{ID}/..",
    f"{NEW}/api/v3/fetch/..",
    f"{NEW}/api/v3/fetch/%2e%2e/{ID}",
    f"{NEW}/api/v3/fetch%2f{ID}",
    f"{NEW}/api/v3/fetch/{ID}%00",
    f"{NEW}/api/v3\\fetch\\{ID}",
    f"{NEW}/api/v3/fetch//{ID}",
    f"{NEW}//api/v3/fetch/{ID}",
    f"{NEW}/api/v3/fetch/{ID}/",
    f"{NEW}/api/v3/fetch/",
    # characters that parsers remove or change
    f"{NEW}/api/v3/fetch/{ID}\n",
    f"{NEW}/api/v3/fe\ttch/{ID}",
    f"\n{NEW}/api/v3/fetch/{ID}",
    f" {NEW}/api/v3/fetch/{ID}",
    f"{NEW}/api/v3/fetch/{ID}\x00",
    f"{NEW}/api/v3/fetch/\uff12\uff19\uff18",
    f"{NEW}/api/v3/fetch/{ID} HTTP/1.1\r\nHost: evil.example",
    # paths that are not fetch paths
    f"{NEW}/",
    f"{NEW}",
    f"{NEW}/fetch/{ID}",
    f"{NEW}/api/fetch/{ID}",
    f"{NEW}/api/v/fetch/{ID}",
    f"{NEW}/api/vx/fetch/{ID}",
    f"{NEW}/API/v3/fetch/{ID}",
    f"{NEW}/x/api/v3/fetch/{ID}",
    f"{NEW}/api/v3/Fetch/{ID}",
    f"{NEW}/api/v3/text2img",
    f"{NEW}/api/v3/system_load",
    f"{NEW}/api/v1/enterprise/flux/clear_queue",
    f"{NEW}/api/v1/enterprise/flux/clear_queue/{ID}",
    f"{NEW}/api/v3/cancle_training/{ID}",
    f"{NEW}/api/v3/delete_image",
    f"{NEW}/api/v3/fetch/{ID}/clear_queue",
    f"{NEW}/api/v3/fine_tune_status",
    f"{NEW}/api/v6/fine_tune_status/{ID}",
    f"{NEW}/api/v3/x/fine_tune_status/{ID}",
    # the id of another job
    f"{NEW}/api/v3/fetch/299",
    f"{NEW}/api/v3/fetch/2988",
    f"{NEW}/api/v3/fetch/0298",
    f"{NEW}/api/v3/fine_tune_status/299",
    f"{NEW}/api/v3/fetch/{ID}/{ID}",
    # too long
    f"{NEW}/api/v3{'/x' * MAX_ADDRESS}/fetch/{ID}",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_url_is_refused_with_a_short_message(url: str) -> None:
    with pytest.raises(RefusedAddress) as refused:
        fetch_address(url, ID, VENDOR)

    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "remote_id", ["../../v1/enterprise/flux/clear_queue", "", ".", "..", "a/b", "a%2fb", "a?", "a\n", "-a", "a" * 129]
)
@pytest.mark.parametrize("url", [None, f"{NEW}/api/v6/images/fetch"])
def test_an_invalid_id_gets_no_fetch_url(remote_id: str, url: str | None) -> None:
    """The HTTP client would normalise an id of dots and slashes, and the request could empty a queue."""
    with pytest.raises(NotTrackable):
        checked_remote_id(remote_id) if remote_id != "a\n" else fetch_address(url, remote_id, VENDOR)
    with pytest.raises(RefusedAddress):
        fetch_address(url, remote_id, VENDOR)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://stablediffusionapi.com/api/v3", "stablediffusionapi.com"),
        ("https://ModelsLab.com", "modelslab.com"),
        ("https://h:8443/api", "h:8443"),
        ("http://localhost:80/api", "localhost"),
        ("http://[::1]:8000/api", "[::1]:8000"),
        ("http://127.9.9.9/api", "127.9.9.9"),
    ],
)
def test_the_host_of_the_base_url_is_normalised(url: str, host: str) -> None:
    assert api_host(url) == host


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "http://h/api",
        "http://10.0.0.1/api",
        "http://128.0.0.1/api",
        "http://127.0.0.1.evil.example/api",
        "http://localhost.evil.example/",
        "https://u@h/api",
        "https://h/api?x",
        "https://h/api#x",
        "https://h/a%20b",
        "https://h/../x",
        "https://h:0/x",
        "https:///x",
    ],
)
def test_a_malformed_base_url_is_refused(url: str) -> None:
    with pytest.raises(RefusedAddress):
        api_host(url)


# fmt: off
WORDS = [
    "https://", "http://", "modelslab.com", "evil.example", "127.0.0.1", ":443", ":8000", "@", "/api", "/v3",
    "/v6", "/fetch", "/298", "/299", "/images", "/fine_tune_status", "/..", "/.", "//", "?", "#", "%2e",
    "\\", "\n", ".",
]
# fmt: on
PIECES = st.lists(st.sampled_from(WORDS), max_size=9).map("".join)
SHAPED = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["https://", "http://", "HTTPS://"]),
    st.sampled_from(["modelslab.com", "evil.example", "ModelsLab.com:443", "a@modelslab.com", "127.0.0.1:8000"]),
    st.sampled_from(["/api/v3", "/api/v6/images", "/api/v1/enterprise/flux", "/api/../v3", ""]),
    st.sampled_from(["/fetch", "/fine_tune_status", "/clear_queue", "/fetch/fetch"]),
    st.sampled_from(["", "/298", "/299", "/", "?298", "/298#"]),
)


@settings(max_examples=300, deadline=None)
@given(PIECES | SHAPED, st.sampled_from([VENDOR, LOCAL]))
def test_accepted_urls_have_an_allowed_host_and_a_plain_path(url: str, api: AllowedApi) -> None:
    try:
        address = fetch_address(url or None, ID, api)
    except RefusedAddress:
        return

    parts = urlsplit(address.url)
    segments = parts.path.split("/")
    assert parts.netloc == address.host
    assert address.host in api.hosts
    assert parts.scheme == "https" or parts.hostname in ("127.0.0.1", "::1", "localhost")
    assert (parts.query, parts.fragment, parts.username, parts.password) == ("", "", None, None)
    assert address.url == f"{parts.scheme}://{parts.netloc}{parts.path}"
    assert not {"", ".", ".."} & set(segments[1:])
    assert segments[-1] == ID or (address.id_in_body and segments[-1] == "fetch")
    assert segments[-2] in ("fetch", "fine_tune_status") or address.id_in_body
    assert ID not in segments[:-1]
    assert fetch_address(address.url, ID, api) == address


def test_the_fetch_path_of_a_chat_has_no_id() -> None:
    api = AllowedApi("https://modelslab.com/api/v6", frozenset({"modelslab.com"}))
    chats = "https://modelslab.com/api/v6/llm/get_queued_response"

    assert fetch_address(chats, "7", api).id_in_body
    with pytest.raises(RefusedAddress, match="is not a fetch path"):
        fetch_address(f"{chats}/7", "7", api)


@pytest.mark.parametrize(
    "endpoint", ["v6/../v3/text2img", "v6/./video/text2video", "v6/video/..", "v6/.", "v6/video/..."]
)
def test_an_endpoint_with_dot_segments_is_refused(endpoint: str) -> None:
    api = AllowedApi("https://modelslab.com/api/v6", frozenset({"modelslab.com"}))

    for text in (endpoint, f"api/{endpoint}", f"https://modelslab.com/api/{endpoint}"):
        with pytest.raises(NotTrackable, match="is not a path of the API"):
            order_at(text, api)
    assert order_at("v6/images/text2img.v2", api).family.fetch == "v6/images/fetch"
