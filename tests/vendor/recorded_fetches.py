"""Answers to fetch calls from the vendor's documentation and from clients, with their meanings. One row per answer.

`sure`: A documented by the vendor, B captured or read in working code, C inferred. `{ID}` is the id of the job. The
notation of `means` is that of `tests.vendor.test_recorded_answers.describe`.
"""
# ruff: noqa: E501  # a table has one line per case

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

R2 = "https://pub-3626123a908346a7a8be8d9295f44e26.r2.dev/generations/"
CDN = "https://cdn2.stablediffusionapi.com/generations/"
S3 = "https://modelslab-bom.s3.amazonaws.com/generations/"
TIP = "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise"
BEHIND = "Your image is processing in background, you can get this image using fetch API"
LATER = "Try to fetch request after seconds estimated"
V6 = "https://modelslab.com/api/v6/"
CF = {
    "type": "https://developers.cloudflare.com/support/troubleshooting/http-status-codes/",
    "cloudflare_error": True,
    "zone": "modelslab.com",
}
NONE: Mapping[str, str] = MappingProxyType({})


class Fetch(NamedTuple):
    """One answer about a job."""

    name: str
    means: str
    body: object
    source: str
    sure: str = "A"
    status: int = 200
    headers: Mapping[str, str] = NONE
    training: bool = False


def ok(output: object, **more: object) -> dict[str, object]:
    return {"status": "success", "output": output, **more}


def wait(**more: object) -> dict[str, object]:
    return {"status": "processing", **more}


def bad(message: object, **more: object) -> dict[str, object]:
    return {"status": "error", "message": message, **more}


def run(status: str, **more: object) -> dict[str, object]:
    return {
        "status": "success",
        "execution": {"id": "{ID}", "workflow_id": "u-1", "status": status, "completed_at": None},
        **more,
    }


