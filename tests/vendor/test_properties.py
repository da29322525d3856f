"""Properties of all answers, endpoints and forms of outputs."""

import json
import random
import string
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.vendor.recorded_fetches import FETCHES
from tests.vendor.recorded_submits import SUBMITS
from tests.vendor.test_families import ORDERS
from tests.vendor.test_replies import ANY_JSON, CODES, HEADERS
from worker.core.identity import READY
from worker.core.reply import MAX_URL, Link, Ready, Reply
from worker.errors import NotTrackable, RefusedAddress
from worker.vendor.answer_fields import json_object
from worker.vendor.answer_links import MAX_PROMISED, OUTPUT_FIELDS, collect_links, listed_outputs, promised_urls
from worker.vendor.fetch_url import VENDOR_HOSTS, AllowedApi, fetch_address, order_at, order_of_response
from worker.vendor.replies import ParsedAnswer, Question, parse, rule_for
from worker.vendor.submissions import SubmitAnswer, planned_job

ID = "4711"
NOW = 1_700_000_000.0
A, B = "https://h/a.png", "https://h/b.png"
API = AllowedApi("https://modelslab.com/api/v6", VENDOR_HOSTS)
BODIES: list[dict[str, Any]] = [
    json.loads(json.dumps(row.body).replace("{ID}", ID)) for row in FETCHES if isinstance(row.body, dict)
]
RECORDED = st.sampled_from(BODIES)
NAMES = [
    *OUTPUT_FIELDS,
    "status",
    "id",
    "future_links",
    "fetch_result",
    "training_id",
    "chat_id",
    "eta",
    "meta",
    "error",
]
MIXED = st.builds(
    lambda body, more: body | more,
    RECORDED,
    st.dictionaries(
        st.sampled_from(NAMES), ANY_JSON | st.sampled_from([A, [A, B], {"url": A}, "processing"]), max_size=3
    ),
)


def read(body: object, status: int = 200, *, training: bool = False) -> Reply:
    return parse(status, {}, json.dumps(body).encode(), Question(ID, NOW, training))


