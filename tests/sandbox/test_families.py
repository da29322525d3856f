"""Every family of the API: ordered and fetched as documented, with outputs of its kind."""

import json
from typing import Any

import pytest

from worker.core.media.signatures import is_complete, sniff
from worker.core.reply import Processing, Ready
from worker.sandbox.behaviour import Behaviour
from worker.sandbox.families import FAMILIES, family_of
from worker.sandbox.files import make_output
from worker.sandbox.jobs import SandboxJob
from worker.sandbox.options import PLANS, SandboxOptions
from worker.sandbox.orders import order_paths, unused_ids
from worker.vendor.families import is_training
from worker.vendor.fetch_url import AllowedApi, call_for, path_of
from worker.vendor.replies import Question, parse
from worker.vendor.submissions import SubmitAnswer, planned_job

HOST = "http://127.0.0.1:9"
API = AllowedApi(f"{HOST}/api/v3", frozenset({"127.0.0.1:9"}))
ORDERS = [order.replace("*", "anything").replace("{name}", "upscale") for order in order_paths()]
MEDIA = {
    "png": "image/png", "mp4": "video/mp4", "wav": "audio/wav", "glb": "model/gltf-binary",
}  # fmt: skip


def model(**options: Any) -> Behaviour:
    return Behaviour(SandboxOptions(**{"min_seconds": 5, "max_seconds": 5, "size": 32, **options}))


def ask(stand_in: Behaviour, path: str, now: float, method: str = "POST", **body: object) -> tuple[int, dict[str, Any]]:
    answer = stand_in.answer(path, {"key": "sandbox-key", **body}, now=now, origin=HOST, method=method)
    return answer.status, json.loads(answer.body)


def order(stand_in: Behaviour, path: str, **body: object) -> SubmitAnswer:
    status, answer = ask(stand_in, f"/api/{path}", 0.0, "POST", **{"prompt": "a lighthouse by the sea", **body})
    return SubmitAnswer(answer, status, f"{HOST}/api/{path}")


def links_in(answer: object) -> list[str]:
    """Return the output URLs in an answer in their order, without proxy links."""
    if isinstance(answer, str):
        return [answer] if "/generations/" in answer and "/cdn2/" not in answer else []
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list) else ()
    return [link for value in values for link in links_in(value)]


def newest(stand_in: Behaviour) -> SandboxJob:
    return stand_in.latest(1)[0]


@pytest.mark.parametrize("path", ORDERS)
@pytest.mark.parametrize("tracked_with", ["the response", "the bare id and the path"])
def test_a_job_of_each_family_is_ready_where_the_worker_fetches_it(path: str, tracked_with: str) -> None:
    """The stand-in and the worker have separate knowledge of the families, and must agree."""
    stand_in = model()
    answer = order(stand_in, path)
    remote = answer if tracked_with == "the response" else newest(stand_in).id
    planned = planned_job(remote, API, endpoint=None if tracked_with == "the response" else path)
    call = call_for(planned.address)
    body = {} if call.id_field is None else {call.id_field: planned.submission.remote_id}

    early, ready = (
        stand_in.answer(
            path_of(planned.address.url), {"key": "sandbox-key", **body}, now=now, origin=HOST, method=call.method
        )
        for now in (4.9, 5.0)
    )
    question = Question(planned.submission.remote_id, 0.0, training=is_training(planned.address.base))
    replies = [parse(answer.status, answer.headers, answer.body, question) for answer in (early, ready)]

    assert planned.submission.remote_id == newest(stand_in).id
    assert isinstance(replies[0], Processing)
    assert isinstance(replies[1], Ready)
    assert [link.url.rpartition("/")[2] for link in replies[1].outputs] == list(newest(stand_in).files)


@pytest.mark.parametrize("path", ORDERS)
def test_the_outputs_of_each_family_are_valid_files_of_its_kind(path: str) -> None:
    stand_in = model()
    order(stand_in, path)
    job, kind = newest(stand_in), newest(stand_in).family.makes

    for index, name in enumerate(job.files):
        content = make_output(name, job.prompt, job.id, index, job.size).content
        assert len(content) < 40_000
        assert name.endswith(f".{kind}")
        media = sniff(content)
        if kind in MEDIA:
            assert media is not None
            assert media.type == MEDIA[kind]
            assert is_complete(media, content, content, len(content))
        elif kind == "json":
            assert "lighthouse" in json.dumps(json.loads(content))
        else:
            assert content.decode() == "a lighthouse by the sea\n"
    assert bool(job.files) == (kind != "")