# fmt: off
DOCS: tuple[Fetch, ...] = (
    Fetch("flux, proxies by number", "ready:1 proxies:1", ok([R2 + "abc.png"], id="{ID}", generationTime=2.45, proxy_links={"0": CDN + "abc.png"}, meta={"seed": 1}), "docs-v2 flux-text-to-image"),
    Fetch("first steps", "ready:1", ok([R2 + "abc123.png"], id="{ID}", generationTime=2.45, meta={"prompt": "a"}), "docs-v2 quickstart"),
    Fetch("Go client's example", "ready:1 proxies:1", ok(["https://example.com/generated-image.jpg"], message="Image generated successfully", id="{ID}", generationTime=5.2, proxy_links=["https://cdn.example.com/image.jpg"], meta={}), "docs-v2 sdk/golang"),
    Fetch("webhook body of a video", "ready:1", ok([R2 + "abc123.mp4"], id="{ID}", generationTime=45.2, track_id="video_001", meta={}), "docs-v2 webhooks"),
    Fetch("webhook body of a failure", "failed", {"status": "failed", "id": "{ID}", "message": "Processing failed: Invalid input dimensions", "track_id": "video_001"}, "docs-v2 webhooks"),
    Fetch("skill's webhook body", "ready:1", ok(["https://modelslab.com/path/to/result.jpg"], id="{ID}", track_id="your_custom_track_id", meta={}), "ModelsLab/skills webhooks"),
    Fetch("text to video", "ready:1", ok([R2 + "video123.mp4"], id="{ID}", generationTime=45.2, meta={}), "docs-v2 text-to-video"),
    Fetch("head shot in temporary storage", "ready:1 proxies:1", ok([R2.replace("generations", "temp") + "8c3-0.png"], id="{ID}", generationTime=7.36, proxy_links=[CDN.replace("generations", "temp") + "8c3-0.png"], meta={}), "docs-v2 flux-headshot"),
    Fetch("animated picture as a video", "ready:1 proxies:1", ok([R2 + "2be.gif"], id="{ID}", proxy_links=[CDN + "2be.gif"]), "docs-v2 enterprise fetchvideo"),
    Fetch("video with the same link three times", "ready:1", ok([R2 + "v.mp4"], id="{ID}", generationTime=8.49, proxy_links=[R2 + "v.mp4"], future_links=[R2 + "v.mp4"], meta={}), "docs-v2 enterprise texttovideo"),
    Fetch("sound in the queue of a server", "processing eta:5 promised:1", {"eta": 5, "fileId": "8b8.wav", "links": [R2 + "8b8.wav"], "message": "Request has been queued", "meta": {"prompt": "a"}, "proxy_links": [CDN + "8b8.wav"], "seconds": None, "status": "queued", "taskId": "a35-88"}, "docs-v2 enterprise sfx"),
    Fetch("transcript", "ready:1 proxies:1", ok([R2 + "t.txt"], eta=5, id="{ID}", proxy_links=[R2 + "u.txt"], meta={}), "docs-v2 speech-to-text"),
    Fetch("transcript to come", "processing eta:5 promised:1", wait(tip=BEHIND, eta=5, message=LATER, fetch_result=V6 + "whisper/fetch/330711", id="{ID}", output=[], future_links=[R2 + "t.txt"], proxy_links=[R2 + "t.txt"]), "docs-v2 speech-to-text"),
    Fetch("voice under links", "ready:1", {"generationTime": 0.24, "links": [R2 + "a.wav"], "meta": {}, "proxy_links": [], "status": "success"}, "docs-v2 enterprise voice-to-voice"),
    Fetch("ultra video, ready in a bucket", "processing eta:960 promised:1", wait(tip=BEHIND, eta=960, message=LATER, fetch_result=V6 + "video/fetch/147", id="{ID}", output=[], meta={}, future_links=[S3 + "9fa.mp4"]), "docs-v2 image-to-video-ultra"),
    Fetch("upscaled, its proxy as text", "ready:1 proxies:1", ok([R2 + "up.png"], id="{ID}", generationTime=7.42, proxy_links=R2 + "up_p.png", meta={}), "docs-v2 super-resolution/make"),
    Fetch("flux server, null id", "ready:1 proxies:1", ok([R2 + "2ac-0.png"], warning="", id=None, generationTime=8.17, proxy_links=[CDN + "2ac-0.png"], nsfw_content_detected=False, webhook_status="", meta={}), "docs-v2 enterprise flux img2img"),
    Fetch("flux server, no id", "ready:1", ok([R2 + "x.png"], generationTime=1.32, meta={}), "docs-v2 enterprise flux text2img"),
    Fetch("realtime, to come", "processing eta:35 promised:1", wait(eta=35, message=LATER, fetch_result=V6 + "realtime/fetch/1241861", id="{ID}", output=[], future_links=[R2 + "f20-0.png"], proxy_links=[CDN + "f20-0.png"], meta={}), "docs-v2 realtime text-to-image"),
    Fetch("flux, its address names another id", "processing eta:35 promised:1", wait(eta=35, messege=LATER, fetch_result=V6 + "images/fetch/1241861", id=13441520, output=[], future_links=[R2 + "411-0.png"], proxy_links=[CDN + "411-0.png"], meta={}), "docs-v2 flux-text-to-image"),
    Fetch("output beside promised links", "ready:1", ok([R2.replace("generations", "livewire-tmp") + "o.png"], id="{ID}", future_links=[R2 + "o.png"], meta={}), "docs-v2 controlnet-multi"),
    Fetch("controlnet, output an empty text", "processing eta:0.25 promised:1", wait(tip=TIP, tip_1=BEHIND, eta=0.25, messege=LATER, fetch_result=V6 + "images/fetch/120540119", id="{ID}", output="", future_links=[R2 + "o.png"]), "docs-v2 controlnet-multi"),
    Fetch("picture at another host", "ready:1", ok(["https://d9jy2smsrdjcq.cloudfront.net/generations/0-875.png"], generationTime=9.07, id="{ID}", proxy_links="", nsfw_content_detected=False, webhook_status="", meta={}, tip=TIP), "docs-v2 dreambooth-image-to-image"),
    Fetch("adapters, long eta", "processing eta:13.068 promised:1", wait(tip=BEHIND, eta=13.067986918399999, messege=LATER, webhook_status="", fetch_result=V6 + "images/fetch/29763508", id="{ID}", output=[], meta={}, future_links=["https://cdn.stablediffusionapi.com/generations/0-d00.png"]), "docs-v2 dreambooth-lora-multi"),
    Fetch("both forms of waiting in one", "processing eta:2.75 promised:1", wait(message="try again later.", output=[], tip=TIP, eta=2.75, webhook_status="", fetch_result=V6 + "images/fetch/134701497", id=134711525, meta={}, future_links=[R2 + "c.png"]), "docs-v2 community-models openapi"),
    Fetch("face, no proxies", "processing eta:5 promised:1", wait(tip=BEHIND, eta=5, message=LATER, fetch_result=V6 + "image_editing/fetch/32", id="{ID}", output=[], future_links=[R2 + "h.png"], proxy_links=[], meta={}), "docs-v2 face-gen"),
    Fetch("mask, proxies an empty text", "processing eta:5 promised:1", wait(tip=BEHIND, eta=5, message=LATER, fetch_result=V6 + "image_editing/fetch/108", id="{ID}", output=[], future_links=[R2 + "m.png"], proxy_links="", meta={}), "docs-v2 mask-creator"),
    Fetch("model of three dimensions, to come", "processing eta:4 promised:1", wait(tip=BEHIND, eta=4, message=LATER, fetch_result=V6 + "3d/fetch/134806910", id="{ID}", output=[], meta={}, future_links=[R2.replace("generations", "out") + "125.glb"], extra_assets=[]), "docs-v2 text-to-3d"),
    Fetch("model of three dimensions with its parts", "ready:1", ok([R2 + "m.glb"], id=None, warning="", webhook_status="", extra_assets=[R2 + "m.ply"]), "docs-v2 enterprise text-to-3d"),
    Fetch("cropped picture", "ready:1", {"status": "success", "messege": "image uploaded", "link": R2 + "278.png", "request_id": 2398}, "docs-v2 base64-crop"),
    Fetch("uploaded picture", "ready:1", {"status": "success", "message": "image uploaded", "image_url": R2 + "278.png"}, "docs-v2 enterprise upload-image"),
    Fetch("voice with its length", "ready:1 proxies:1", ok([R2 + "451.wav"], generationTime=0.24, id="{ID}", proxy_links=[CDN + "451.wav"], audio_time=30, meta={}), "docs-v2 voice-to-voice"),
    Fetch("voice to come", "processing eta:35 promised:1", wait(tip=BEHIND, eta=35, message=LATER, fetch_result=V6 + "voice/fetch/1248951", id="{ID}", output=[], future_links=[R2 + "451.wav"], proxy_links=[CDN + "451.wav"]), "docs-v2 voice-to-voice"),
    Fetch("queued, in the newest words", "processing eta:30", wait(id="{ID}", eta=30, message="Your request is being processed"), "docs-v2 error-codes"),
    Fetch("video, in the newest words", "processing eta:60", wait(id="{ID}", eta=60, message="Your video is being generated"), "docs-v2 text-to-video"),
    Fetch("chat of a server", "empty", {"status": "success", "message": "<think>\nOkay, so the user asks for a guide. retry later", "meta": {}}, "docs-v2 deepseek-chat"),
    Fetch("uncensored chat", "empty", {"status": "success", "message": " Here is an example of a function that makes an API call: Invalid api key", "meta": {}}, "docs-v2 uncensored-chat"),
    Fetch("cache cleared", "empty", {"status": "success", "message": "Cache cleared successfully"}, "docs-v2 clear-cache"),
    Fetch("queue cleared", "empty", {"status": "success", "message": "Queue cleared, server is restarting"}, "docs-v2 clear-queue"),
    Fetch("server restarting", "empty", {"status": "success", "message": "Server restarting", "server_status": "restarting"}, "docs-v2 deepseek-chat"),
    Fetch("state of a server", "unread", {"model_count": 0, "queue_time": 0, "status": "ok"}, "docs-v2 flux-2-dev"),
    Fetch("state of a server that succeeds", "empty", {"status": "success", "model_count": 0, "queue_time": 0}, "docs-v2 face-gen openapi"),
    Fetch("balance", "empty", {"status": "success", "data": {"balance": 43.6, "currency": "USD"}}, "docs-v2 wallet-balance"),
    Fetch("list of models", "empty", {"status": "success", "messege": "model list", "data": []}, "docs-v2 train-model openapi"),
    Fetch("one model of a list", "unread", {"model_id": "midjourney", "status": "model_ready", "created_at": None, "model_name": "MidJourney V4"}, "docs-v2 model-list"),
    Fetch("payment done", "empty", {"status": "success", "messege": "Payment was charged successfuly", "purchased_models": 4, "used_models": 0}, "docs-v2 buy-model"),
    Fetch("picture deleted", "empty", {"status": "success", "messege": "image deleted"}, "docs-v2 delete-image"),
    Fetch("prompt check", "empty", {"status": "success", "is_cp": False, "is_nsfw": True, "original_prompt": "a", "filtered_prompt": "b"}, "docs-v2 nsfw-prompt-check"),
    Fetch("calls that are left", "empty", {"status": "success", "data": {"imagen": {"total_api_call": 999, "api_call_remaining": 0, "percentage_used": 100}}}, "docs-v2 subscribed-product"),
    Fetch("model load started", "empty", {"message": "model load started", "status": "success"}, "docs-v2 load-model"),
    Fetch("voice uploaded", "empty", {"status": "success", "message": "voice uploaded successfully", "voice_id": "jacob"}, "docs-v2 voice-upload"),
    Fetch("voices", "empty", {"status": "success", "voices": [{"voice_id": "actor", "name": "Actor", "language": "english"}]}, "docs-v2 voice-list"),
    Fetch("requests under way", "empty", {"status": "success", "processing_count": 3, "message": "Current processing request count retrieved successfully"}, "docs-v2 check-requests"),
    Fetch("missing prompt", "api_error", bad("prompt is required"), "docs-v2 error-codes", status=400),
    Fetch("prompt of a wrong type", "api_error", bad("prompt must be a string"), "docs-v2 error-codes", status=400),
    Fetch("width out of range", "api_error", bad("width must be between 256 and 1024"), "docs-v2 error-codes", status=400),
    Fetch("height no multiple", "api_error", bad("height must be divisible by 8"), "docs-v2 error-codes", status=400),
    Fetch("too many samples", "api_error", bad("samples must be between 1 and 4"), "docs-v2 error-codes", status=400),
    Fetch("guidance out of range", "api_error", bad("guidance_scale must be between 1 and 20"), "docs-v2 error-codes", status=400),
    Fetch("no such model", "api_error", bad("Model not found: invalid_model_name"), "docs-v2 error-codes", status=400),
    Fetch("no such model id", "api_error", bad("Model id not found"), "apifox, stablediffusionapi docs"),
    Fetch("source picture out of reach", "api_error", bad("Unable to fetch image from provided URL"), "docs-v2 error-codes", status=400),
    Fetch("any error", "api_error vague", bad("Human-readable error description"), "docs-v2 error-codes"),
    Fetch("error of a server", "api_error vague", bad("Error description"), "docs-v2 face-gen openapi"),
    Fetch("validator's sentence", "api_error", bad("The prompt field is required."), "docs-v2 realtime text-to-image"),
    Fetch("queue of a plan", "rate_limited 30", bad("Rate limit exceeded. Maximum 15 queued requests allowed.", retry_after=30), "docs-v2 rate-limits", status=429),
    Fetch("limit of a workflow", "rate_limited 12", bad("Rate limit exceeded", retry_after=12), "docs-v2 workflows-api", status=429),
    Fetch("envelope of a declined card", "api_error vague", {"data": None, "error": {"code": "payment_declined", "message": "Your card was declined.", "details": {"decline_code": "generic"}}}, "docs-v2 agents-api", status=422),
    Fetch("envelope of a validator", "api_error vague", {"data": None, "error": {"code": "validation_error", "message": "Human readable message", "details": {}}, "meta": {}}, "docs-v2 agents-api", status=422),
    Fetch("envelope of a limit", "rate_limited 20", {"data": None, "error": {"code": "rate_limit_exceeded", "message": "Slow", "retry_after": 20}, "meta": {}}, "docs-v2 agents-api, with another code", "C", 400),
    Fetch("envelope of a token", "account_refused key", {"data": None, "error": {"code": "unauthenticated", "message": "No token"}, "meta": {}}, "docs-v2 agents-api"),
    Fetch("envelope without an error", "unread", {"data": {"field": "value"}, "error": None}, "ModelsLab/modelslab-cli CLAUDE.md"),
    Fetch("remote procedure without a key", "account_refused key", {"jsonrpc": "2.0", "id": 1, "error": {"code": -32600, "message": "Authentication required. Please provide a valid API key."}}, "docs-v2 mcp-web-api", status=401),
    Fetch("run under way", "processing", run("running", steps=[{"name": "Text to Image", "status": "completed"}]), "docs-v2 workflows-api"),
    Fetch("run waiting", "processing", run("pending"), "docs-v2 workflows-api"),
    Fetch("run done", "ready:1 proxies:1", run("completed", output={"output": ["https://cdn.modelslab.com/generated/image1.png"], "proxy_links": ["https://cdn.modelslab.com/proxy/image1.png"], "status": "success"}), "docs-v2 workflows-api"),
    Fetch("run failed", "failed", run("failed", error="Image generation failed: Invalid prompt"), "docs-v2 workflows-api"),
    Fetch("run cancelled", "failed", run("cancelled"), "docs-v2 workflows-api"),
    Fetch("run is cancelled now", "empty", {"status": "success", "message": "Execution cancelled."}, "docs-v2 cancel-execution"),
    Fetch("run's webhook", "unread", {"event": "workflow.completed", "execution_id": 12345, "workflow_id": "u", "status": "completed", "output": {"output": ["https://cdn.modelslab.com/generated/image1.png"]}}, "docs-v2 workflows overview"),
    *(Fetch(f"training, {word}", "processing", {"status": "success", "training_status": word, "logs": "it will take upto 25 minutes", "model_id": "F5jvdzGnYi"}, "docs-v2 lora-finetune", training=True)
      for word in ("deploying_gpu", "training_started", "training_success", "trained_model_compressing", "trained_model_uploading", "trained_model_uploaded", "deploying_model")),
    Fetch("training ready, with its steps", "ready:0", {"status": "success", "messege": "model_ready", "data": "Step:1 Training Started, 5 Steps to go : ETA : 30 minutes\nStep:2"}, "docs-v2 train-model openapi", training=True),
)