@settings(max_examples=200, deadline=None)
@given(MIXED, CODES, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_fields_does_not_matter(
    body: dict[str, Any], status: int, training: bool, rng: random.Random
) -> None:
    names = list(body)
    rng.shuffle(names)

    assert read({name: body[name] for name in names}, status, training=training) == read(
        body, status, training=training
    )


@settings(max_examples=200, deadline=None)
@given(MIXED, CODES, HEADERS, st.booleans())
@example({"status": "processing", "execution": {"status": "completed"}}, 200, {}, False)
def test_the_shortcut_for_processing_agrees_with_the_rules(
    body: dict[str, Any], status: int, headers: dict[str, str], training: bool
) -> None:
    raw = json.dumps(body).encode()
    question = Question(ID, NOW, training)

    assert (
        parse(status, headers, raw, question)
        == rule_for(ParsedAnswer(status, headers, raw, json_object(raw), question))[1]
    )


@settings(max_examples=100, deadline=None)
@given(MIXED, st.sampled_from([A, [A], [[A, B]], {"0": A}]))
def test_promised_links_do_not_make_a_job_ready(body: dict[str, Any], links_to_come: object) -> None:
    without = read({name: value for name, value in body.items() if name != "future_links"})
    reply = read(body | {"future_links": links_to_come})

    if isinstance(reply, Ready) or isinstance(without, Ready):
        assert reply == without


@settings(max_examples=100, deadline=None)
@given(ANY_JSON | st.lists(st.sampled_from([A, B, "", None, 5, "ftp://h/c", "https://h/" + "x" * MAX_URL])))
def test_promised_links_can_be_stored(value: object) -> None:
    addresses = promised_urls({"future_links": value})

    assert len(addresses) == len(set(addresses)) <= MAX_PROMISED
    for address in addresses:
        assert urlsplit(address).scheme.lower() in ("http", "https")
        assert len(address) <= MAX_URL
        assert address.encode()


@settings(max_examples=200, deadline=None)
@given(MIXED, st.none() | st.sampled_from([order for order, _, _ in ORDERS]), CODES)
def test_any_argument_becomes_a_job_or_a_documented_error(
    body: dict[str, Any], endpoint: str | None, status: int
) -> None:
    try:
        job = planned_job(SubmitAnswer(body, status), API, endpoint=endpoint)
    except NotTrackable:
        return

    if not job.address.base.startswith(READY):
        assert job.address.host in VENDOR_HOSTS
        assert fetch_address(job.address.url, job.submission.remote_id, API) == job.address
    assert job.kind
    assert job.kind.isprintable()
    assert len(job.kind) <= 64


PIECES = st.lists(
    st.sampled_from(
        [
            *(
                "https://",
                "http://",
                "modelslab.com",
                "evil.example",
                ":443",
                "user@",
                "api",
                "v6",
                "v3",
                "video",
                "fetch",
            ),
            *(
                "text2video",
                "fine_tune_status",
                "enterprise",
                "flux",
                "..",
                ".",
                "%2e",
                "?",
                "#",
                " ",
                "\\",
                "\n",
                "298",
            ),
        ]
    )
    | st.just("/")
    | st.just("/"),
    max_size=14,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(PIECES | st.text(max_size=40))
@example("v6/../v1/enterprise/flux/clear_queue")
@example("https://modelslab.com/api/v6/../../etc/fetch")
def test_every_accepted_endpoint_gives_an_allowed_url(endpoint: str) -> None:
    try:
        order = order_at(endpoint, API)
    except (NotTrackable, RefusedAddress):
        return

    address = fetch_address(order.fetch_url("298"), "298", API)
    assert address.host in VENDOR_HOSTS
    assert set(urlsplit(address.url).path) <= set(string.ascii_letters + string.digits + "/_-")


@settings(max_examples=200, deadline=None)
@given(PIECES | st.text(max_size=40) | ANY_JSON)
def test_the_url_of_a_response_never_raises(url: object) -> None:
    order = order_of_response(url, API)

    assert order is None or fetch_address(order.fetch_url("298"), "298", API).host in VENDOR_HOSTS


# ── unusual outputs ──── ─────────────────────────────────────────────────────────────────────────────────────────────

# a listed value, and the outputs in it
SHAPES: list[tuple[str, object, list[str]]] = [
    ("several in one text", f"{A} {B}", [A, B]),
    ("several in one text, with commas", f"{A},{B}, {A}", [A, B]),
    ("several in one text, in lines", f" {A}\r\n{B}\n", [A, B]),
    ("an address in an address", "https://h/fetch?u=https://h/a.png", ["https://h/fetch?u=https://h/a.png"]),
    ("a comma in an address", "https://h/w_1,q_2/a.png", ["https://h/w_1,q_2/a.png"]),
    ("placeholders", ["null", "None", "N/A", "undefined", "false", "processing", "pending", " Queued "], []),
    ("numbers and truths", [0, 1, 1.5, True, False, None, -0.0], []),
    ("empties", ["", " ", "\n", [], {}, [[]], {"a": {}}], []),
    ("capitals of a scheme", "HTTPS://H/A.PNG", ["HTTPS://H/A.PNG"]),
    ("objects of one output each", [{"url": A, "index": 0}, {"url": B, "index": 1}], [A, B]),
    ("an object by place", {"0": A, "1": {"video": B}}, [A, B]),
    ("names of what was made", {"image_url": A, "video_url": B, "seed": "7", "prompt": "a lake"}, [A, B]),
    ("names of what it was made from", {"init_image": A, "mask_image": A, "reference_image_url": A, "output": B}, [B]),
    ("a model that was made", {"model": "https://h/m.glb", "model_mesh": "https://h/m.obj?x=1"}, ["https://h/m.glb", "https://h/m.obj?x=1"]),
    ("a model that was used", {"model": "https://h/sdxl", "url": A}, [A]),
    ("a model as an object", {"model": {"glb": "https://h/m"}}, ["https://h/m"]),
    ("spoken words", [{"text": "A sentence.", "words": [{"word": "A", "start": 0.1, "end": 0.2}], "link": A}], [A]),
    ("a status beside the output", {"status": "success", "id": "7", "output": [A], "message": B, "fetch_result": B}, [A]),  # noqa: E501
    ("the same one everywhere", {"output": [A], "links": [A], "url": A}, [A]),
    ("hostile names", {"__proto__": A, "constructor": B, "": A}, [A, B]),
    ("schemes of another kind in an object", {"url": "javascript:alert(1)", "file": "file:///etc/passwd"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("output", "urls"), [pytest.param(*row, id=name) for name, *row in SHAPES])
@pytest.mark.parametrize("field", ["output", "outputs"])
def test_outputs_are_found_in_any_form(field: str, output: object, urls: list[str]) -> None:
    assert [link.url for link in listed_outputs({"status": "success", field: output}).links] == urls


@pytest.mark.parametrize("field", [name for name in OUTPUT_FIELDS if name not in ("output", "outputs", "proxy_links")])
def test_every_output_field_is_needed(field: str) -> None:
    assert listed_outputs({"status": "success", "output": [], field: [A]}).links == (Link(A),)
    assert listed_outputs({"status": "success", "output": [B], field: [A]}).links == (Link(B),)


@pytest.mark.parametrize(
    "field", ["future_links", "fetch_result", "webhook", "tip", "message", "init_image", "thumbnail"]
)
def test_other_fields_are_not_outputs(field: str) -> None:
    assert (
        listed_outputs(
            {"status": "success", "output": [], field: [A], "data": {field: [A]}, "meta": {field: [A]}}
        ).links
        == ()
    )


def test_promised_links_may_be_in_the_field_links() -> None:
    assert promised_urls({"status": "queued", "links": [A], "future_links": []}) == (A,)
    assert promised_urls({"status": "queued", "links": [A], "future_links": [B]}) == (B,)
    assert promised_urls({"status": "processing", "output": [A], "proxy_links": [A]}) == ()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([A, B, "https://h/c?x=1,2", "http://h/d"]), min_size=1, max_size=6),
    st.sampled_from([" ", ", ", ",", "\n", " ,\t"]),
)
def test_several_urls_in_one_text_equal_a_list(addresses: list[str], between: str) -> None:
    assert collect_links(between.join(addresses)) == collect_links(addresses)


@pytest.mark.parametrize("row", SUBMITS, ids=[row.name for row in SUBMITS])
def test_a_submit_answer_may_be_a_mapping_text_or_bytes(row: Any) -> None:
    def outcome(remote: object) -> object:
        try:
            return planned_job(remote, API, endpoint=row.endpoint)
        except NotTrackable as refused:
            return type(refused), str(refused)

    text = json.dumps(row.answer)
    assert outcome(text) == outcome(text.encode()) == outcome(f"\ufeff \n{text}\n") == outcome(row.answer)
