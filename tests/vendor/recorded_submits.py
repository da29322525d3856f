"""Answers to submit calls from the vendor's documentation and from clients, with their results. One row per answer.

`sure` as in `recorded_fetches`. `means` is `tracked ID at PATH (KIND)`, `ready:N ID at PATH (KIND)`, `refused` or
`not_trackable`. PATH is below https://modelslab.com/api, or a dash if the family is unknown. SD_API_URL is set to v6.
"""
# ruff: noqa: E501  # a table has one line per case

from typing import NamedTuple

from tests.vendor.recorded_fetches import BEHIND, CDN, LATER, R2, S3, V6, bad, ok, run, wait

API = "https://modelslab.com/api/"


class Submit(NamedTuple):
    """One answer to an order."""

    name: str
    means: str
    answer: dict[str, object]
    source: str
    sure: str = "A"
    endpoint: str | None = None
    status: int = 200


# fmt: off
NAMED: tuple[Submit, ...] = (
    Submit("picture of version 6", "tracked 134711525 at v6/images/fetch/134711525 (images)", wait(tip=BEHIND, eta=2.75, messege=LATER, fetch_result=V6 + "images/fetch/134711525", id=134711525, output=[], meta={}), "docs-v2 dreambooth"),
    Submit("address of a sibling page", "tracked 13441520 at v6/images/fetch/13441520 (images)", wait(eta=35, messege=LATER, fetch_result=V6 + "images/fetch/1241861", id=13441520, output=[]), "docs-v2 flux-text-to-image"),
    Submit("dubbing, address of a sibling page", "tracked 334166 at v6/voice/fetch/334166 (voice)", wait(eta=100, fetch_result=V6 + "voice/fetch/271", id=334166), "docs-v2 create-dubbing"),
    Submit("realtime", "tracked 1241861 at v6/realtime/fetch/1241861 (realtime)", wait(eta=35, message=LATER, fetch_result=V6 + "realtime/fetch/1241861", id=1241861, output=[]), "docs-v2 realtime"),
    Submit("transcript", "tracked 330711 at v6/whisper/fetch/330711 (whisper)", wait(tip=BEHIND, eta=5, fetch_result=V6 + "whisper/fetch/330711", id=330711, output=[], future_links=[R2 + "t.txt"]), "docs-v2 speech-to-text"),
    Submit("ultra video", "tracked 147 at v6/video/fetch/147 (video)", wait(tip=BEHIND, eta=960, fetch_result=V6 + "video/fetch/147", id=147, output=[], future_links=[S3 + "9fa.mp4"]), "docs-v2 image-to-video-ultra"),
    Submit("face", "tracked 32 at v6/image_editing/fetch/32 (image_editing)", wait(eta=5, fetch_result=V6 + "image_editing/fetch/32", id=32, output=[], proxy_links=[]), "docs-v2 face-gen"),
    Submit("interior of the same id", "tracked 298 at v6/interior/fetch/298 (interior)", wait(eta=20, fetch_result=V6 + "interior/fetch/298", id=298, output=[]), "docs-v2 interior"),
    Submit("face swap of the same id", "tracked 298 at v6/deepfake/fetch/298 (deepfake)", wait(eta=605, fetch_result=V6 + "deepfake/fetch/298", id=298, output=[]), "docs-v2 deepfake"),
    Submit("sound", "tracked 1248942 at v6/voice/fetch/1248942 (voice)", wait(eta=35, fetch_result=V6 + "voice/fetch/1248942", id=1248942, output=[], proxy_links=[CDN + "s.wav"]), "docs-v2 sfx"),
    Submit("old host, old version", "tracked 41147071 at https://stablediffusionapi.com/api/v3/fetch/41147071 (image)", wait(eta=81.86, messege=LATER, fetch_result="https://stablediffusionapi.com/api/v3/fetch/41147071", id=41147071, output=[]), "captured in a Node service", "B"),
    Submit("version 4 answered with an address of version 3", "tracked 32798037 at https://stablediffusionapi.com/api/v3/dreambooth/fetch/32798037 (dreambooth)", wait(eta=20.94, messege=LATER, fetch_result="https://stablediffusionapi.com/api/v3/dreambooth/fetch/32798037", id=32798037, output=[]), "captured in a web app", "B", "v4/dreambooth"),
    Submit("video of version 5", "tracked 65704373 at https://stablediffusionapi.com/api/v3/fetch/65704373 (image)", wait(eta=6, messege=LATER, fetch_result="https://stablediffusionapi.com/api/v3/fetch/65704373", id=65704373, output="", future_links=[R2 + "0a1.mp4"]), "captured in a client's tests", "B"),
    Submit("video of 2025, id a number", "tracked 155918900 at v6/video/fetch/155918900 (video)", wait(eta=416.94, message=LATER, fetch_result=V6 + "video/fetch/155918900", id=155918900, output=[], future_links=[R2 + "w.mp4"]), "captured in a video app", "B"),
    Submit("id of letters", "tracked abc123-def456 at v6/images/fetch/abc123-def456 (images)", wait(id="abc123-def456", eta=15, message="Your request is being processed", fetch_result=V6 + "images/fetch/abc123-def456"), "notes of a client", "B"),
    Submit("client's tests", "tracked 12350 at v6/images/fetch/12350 (images)", wait(id=12350, fetch_result=V6 + "images/fetch/12350"), "prism-php/prism", "B"),
    Submit("no id, an address", "tracked 155262350 at v7/video-fusion/fetch/155262350 (video-fusion)", wait(eta=10, id=None, fetch_result=API + "v7/video-fusion/fetch/155262350", future_links=[R2 + "v.mp4"]), "three clients fall back so", "B"),
    Submit("address under the name that a client reads", "tracked 5 at v7/video-fusion/fetch/5 (video-fusion)", wait(id=5, fetch_url=API + "v7/video-fusion/fetch/5"), "client of seedance", "C"),
    Submit("address in capitals of a script", "tracked 5 at v6/video/fetch/5 (video)", wait(id=5, fetchResult=V6 + "video/fetch/5"), "Deno function of wan2.2", "C"),
    Submit("address without the id", "tracked 5 at v6/images/fetch (images)", wait(id=5, fetch_result=V6 + "images/fetch"), "docs-v2 dreambooth-fetch-queue-image", "C"),
    Submit("address at another host", "not_trackable", wait(id=5, fetch_result="https://evil.example/api/v6/images/fetch/5"), "guard", "C"),
    Submit("address of the vendor's own test host", "not_trackable", wait(id=5, fetch_result="http://sdapi_backend.test/api/v6/deepfake/fetch/5"), "docs-v2 deepfake leaks that host", "C"),
    Submit("address that empties a queue", "not_trackable", wait(id=5, fetch_result=API + "v1/enterprise/flux/clear_queue"), "guard", "C"),
    Submit("run of a workflow", "tracked 12345 at v1/workflows/uuid-string/runs/12345 (workflow)", {"status": "success", "message": "Workflow execution started.", "execution_id": 12345, "workflow_id": "uuid-string", "status_url": API + "v1/workflows/uuid-string/runs/12345"}, "docs-v2 run-workflow", status=202),
    Submit("run of a workflow, no address", "tracked 12345 at v1/workflows/uuid-string/runs/12345 (workflow)", {"status": "success", "execution_id": 12345, "workflow_id": "uuid-string"}, "docs-v2 run-workflow, neighbour", "C", status=202),
    Submit("run of a hostile workflow", "not_trackable", {"status": "success", "execution_id": 1, "workflow_id": "../../v1/enterprise/flux/clear_queue"}, "guard", "C"),
)