@pytest.mark.parametrize(
    ("path", "body", "ending", "start"),
    [
        ("v6/voice/speech_to_text", {"timestamp_level": "word"}, "words.txt", b'[{"text"'),
        ("v6/voice/speech_to_text", {"output_format": "srt"}, ".srt", b"1\n00:00:00,000 --> 00:00:01,000\n"),
        ("v6/voice/speech_to_text", {"output_format": "vtt"}, ".vtt", b"WEBVTT\n"),
        ("v6/voice/speech_to_text", {"output_format": "json"}, ".json", b"{"),
        ("v6/images/text2img", {"base64": "yes"}, ".base64", b"iVBORw0KGgo"),
        ("v3/img2img", {"base64": True}, ".base64", b"iVBORw0KGgo"),
    ],
)
def test_an_order_can_ask_for_text_captions_and_base64(
    path: str, body: dict[str, Any], ending: str, start: bytes
) -> None:
    stand_in = model()
    order(stand_in, path, **body)
    job = newest(stand_in)

    assert job.files[0].endswith(ending)
    assert make_output(job.files[0], job.prompt, job.id, 0, job.size).content.startswith(start)


def test_answers_have_the_spelling_and_fields_of_their_family() -> None:
    stand_in = model()

    picture = order(stand_in, "v3/text2img").fields
    video = order(stand_in, "v6/video/text2video").fields
    fusion = order(stand_in, "v7/video-fusion/text-to-video").fields
    flux = order(stand_in, "v7/images/text-to-image").fields
    old_video = order(stand_in, "v5/text2video").fields
    sound = order(stand_in, "v1/enterprise/voice/sfx").fields
    chat = order(stand_in, "v6/llm/chat").fields
    booth = order(stand_in, "v4/dreambooth").fields

    assert ("messege" in picture, "messege" in video, "message" in video) == (True, False, True)
    assert video["eta"] == 960
    assert "id" not in fusion
    assert fusion["fetch_result"].startswith(f"{HOST}/api/v7/video-fusion/fetch/")
    assert ("fetch_result" in flux, "future_links" in flux, isinstance(flux["id"], str)) == (False, False, True)
    assert (picture["output"], old_video["output"]) == ([], "")
    assert (sound["status"], sound["links"][0].endswith(".wav"), "id" in sound) == ("queued", True, False)
    assert chat == {"status": "processing", "eta": 5.0, "meta": {"chat_id": newest_of(stand_in, "v6/llm")}}
    assert booth["fetch_result"] == f"{HOST}/api/v3/dreambooth/fetch/{booth['id']}"


def newest_of(stand_in: Behaviour, start: str) -> str:
    return next(job.id for job in stand_in.latest(100) if job.family.store.startswith(start))


def test_a_training_has_status_success_until_its_model_is_ready() -> None:
    stand_in = model()
    states = []
    for path in ("v3/fine_tune", "v3/lora_fine_tune"):
        accepted = order(stand_in, path).fields
        assert (accepted["status"], accepted["messege"]) == ("success", "deploying_gpu")
        fetch_path = f"/api/v3/fine_tune_status/{accepted['training_id']}"
        answers = [ask(stand_in, fetch_path, now)[1] for now in (0.0, 2.5, 4.99, 5.0)]
        assert {answer["status"] for answer in answers} == {"success"}
        states.append([answer.get("model_training_status") or answer["messege"] for answer in answers])

    assert states[0] == states[1] == ["deploying_gpu", "trained_model_compressing", "deploying_model", "model_ready"]


def test_a_failed_training_has_status_success_too() -> None:
    stand_in = model(scenarios=("failed",))
    accepted = order(stand_in, "v3/fine_tune").fields

    answer = ask(stand_in, f"/api/v3/fine_tune_status/{accepted['training_id']}", 5.0)[1]

    assert answer["status"] == "success"
    assert "training_failed" in answer.values()
    assert answer["data"].startswith("Training failed: ")


def test_a_workflow_is_accepted_with_202_and_fetched_by_get() -> None:
    stand_in = model()
    answer = order(stand_in, "v1/workflows/upscale/run")
    fetch_path = f"/api/v1/workflows/upscale/runs/{answer.fields['execution_id']}"

    by_post = ask(stand_in, fetch_path, 1.0)
    runs = [ask(stand_in, fetch_path, now, "GET")[1]["execution"]["status"] for now in (0.5, 2.0, 5.0)]

    assert (answer.http_status, answer.fields["status_url"]) == (202, HOST + fetch_path)
    assert by_post[0] == 404
    assert runs == ["pending", "running", "completed"]