CODE: tuple[Fetch, ...] = (
    Fetch("realtime picture", "ready:1 proxies:1", ok([R2 + "604-0.png"], generationTime=0.65, id="{ID}", proxy_links=[CDN + "604-0.png"], meta={"seed": 1373787908}), "captured in a chat app", "B"),
    Fetch("speech", "ready:1 proxies:1", ok([R2 + "b2d.wav"], generationTime=1.9, id="{ID}", proxy_links=[CDN + "b2d.wav"], meta={"input_sound_clip": ["tmp/0-b2d.wav"]}), "captured in a voice app's notes", "B"),
    Fetch("four pictures of 1024, to come", "processing eta:81.8557", wait(tip=BEHIND, eta=81.8557122048, messege=LATER, fetch_result="https://stablediffusionapi.com/api/v3/fetch/41147071", id=41147071, output=[], meta={"n_samples": 4}), "captured in a Node service", "B"),
    Fetch("community model, to come", "processing eta:20.938", wait(tip=BEHIND, eta=20.9379869184, messege=LATER, webhook_status="", fetch_result="https://stablediffusionapi.com/api/v3/dreambooth/fetch/32798037", id=32798037, output=[], meta={}), "captured in a web app", "B"),
    Fetch("2023's words of waiting", "processing eta:35.9411", wait(tip="for faster speed, keep resolution upto 512x512", eta=35.941116006399994, messege="Try to fetch request after given estimated time", id=10684517, output=[]), "captured in a story app", "B"),
    Fetch("escaped slashes", "processing eta:6 promised:1", '{"status":"processing","eta":6,"messege":"Try to fetch request after seconds estimated","id":65704373,"output":"","future_links":["https:\\/\\/pub-3626.r2.dev\\/generations\\/0a1.mp4"]}', "captured in a client's tests", "B"),
    Fetch("video of 2025", "processing eta:416.94 promised:1", wait(eta=416.94, message=LATER, id=155918900, output=[], meta={}, future_links=[R2 + "w.mp4"]), "captured in a video app", "B"),
    Fetch("processing, in its own words", "processing", wait(messege="Request processing"), "captured in a community client", "B"),
    Fetch("failed, Try Again alone", "failed recoverable", {"status": "failed", "message": "Try Again"}, "joelkraj/anifactory-goldflow", "B"),
    Fetch("failed, in a sentence", "failed recoverable", {"status": "failed", "id": "", "messege": "Generation failed, please try again", "output": ""}, "neighbour of Failed, Try Again", "C"),
    Fetch("failed, server busy", "failed recoverable", {"status": "failed", "message": "GPU is busy"}, "neighbour of Failed, Try Again", "C"),
    Fetch("final failure", "failed", {"status": "failed", "message": "CUDA out of memory"}, "any other failure is final: anifactory-goldflow", "B"),
    Fetch("words of a month's limit", "account_refused plan", {"status": "error", "messege": "Your monthly limit exceeded, upgrade subscription now on https://stablediffusionapi.com/pricing"}, "Go bot that changes its key then", "B"),
    Fetch("current queue", "api_down answered", bad("current_queue is 15"), "joelkraj/anifactory-goldflow", "B"),
    Fetch("service of a voice", "api_down answered", bad("Service qwen-tts is not available, try again later"), "joelkraj/anifactory-goldflow", "B"),
    Fetch("too many, under 503", "rate_limited 30", bad("Too many requests"), "joelkraj/anifactory-goldflow", "B", 503),
    Fetch("half an hour", "rate_limited 900", bad("Rate limit: try again in 30 minutes"), "test data of a render pipeline", "C", 429),
    Fetch("asked for a number", "api_error", bad({"resolution": ["The resolution must be a number."]}), "OpenMontage, said of the live API", "B"),
    Fetch("blocked by policy", "api_error", bad("Your prompt violates our content policy"), "clients that look for policy, nsfw, blocked", "B", 403),
    Fetch("outputs in an envelope", "ready:1", {"status": "success", "data": {"output": [R2 + "e.png"]}}, "client of v7 that reads data.output", "B"),
    Fetch("outputs in a result", "ready:1", {"status": "success", "result": {"output": {"0": R2 + "e.png"}}}, "client of v7 that reads result.output", "B"),
    Fetch("outputs as images in an envelope", "ready:2", {"status": "success", "output": [], "data": {"images": [R2 + "1.png", R2 + "2.png"], "seed": 5}}, "Firebase function of flux-kontext", "B"),
    Fetch("one image, no list", "ready:1", {"status": "success", "image": R2 + "1.png"}, "Firebase function of flux-kontext", "B"),
    Fetch("video at its own name", "ready:1", {"status": "success", "output": "", "video_url": R2 + "1.mp4"}, "clients of video", "C"),
    Fetch("outputs that meta repeats", "ready:1", {"status": "success", "output": [], "links": [], "meta": {"output": [R2 + "1.mp4"], "init_image": R2 + "in.png"}}, "Deno function of wan2.2", "B"),
    Fetch("inputs that meta repeats", "empty", {"status": "success", "output": [], "meta": {"init_image": R2 + "in.png", "image": R2 + "in.png"}}, "guard of the row above", "C"),
    Fetch("output as an object of numbers", "ready:2", ok({"0": R2 + "1.png", "1": R2 + "2.png"}), "client that reads Object.values(output)", "B"),
    Fetch("output_url beside an empty output", "ready:1", ok([], output_url=R2 + "1.mp3"), "AnythingLLM speech, modelslab-cli", "A"),
    Fetch("only a promise", "empty promised:1", ok([], future_links=[R2 + "1.mp4"]), "modelslab-cli reads future_links last", "A"),
    Fetch("promise as an object", "empty promised:1", ok("", future_links={"0": R2 + "1.mp4"}), "client that reads Object.values(future_links)", "B"),
    Fetch("client's tests: two pictures", "ready:2", ok(["https://example.com/image-1.png", "https://example.com/image-2.png"], id="{ID}"), "prism-php/prism", "B"),
    Fetch("404 of the vendor's tests", "api_down", {"message": "Not found"}, "ModelsLab/modelslab-cli client_test.go", "A", 404),
    Fetch("429 of the vendor's tests", "rate_limited 30", {"message": "Too many requests"}, "ModelsLab/modelslab-cli client_test.go", "A", 429),
    Fetch("500 of the vendor's tests", "api_down", {"message": "Server error"}, "ModelsLab/modelslab-cli client_test.go", "A", 500),
    Fetch("401 of the vendor's tests", "account_refused key", {"message": "Token expired"}, "ModelsLab/modelslab-cli client_test.go", "A", 401),
    Fetch("402 of the vendor's tests", "account_refused credits", {"message": "Insufficient balance"}, "ModelsLab/modelslab-cli client_test.go", "A", 402),
    Fetch("400 of the vendor's tests", "api_error vague", {"error": "Bad request"}, "ModelsLab/modelslab-cli client_test.go", "A", 400),
    Fetch("no credits, without a status", "account_refused credits", {"message": "Insufficient balance"}, "the same, from an API that answers 200", "C"),
    Fetch("unknown id without a status", "unknown_id", {"message": "Request not found"}, "captured text, without its status", "C", 400),
    Fetch("job of another account", "unknown_id", bad("This request does not belong to you"), "says nothing about the account", "C", 403),
    Fetch("unknown id in other words", "unknown_id", bad("Invalid request id"), "neighbour of Request not found", "C"),
    Fetch("picture as base64", "ready:1", ok(["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="]), "clients that ask for base64", "B"),
    Fetch("the word null as output", "empty", ok("null", id="{ID}"), "neighbour of an empty output", "C"),
    Fetch("addresses in one text", "ready:2", ok(R2 + "1.png, " + R2 + "2.png"), "neighbour of output as one text", "C"),
    Fetch("three dimensions under their name", "ready:1", ok({"model": R2 + "mesh.glb", "preview": R2 + "p.png"}), "neighbour of words that are no addresses", "C"),
    Fetch("model that was used", "ready:1", ok({"url": R2 + "1.png", "model": "https://huggingface.co/x/y"}), "guard of the row above", "C"),
    Fetch("error that means to wait", "processing", bad("Your image is still processing"), "neighbour of try again later", "C"),
    Fetch("training ready under its first name", "ready:0", {"status": "success", "model_training_status": "model_ready", "test_image": R2 + "t.png"}, "client of 2023", "B", training=True),
    Fetch("training failed under its first name", "failed", {"status": "success", "model_training_status": "training_failed", "data": "Training Failed:  Valid image links less than 3"}, "client of 2023", "C", training=True),
    Fetch("training failed as status", "failed", {"status": "training_failed", "data": "no GPU"}, "neighbour", "C", training=True),
    Fetch("training that may yet go on", "failed recoverable", {"status": "failed", "message": "Failed, Try Again"}, "neighbour", "C", training=True),
    Fetch("training failed under the name of its webhook", "failed", {"status": "success", "training_status": "failed", "message": "try again"}, "neighbour", "C", training=True),
    Fetch("chat with the id of a message", "ready:1", ok([R2 + "c.json"], id="msg-1", chat_id="{ID}"), "docs.modelslab.com/llm of 2024, with an id", "C"),
    Fetch("chat of another account", "another_job", ok([R2 + "c.json"], id="msg-1", chat_id="c-2"), "guard of the row above", "C"),
    Fetch("list as a text", "ready:2", ok('["https://h/1.png", "https://h/2.png"]', id="{ID}"), "neighbour of output as one text", "C"),
    Fetch("object as a text", "ready:1", ok('{"url": "https://h/1.png"}', id="{ID}"), "neighbour of output as one text", "C"),
    Fetch("success that is true", "ready:1", {"success": True, "output": [R2 + "1.png"]}, "envelope of a gateway of many APIs", "C"),
    Fetch("status that is true", "ready:1", {"status": True, "output": [R2 + "1.png"]}, "neighbour", "C"),
    Fetch("spam filter in its tips alone", "rate_limited 30", {"status": "error", "tips": "you are sending same request multiple times, spam filter is enabled, please wait for 30 seconds and try again"}, "neighbour of the old docs' messege", "C"),
    Fetch("error whose words are data", "account_refused credits", {"status": "error", "data": {"message": "Insufficient credits"}}, "neighbour", "C"),
    Fetch("too slow a request", "api_down", {"status": "error", "message": "Something"}, "HTTP", "C", 408),
    Fetch("credentials", "account_refused key", {"detail": "Authentication credentials were not provided."}, "gateways of Django", "C"),
    Fetch("execution that is no run", "ready:1", ok([R2 + "e.png"], id="{ID}", execution={"seconds": 1.5}), "neighbour of a workflow's run", "C"),
    Fetch("training without its key", "account_refused key", bad("Invalid Api Key"), "neighbour", "C", 401, training=True),
)