BY_ENDPOINT: tuple[Submit, ...] = (
    Submit("flux of 2026", "tracked 12345678 at v6/images/fetch/12345678 (images)", wait(id=12345678, eta=10, message="Your request is being processed"), "docs-v2 flux-text-to-image", endpoint="v6/images/text2img"),
    Submit("video of 2026", "tracked 12345678 at v6/video/fetch/12345678 (video)", wait(id=12345678, eta=60, message="Your video is being generated"), "docs-v2 text-to-video", endpoint="https://modelslab.com/api/v6/video/text2video"),
    Submit("version 7 picture", "tracked 9 at v7/images/fetch/9 (images)", wait(id=9), "modelslab-cli generate", endpoint="v7/images/text-to-image"),
    Submit("version 7 video", "tracked 9 at v7/video-fusion/fetch/9 (video-fusion)", wait(id=9), "OpenMontage, modelslab-cli", endpoint="v7/video-fusion/lip-sync"),
    Submit("version 7 voice", "tracked 9 at v7/voice/fetch/9 (voice)", wait(id=9), "modelslab-cli generate", endpoint="v7/voice/text-to-speech"),
    Submit("talking head", "tracked 9 at v6/video/fetch/9 (video)", wait(id=9), "client of sad_talker", "B", "v6/video/sad_talker"),
    Submit("sound of a server by its task id", "tracked a35-88 at v1/enterprise/voice/fetch/a35-88 (enterprise-voice)", {"status": "queued", "taskId": "a35-88", "eta": 5, "links": [R2 + "8b8.wav"]}, "docs-v2 enterprise sfx", endpoint="v1/enterprise/voice/sfx"),
    Submit("id under job_id", "tracked 9 at v7/images/fetch/9 (images)", wait(job_id=9), "Firebase function of flux-kontext", "C", "v7/images/image-to-image"),
    Submit("id under request_id", "tracked 9 at v6/images/fetch/9 (images)", wait(id=None, request_id=9), "client of v7", "C", "v6/images/img2img"),
    Submit("id under requestId", "tracked 9 at v6/images/fetch/9 (images)", wait(requestId="9"), "client of v6", "C", "v6/images/img2img"),
    Submit("pictures of the text server", "tracked 9 at v1/enterprise/fetch (enterprise)", wait(id=9), "docs-v2 enterprise fetch-queue-image", endpoint="v1/enterprise/text2img"),
    Submit("no family known", "tracked 9 at v6/fetch/9 (image)", wait(id=9), "where neither address nor endpoint is known", "C"),
)