@pytest.mark.parametrize(
    "path",
    [
        "/api/v6/fetch/1", "/api/v3/text2img/fetch/1", "/api/v6/video2/fetch/1", "/api/v9/fetch/1", "/fetch/1",
        "/api/v3/fetch", "/api/v1/enterprise/unheard-of/fetch/1", "/api/v6/video/text2video/more",
    ],
)  # fmt: skip
def test_an_unknown_path_is_a_404_of_the_framework_for_any_key(path: str) -> None:
    answer = model().answer(path, {"key": "wrong"}, now=0.0, origin=HOST)

    assert answer.status == 404
    assert json.loads(answer.body) == {"message": f"The route {path[1:]} could not be found."}


def test_families_may_share_an_id_and_each_has_its_own_job() -> None:
    stand_in = model()
    swap = order(stand_in, "v6/deepfake/single_video_swap").fields
    room = order(stand_in, "v6/interior/make").fields

    answers = [ask(stand_in, f"/api/v6/{name}/fetch/298", 5.0)[1] for name in ("deepfake", "interior")]

    assert swap["id"] == room["id"] == 298
    assert [link.rpartition(".")[2] for answer in answers for link in links_in(answer)[:1]] == ["mp4", "png"]
    assert ask(stand_in, "/api/v6/video/fetch/298", 5.0)[1]["message"] == "Request not found"


def test_ids_are_new_in_each_run_unless_there_is_a_seed() -> None:
    """So a persistent database never gets an old picture."""
    monday, tuesday = (Behaviour(unused_ids(SandboxOptions(), moment)) for moment in (1.8e9, 1.8e9 + 86_400))
    seeded = Behaviour(unused_ids(SandboxOptions(seed=3), 1.8e9))

    def ids(stand_in: Behaviour) -> set[tuple[str, str, str]]:
        jobs = [stand_in.submit("sea", family=path, now=0.0) for path in ORDERS * 20]
        return {(job.family.store, job.id, name) for job in jobs for name in (job.files or ("",))}

    assert not {row[:2] for row in ids(monday)} & {row[:2] for row in ids(tuesday)}
    assert seeded.submit("sea", now=0.0).id == "12202888"


@pytest.mark.parametrize(("plan", "limit"), [("pay-as-you-go", 5), ("standard", 10), ("premium", 15)])
def test_orders_beyond_the_queue_of_the_plan_are_refused_and_fetches_do_not_count(plan: str, limit: int) -> None:
    stand_in = model(plan=plan)
    accepted = [order(stand_in, ORDERS[index % 9]) for index in range(limit)]
    fetches = [ask(stand_in, "/api/v3/fetch/1", 1.0)[0] for _ in range(30)]

    status, refused = ask(stand_in, "/api/v6/video/text2video", 1.0, prompt="sea")
    later, _ = ask(stand_in, "/api/v6/video/text2video", 5.0, prompt="sea")

    assert all(answer.http_status == 200 for answer in accepted)
    assert set(fetches) == {200}
    assert status == 429
    assert f"Maximum {limit} queued requests" in refused["message"]
    assert refused["retry_after"] == 30
    assert later == 200
    assert PLANS[plan] == limit


def test_the_account_calls_are_answered() -> None:
    stand_in = model()
    order(stand_in, "v3/text2img")

    assert ask(stand_in, "/api/v6/processing/request_count", 1.0)[1]["processing_count"] == 1
    assert ask(stand_in, "/api/wallet_balance", 1.0)[1]["data"]["currency"] == "USD"


def test_an_unknown_id_is_a_404_for_servers_that_document_it() -> None:
    stand_in = model()

    assert ask(stand_in, "/api/v1/enterprise/face_gen/fetch/9", 0.0)[0] == 404
    assert ask(stand_in, "/api/v1/enterprise/flux/fetch/9", 0.0) == (
        200, ask(stand_in, "/api/v3/fetch/9", 0.0)[1]
    )  # fmt: skip


def test_every_order_path_of_the_table_is_accepted() -> None:
    assert len(ORDERS) == len(set(ORDERS)) == sum(len(family.orders) for family in FAMILIES)
    assert all(family_of(path) is not None for path in ORDERS)