NETWORK: tuple[Fetch, ...] = (
    Fetch("wall: too many", "rate_limited 45", {**CF, "status": 429, "title": "Error 1015: You are being rate limited", "error_code": 1015, "retryable": True, "retry_after": 45}, "Cloudflare, structured errors", "A", 429),
    Fetch("wall: access denied", "api_down", {**CF, "status": 403, "title": "Error 1020: Access denied", "error_code": 1020, "retryable": False}, "Cloudflare, structured errors", "A", 403),
    Fetch("wall: signature", "api_down", {**CF, "status": 403, "title": "Error 1010: Access denied", "detail": "The site owner has blocked access based on your browser's signature. Your account is blocked", "error_code": 1010}, "Cloudflare, structured errors", "A", 403),
    Fetch("wall: name by type alone", "api_down", {"type": CF["type"], "status": 403, "title": "Forbidden"}, "Cloudflare, structured errors", "C", 403),
    Fetch("wall: origin is slow", "api_down", {**CF, "status": 524, "title": "Error 524: A timeout occurred", "error_category": "origin", "retryable": True, "retry_after": 60}, "Cloudflare, structured errors", "A", 524),
    Fetch("wall: a line", "rate_limited 30", "error code: 1015", "Cloudflare, plain text", "A", 429),
    Fetch("wall: a line of a refusal", "unread", "error code: 1020", "Cloudflare, plain text", "A", 403),
    Fetch("wall: a page", "api_down", "<!DOCTYPE html><title>Attention Required! | Cloudflare</title>", "Cloudflare, page", "A", 403),
    Fetch("gateway", "api_down", "<html><head><title>502 Bad Gateway</title></head></html>", "nginx", "B", 502),
    Fetch("too large a body", "api_down", "<html><title>413 Request Entity Too Large</title></html>", "nginx", "B", 413),
    Fetch("throttled", "rate_limited 17", {"message": "Too Many Attempts."}, "Laravel's throttle", "A", 429, {"Retry-After": "17", "X-RateLimit-Remaining": "0"}),
    Fetch("seconds that are left", "rate_limited 25", {"message": "Too Many Attempts."}, "RateLimit-Reset as IETF drafts have it", "C", 429, {"X-RateLimit-Reset": "25"}),
    Fetch("maintenance", "api_down", {"message": "Service Unavailable"}, "Laravel's maintenance", "A", 503),
    Fetch("wrong method", "api_down", {"message": "The GET method is not supported for route api/v6/images/fetch/1. Supported methods: POST."}, "Laravel", "A", 405),
    Fetch("validator of the framework", "api_error", {"message": "The request id field is required.", "errors": {"request_id": ["The request id field is required."]}}, "Laravel", "A", 422),
    Fetch("page has expired", "unread", {"message": "CSRF token mismatch."}, "Laravel", "A", 419),
    Fetch("exception of the framework", "api_down", {"message": "SQLSTATE[HY000] [2002] Connection refused", "exception": "Illuminate\\Database\\QueryException"}, "Laravel", "A", 500),
    Fetch("no row", "unknown_id", {"message": "No query results for model [App\\Models\\Generation] 7"}, "Laravel", "A", 404),
    Fetch("moved", "api_down", "", "old host that moves to the new one", "C", 301, {"Location": "https://modelslab.com/api/v3/fetch/7"}),
)
GIVEN: tuple[Fetch, ...] = (
    Fetch("plan that has run out", "account_refused plan", bad("Your monthly limit exceeded, upgrade subscription now on https://stablediffusionapi.com/pricing"), "two bots", "B"),
    Fetch("plan that has run out, bare", "account_refused plan", {"message": "Your monthly limit exceeded, upgrade subscription now on stablediffusionapi.com"}, "client that reads it from a failed call", "C", 400),
    Fetch("queue limit is a pause", "rate_limited 30", bad("Rate limit exceeded. Maximum 15 queued requests allowed.", retry_after=30), "docs-v2 rate-limits", status=429),
    Fetch("trained, with a test picture", "ready:0", {"status": "success", "model_training_status": "model_ready", "test_image": R2 + "{ID}.png"}, "client of 2023", "B", training=True),
    Fetch("training that failed under messege", "failed", {"status": "success", "messege": "training_failed", "data": "Training Failed:  Valid image links less than 3"}, "words of a client's webhooks", "C", training=True),
    Fetch("training at its last step", "processing", {"status": "success", "messege": "deploying_model", "data": ""}, "docs-v2 train-model openapi", training=True),
    Fetch("refusal in an envelope", "account_refused key", {"data": None, "error": {"code": "unauthenticated", "message": "x"}, "meta": {}}, "docs-v2 agents-api", status=401),
    Fetch("success inside the output", "ready:1 proxies:1", ok({"status": "success", "output": [R2 + "{ID}.png"], "proxy_links": [R2 + "{ID}.png?p=1"]}, id="{ID}"), "shape of docs-v2 workflows-api", "C"),
    Fetch("words that were spoken", "empty", ok([{"text": "A sentence.", "words": [{"word": "A", "start": 0.1, "end": 0.28, "confidence": 0.99}]}], id="{ID}", generationTime=1.25), "joelkraj/anifactory-goldflow", "B"),
    Fetch("purse that is empty", "account_refused credits", bad("Insufficient credits. Please recharge your wallet."), "joelkraj/anifactory-goldflow", "C"),
    Fetch("speech without a mark", "empty", ok("so we went down to the river and then it was time to go home again because of the rain"), "neighbour of words that were spoken", "C"),
    Fetch("the word OK as output", "empty", ok("OK", id="{ID}"), "neighbour of an empty output", "C"),
    Fetch("queue that is full", "api_down answered", bad("Queue is full, try again later"), "joelkraj/anifactory-goldflow", "C"),
)
# fmt: on
FETCHES = (*DOCS, *CODE, *NETWORK, *GIVEN)