FORMS: tuple[Submit, ...] = (
    Submit("training", "tracked F5jvdzGnYi at v3/fine_tune_status/F5jvdzGnYi (training)", {"status": "success", "messege": "deploying_gpu", "data": "it will take upto 30 minutes.", "training_id": "F5jvdzGnYi"}, "docs-v2 lora-finetune"),
    Submit("training by its webhook", "tracked F5jvdzGnYi at v3/fine_tune_status/F5jvdzGnYi (training/F5jvdzGnYi)", {"status": "success", "training_status": "deploying_gpu", "logs": "it will take upto 25 minutes", "model_id": "F5jvdzGnYi"}, "docs-v2 lora-finetune"),
    Submit("training beside another id", "tracked F5 at v3/fine_tune_status/F5 (training)", {"status": "success", "messege": "deploying_gpu", "id": 7, "training_id": "F5"}, "neighbour", "C"),
    Submit("chat in the queue", "tracked 49afc793-803b at v6/llm/get_queued_response (chat)", wait(message="", eta=5, meta={"chat_id": "49afc793-803b"}), "docs.modelslab.com/llm of 2024"),
    Submit("chat in the queue, id outside", "tracked 49afc793-803b at v6/llm/get_queued_response (chat)", wait(eta=5, chat_id="49afc793-803b"), "neighbour", "C"),
    Submit("chat that was answered", "not_trackable", {"id": "chatcmpl-1", "object": "chat.completion", "choices": []}, "docs-v2 llm-api"),
    Submit("message that was answered", "not_trackable", {"id": "chat-1", "object": "chat.completion.chunk", "choices": []}, "docs-v2 llm-api", "C"),
    Submit("remote procedure", "not_trackable", {"jsonrpc": "2.0", "id": 1, "result": {"content": []}}, "docs-v2 mcp-web-api"),
    Submit("envelope that is no job", "not_trackable", {"data": {"balance": 75.5}, "error": None, "meta": {}}, "docs-v2 agents-api"),
)

READY: tuple[Submit, ...] = (
    Submit("picture at once", "ready:1 66752945 at - (image)", ok([R2 + "0-1ec.png"], generationTime=1.96, id=66752945, proxy_links=[CDN + "0-1ec.png"], nsfw_content_detected=False), "captured in a client's tests", "B"),
    Submit("picture at once, family known", "ready:1 12345 at v6/images/fetch/12345 (images)", ok(["https://example.com/generated-image.png"], id=12345, generationTime=2.5), "prism-php/prism", "B", "v6/images/text2img"),
    Submit("voice at once under links", "ready:1 sha256 at - (image)", {"generationTime": 0.24, "links": [R2 + "a.wav"], "proxy_links": [], "status": "success"}, "docs-v2 enterprise voice-to-voice"),
    Submit("null id, family known", "ready:1 sha256 at - (images)", ok([R2 + "m.png"], id=None), "docs-v2 enterprise flux, neighbour", "C", "v6/images/text2img"),
    Submit("null id", "ready:1 sha256 at - (image)", ok([R2 + "m.glb"], id=None, warning=""), "docs-v2 enterprise text-to-3d"),
    Submit("id that can't be one", "ready:1 sha256 at - (image)", ok([R2 + "m.glb"], id=7.5), "neighbour: what is paid for is stored", "C"),
    Submit("outputs in an envelope", "ready:1 8 at - (image)", {"status": "success", "id": 8, "data": {"output": [R2 + "e.png"]}}, "client of v7", "B"),
    Submit("uploaded picture", "ready:1 2398 at - (image)", {"status": "success", "messege": "image uploaded", "link": R2 + "278.png", "request_id": 2398}, "docs-v2 base64-crop"),
)

REFUSED: tuple[Submit, ...] = (
    Submit("monthly limit", "refused", bad("Your monthly limit exceeded, upgrade subscription now on stablediffusionapi.com"), "Go bot", "B"),
    Submit("monthly limit without a status", "refused", {"message": "Your monthly limit exceeded, upgrade subscription now"}, "neighbour", "C"),
    Submit("queue of a plan", "refused", bad("Rate limit exceeded. Maximum 5 queued requests allowed.", retry_after=30), "docs-v2 rate-limits", status=429),
    Submit("failed, Try Again", "refused", {"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""}, "apifox"),
    Submit("validator's object", "refused", bad({"prompt": ["The prompt field is required."]}), "stablediffusionapi docs"),
    Submit("validator of the framework", "refused", {"message": "The prompt field is required.", "errors": {"prompt": ["required"]}}, "Laravel", "A", status=422),
    Submit("no reason but the code", "refused", {"detail": "Not today"}, "neighbour", "C", status=418),
    Submit("no credits", "refused", bad("Insufficient credits. Please add more credits to continue."), "docs-v2 error-codes", status=402),
    Submit("no credits as an error alone", "refused", {"error": "Insufficient credits"}, "neighbour", "C", status=400),
    Submit("plan", "refused", bad("This feature requires a premium subscription"), "docs-v2 error-codes", status=403),
    Submit("model that is not there", "refused", bad("Model not found: invalid_model_name"), "docs-v2 error-codes", status=400),
    Submit("server error", "refused", {"message": "Server Error"}, "client that looks for it", "B", status=500),
    Submit("wall", "refused", {"cloudflare_error": True, "status": 403, "title": "Error 1020: Access denied"}, "Cloudflare, structured errors", status=403),
    Submit("words to wait, and no id", "refused", bad("Your last request is still processing"), "neighbour", "C"),
    Submit("failed run", "refused", run("failed", error="Invalid prompt"), "docs-v2 workflows-api"),
)
OLD = "https://stablediffusionapi.com/api/v3/"
GIVEN: tuple[Submit, ...] = (
    Submit("picture of 2023", f"tracked 10684517 at {OLD}fetch/10684517 (image)", wait(eta=35.941116006399994, messege="m", fetch_result=OLD + "fetch/10684517", id=10684517, output=[], meta={"H": 512}), "captured in a story app", "B"),
    Submit("controlnet of version 5", f"tracked 13902970 at {OLD}fetch/13902970 (image)", wait(eta=146.5, fetch_result=OLD + "fetch/13902970", id=13902970, output=""), "docs of 2023"),
    Submit("three dimensions with empty parts", "tracked 134806910 at v6/3d/fetch/134806910 (3d)", wait(eta=9, fetch_result=V6 + "3d/fetch/134806910", output=[], id=134806910, extra_assets=[], future_links=["https://files.example/generations/a.bin"]), "docs-v2 3d"),
    Submit("ultra video of a server", "tracked 147 at v1/enterprise/ultra_video/fetch/147 (enterprise-ultra_video)", wait(eta=9, fetch_result=API + "v1/enterprise/ultra_video/fetch/147", output=[], id=147), "public client", "B"),
    Submit("address without a family", "tracked 12345 at v6/fetch/12345 (image)", wait(eta=9, fetch_result=V6 + "fetch/12345", output=[], id=12345), "vendor's own test, BerriAI/litellm#21760", "B"),
    Submit("no id at all, an address", "tracked 155262350 at v7/video-fusion/fetch/155262350 (video-fusion)", wait(eta=10, fetch_result=API + "v7/video-fusion/fetch/155262350", future_links=["https://files.example/generations/a.bin"]), "public client", "B"),
    Submit("address that names another id", "tracked 134711525 at v6/images/fetch/134711525 (images)", wait(eta=9, fetch_result=V6 + "images/fetch/134701497", output=[], id=134711525), "docs-v2 dreambooth-image-to-image"),
    Submit("training at its first step", "tracked F5jvdzGnYi at v3/fine_tune_status/F5jvdzGnYi (training)", {"status": "success", "messege": "deploying_gpu", "data": "", "training_id": "F5jvdzGnYi"}, "docs-v2 lora-finetune"),
    Submit("chat, id in its meta", "tracked 49afc793-803b-4b4a-bac9-d2f9318c2b8f at v6/llm/get_queued_response (chat)", wait(message="", eta=5, meta={"chat_id": "49afc793-803b-4b4a-bac9-d2f9318c2b8f"}), "docs.modelslab.com/llm of 2024"),
    Submit("finished chat", "not_trackable", {"id": "chat-abc123", "object": "chat.completion", "choices": []}, "docs-v2 llm-api", "C"),
    Submit("plan that has run out", "refused", bad("Your monthly limit exceeded, upgrade subscription now on stablediffusionapi.com"), "two bots", "B"),
    Submit("success with only a word", "tracked 7 at v6/fetch/7 (image)", ok(["success"], id=7), "neighbour", "C"),
    Submit("ready, proxies alone", "ready:1 13204 at - (image)", ok([], id=13204, proxy_links=["https://files.example/generations/a.bin"]), "docs-v2 enterprise fashion"),
)
# fmt: on
SUBMITS = (*NAMED, *BY_ENDPOINT, *FORMS, *READY, *REFUSED, *GIVEN)
