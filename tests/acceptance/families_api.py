"""A fake of the hosted API with all its families, written from its documents. Ids repeat between families.

Runs as a program (`python tests/acceptance/families_api.py --key KEY`, which prints its port as one JSON line) until
standard input closes. It is independent of the product: it uses only the standard library.
"""

import argparse
import hashlib
import json
import re
import struct
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

TIP = "Get 20x faster image generation using enterprise plan. Click here : https://modelslab.com/enterprise"
IMAGES_FROM = 134_686_749  # first id of images, which share a counter over all versions of the API
OTHERS_FROM = 298  # first id of each other family, as the documents of two of them show
IMAGES = ("v3/", "v6/images/", "v6/realtime/", "v7/images/")
SECONDS = 1.0  # from an order until its job is ready


@dataclass(frozen=True, slots=True)
class ApiFamily:
    """A family as its documents describe it. Paths are relative to `/api/`; in `fetch`, `{id}` is the job's id.

    `answer` and `ready` name the forms of its answers. `alone` means that the answer to an order is enough to find the
    fetch URL of its job.
    """

    order: str
    fetch: str
    media_type: str
    answer: str = "plain"
    ready: str = "list"
    method: str = "POST"
    id_field: str = ""
    label: str = "messege"
    named: str = ""  # the path in `fetch_result`, if it differs from `fetch`
    video: bool = False
    alone: bool = True


PNG, MP4, WAV, GLB = "image/png", "video/mp4", "audio/wav", "model/gltf-binary"
TXT, JSON_TEXT, SRT, VTT = "text/plain", "application/json", "application/x-subrip", "text/vtt"

FAMILIES: tuple[ApiFamily, ...] = (
    ApiFamily("v3/text2img", "v3/fetch/{id}", PNG),
    ApiFamily("v3/img2img", "v3/fetch/{id}", PNG),
    ApiFamily("v3/inpaint", "v3/fetch/{id}", PNG),
    ApiFamily("v3/text2video", "v3/fetch/{id}", MP4, answer="empty text", video=True),
    ApiFamily("v3/dreambooth", "v3/dreambooth/fetch/{id}", PNG),
    ApiFamily("v4/dreambooth", "v4/dreambooth/fetch", PNG, id_field="request_id", named="v3/dreambooth/fetch/{id}"),
    ApiFamily("v5/controlnet", "v3/fetch/{id}", PNG, answer="empty text"),
    ApiFamily("v5/super_resolution", "v3/fetch/{id}", PNG, answer="empty text", ready="text"),
    ApiFamily("v5/text2video", "v3/fetch/{id}", MP4, answer="empty text", video=True),
    ApiFamily("v6/images/text2img", "v6/images/fetch/{id}", PNG),
    ApiFamily("v6/images/flux", "v6/images/fetch/{id}", PNG, answer="newest", ready="proxies object", alone=False),
    ApiFamily("v6/realtime/text2img", "v6/realtime/fetch/{id}", PNG, ready="no id"),
    ApiFamily("v6/image_editing/outpaint", "v6/image_editing/fetch/{id}", PNG, ready="proxy text"),
    ApiFamily("v6/image_editing/fashion", "v6/image_editing/fetch/{id}", PNG),
    ApiFamily("v6/interior/make", "v6/interior/fetch/{id}", PNG),
    ApiFamily("v6/deepfake/single_video_swap", "v6/deepfake/fetch/{id}", MP4, ready="proxies null"),
    ApiFamily("v6/faceswap/multiple_face_swap", "v6/faceswap/fetch/{id}", PNG),
    ApiFamily("v6/video/text2video", "v6/video/fetch/{id}", MP4, label="message", video=True),
    ApiFamily("v6/video/img2video_ultra", "v6/video/fetch/{id}", MP4, answer="newest", label="message", video=True,
              alone=False),
    ApiFamily("v6/voice/text_to_speech", "v6/voice/fetch/{id}", WAV, label="message"),
    ApiFamily("v6/voice/music_gen", "v6/voice/fetch/{id}", WAV, label="message", ready="links"),
    ApiFamily("v6/voice/speech_to_text", "v6/whisper/fetch/{id}", TXT, label="message"),
    ApiFamily("v6/3d/text_to_3d", "v6/3d/fetch/{id}", GLB, answer="extra assets", ready="id null"),
    ApiFamily("v6/llm/chat", "v6/llm/get_queued_response", JSON_TEXT, answer="chat", id_field="chat_id"),
    ApiFamily("v7/images/text-to-image", "v7/images/fetch/{id}", PNG, answer="newest", alone=False),
    ApiFamily("v7/video-fusion/text-to-video", "v7/video-fusion/fetch/{id}", MP4, answer="nameless", label="message",
              video=True),
    ApiFamily("v7/voice/speech-to-text", "v7/voice/fetch/{id}", SRT, label="message"),
    ApiFamily("v7/voice/text-to-speech", "v7/voice/fetch/{id}", WAV, label="message"),
    ApiFamily("v1/enterprise/text2img", "v1/enterprise/fetch", PNG, answer="newest", id_field="request_id",
              alone=False),
    ApiFamily("v1/enterprise/flux/text2img", "v1/enterprise/flux/fetch/{id}", PNG, ready="no id"),
    ApiFamily("v1/enterprise/ultra_video/text2video", "v1/enterprise/ultra_video/fetch/{id}", MP4, video=True),
    ApiFamily("v1/enterprise/voice/sfx", "v1/enterprise/voice/fetch/{id}", WAV, answer="task", ready="links",
              label="message", alone=False),
    ApiFamily("v1/enterprise/speech_to_text/transcribe", "v1/enterprise/speech_to_text/fetch/{id}", VTT),
    ApiFamily("v1/enterprise/3d/text_to_3d", "v1/enterprise/3d/fetch/{id}", GLB, ready="id null"),
    ApiFamily("v1/enterprise/super_resolution/make", "v1/enterprise/super_resolution/fetch/{id}", PNG, ready="text"),
    ApiFamily("v3/fine_tune", "v3/fine_tune_status/{id}", "", answer="training", ready="model"),
    ApiFamily("v3/lora_fine_tune", "v3/fine_tune_status/{id}", "", answer="training", ready="lora model"),
    ApiFamily("v1/workflows/upscale/run", "v1/workflows/upscale/runs/{id}", PNG, answer="workflow", ready="execution",
              method="GET"),
)  # fmt: skip
ENDINGS = {PNG: "png", MP4: "mp4", WAV: "wav", GLB: "glb", TXT: "txt", JSON_TEXT: "json", SRT: "srt", VTT: "vtt"}
STATES = ("deploying_gpu", "training_started", "trained_model_uploading", "deploying_model")


@dataclass(frozen=True, slots=True)
class ReceivedOrder:
    """An accepted order."""

    family: int  # index in FAMILIES
    remote_id: str
    at: float


@dataclass(frozen=True, slots=True)
class FamilyCall:
    """A fetch call: its method, its path below `/api/`, its body without the key, and the order that it is for."""

    method: str
    path: str
    body: dict[str, Any]
    key_is_right: bool
    order: int  # index in the orders, or -1 if there is no such order


def content(media_type: str, text: str) -> bytes:
    """Return a small complete file of a media type that contains or depends on the text."""
    noise = hashlib.sha256(text.encode()).digest()
    match media_type:
        case "image/png":
            rows = b"".join(b"\0" + noise[row * 6 : row * 6 + 6] for row in range(2))
            parts = (
                (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)),
                (b"IDAT", zlib.compress(rows)),
                (b"IEND", b""),
            )
            return b"\x89PNG\r\n\x1a\n" + b"".join(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in parts
            )
        case "video/mp4":
            boxes = ((b"ftyp", b"isom\0\0\2\0isommp42"), (b"moov", b""), (b"mdat", noise))
            return b"".join(struct.pack(">I", 8 + len(data)) + kind + data for kind, data in boxes)
        case "audio/wav":
            form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
            sound = b"data" + struct.pack("<I", len(noise)) + noise
            return b"RIFF" + struct.pack("<I", 4 + len(form + sound)) + b"WAVE" + form + sound
        case "model/gltf-binary":
            header = json.dumps({"asset": {"version": "2.0", "extras": noise.hex()}}).encode()
            header += b" " * (-len(header) % 4)
            return b"glTF" + struct.pack("<II", 2, 20 + len(header)) + struct.pack("<I", len(header)) + b"JSON" + header
        case "application/json":
            return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        case "application/x-subrip":
            return f"1\n00:00:00,000 --> 00:00:02,000\n{text}\n".encode()
        case "text/vtt":
            return f"WEBVTT\n\n00:00.000 --> 00:02.000\n{text}\n".encode()
        case _:
            return f"What was said: {text}\n".encode()


class Api:
    """The state of the API: orders and recorded calls."""

    def __init__(self, key: str) -> None:
        self.key, self.base = key, ""
        self.orders: list[ReceivedOrder] = []
        self.calls: list[FamilyCall] = []
        self.strays: list[str] = []
        self.keys_at_files: list[str] = []
        self.lock = threading.Lock()

    def accept_order(self, family_index: int) -> tuple[int, dict[str, Any]]:
        """Accept an order. Return the HTTP status and body of the answer."""
        family, store = FAMILIES[family_index], FAMILIES[family_index].fetch
        with self.lock:
            stores = [FAMILIES[order.family].fetch for order in self.orders]
            if store.startswith(IMAGES):
                number = IMAGES_FROM + sum(fetch.startswith(IMAGES) for fetch in stores)
            else:
                number = OTHERS_FROM + stores.count(store)
            is_text = family.answer in ("training", "chat", "task") or store.startswith("v7/images")
            remote_id = f"{family_index:02}-{number}-f5jvdz" if is_text else str(number)
            order = ReceivedOrder(family_index, remote_id, time.time())
            self.orders.append(order)
        shown_id: object = remote_id if is_text else number
        fetch_url = f"{self.base}/api/{(family.named or family.fetch).replace('{id}', remote_id)}"
        plain: dict[str, Any] = {"status": "processing", "tip": TIP, "eta": 2.75}
        plain |= {family.label: "Try to fetch request after seconds estimated", "webhook_status": ""}
        plain |= {"fetch_result": fetch_url, "id": shown_id, "output": [], "meta": {"prompt": "Server Error"}}
        link = self._links(order)
        match family.answer:
            case "empty text":
                return 200, plain | {"output": "", "future_links": link}
            case "newest":
                return 200, {
                    "status": "processing",
                    "id": shown_id,
                    "eta": 30,
                    "message": "Your request is being processed",
                }
            case "nameless":
                del plain["id"]
                return 200, plain | {"future_links": link}
            case "extra assets":
                return 200, plain | {"extra_assets": [], "future_links": link}
            case "chat":
                return 200, {"status": "processing", "eta": 5, "meta": {"chat_id": shown_id}}
            case "task":
                return 200, {"status": "queued", "eta": 5, "taskId": shown_id, "links": link, "proxy_links": link,
                             "message": "Request has been queued", "seconds": None, "meta": {}}  # fmt: skip
            case "training":
                answer = {"status": "success", "messege": "deploying_gpu", "data": "it will take upto 30 minutes."}
                return 200, answer | {"training_id": shown_id}
            case "workflow":
                return 202, {
                    "status": "success",
                    "execution_id": number,
                    "workflow_id": "upscale",
                    "status_url": fetch_url,
                }
            case _:
                return 200, plain

    def fetch_answer(self, order: ReceivedOrder, now: float, previous_calls: int) -> dict[str, Any]:
        """Return the answer to a fetch call, given the number of previous calls for the job."""
        family, shown_id = FAMILIES[order.family], _shown_id(order.remote_id)
        ready, link = now >= order.at + SECONDS, self._links(order)
        if family.answer == "training":
            name = "model_training_status" if family.ready == "lora model" else "messege"
            state = "model_ready" if ready else STATES[previous_calls % len(STATES)]
            return {"status": "success", name: state, "data": " /n Step:1 Training Started", "training_id": shown_id}
        if family.answer == "workflow":
            run: dict[str, Any] = {"id": shown_id, "status": "completed" if ready else "running"}
            return {"status": "success", "execution": run | ({"output": {"output": link}} if ready else {})}
        if not ready:
            return {"status": "processing", "message": "try again later.", "output": "", "tip": TIP}
        success: dict[str, Any] = {"status": "success", "id": shown_id, "output": link}
        match family.ready:
            case "text":
                return success | {"output": link[0]}
            case "links":
                del success["output"]
                return success | {"links": link, "proxy_links": link}
            case "no id":
                del success["id"]
                return success
            case "id null":
                return success | {"id": None, "warning": ""}
            case "proxy text":
                return success | {"proxy_links": link[0]}
            case "proxies null":
                return success | {"proxy_links": None, "tip": "http://sdapi_backend.test/enterprise"}
            case "proxies object":
                return success | {"proxy_links": {"0": link[0]}}
            case _:
                return success

    def find(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int | None, bool]:
        """Return the index of the order that a call is for, and whether its path is a known fetch path."""
        is_fetch_path = False
        for index, order in enumerate(self.orders):
            family = FAMILIES[order.family]
            for fetch in filter(None, (family.fetch, family.named)):
                by_body = "{id}" not in fetch
                pattern = re.escape(fetch).replace(r"\{id\}", "([A-Za-z0-9_-]+)")
                match = re.fullmatch(pattern, path) if method == family.method else None
                if match is None:
                    continue
                is_fetch_path = True
                if str(body.get(family.id_field, "")) == order.remote_id if by_body else match[1] == order.remote_id:
                    return index, True
        return None, is_fetch_path

    def _links(self, order: ReceivedOrder) -> list[str]:
        ending = ENDINGS.get(FAMILIES[order.family].media_type, "bin")
        return [f"{self.base}/files/{order.family}.{order.remote_id}.{ending}"]


def _shown_id(remote_id: str) -> int | str:
    return int(remote_id) if remote_id.isdecimal() else remote_id


class FamiliesHandler(BaseHTTPRequestHandler):
    """Handles orders, fetch calls and files, and /control/ledger for the test program."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ClassVar[Api]

    def log_message(self, *_: object) -> None:
        """Do not log requests; the ledger records them."""

    def do_POST(self) -> None:
        """Accept an order, or answer a fetch call."""
        path = self.path.removeprefix("/api/")
        orders = [index for index, family in enumerate(FAMILIES) if family.order == path]
        body = self._json()
        if orders and self.path.startswith("/api/"):
            status, answer = (
                self.api.accept_order(orders[0]) if body.get("key") == self.api.key else (200, _wrong_key())
            )
            self._reply(status, answer)
            return
        self._fetch("POST", path, body)

    def do_GET(self) -> None:
        """Send a file, the ledger or the run of a workflow."""
        if self.path == "/control/ledger":
            api = self.api
            with api.lock:
                ledger = {
                    "orders": [asdict(order) for order in api.orders],
                    "calls": [asdict(call) for call in api.calls],
                }
                self._reply(200, ledger | {"strays": api.strays, "keys_at_files": api.keys_at_files})
        elif self.path.startswith("/files/"):
            self._file()
        else:
            self._fetch("GET", self.path.removeprefix("/api/"), self._json())

    def _fetch(self, method: str, path: str, body: dict[str, Any]) -> None:
        api, now = self.api, time.time()
        key = body.pop("key", None)
        with api.lock:
            index, is_fetch_path = api.find(method, path, body)
            is_fetch_path = is_fetch_path and self.path.startswith("/api/")
            previous_calls = sum(call.order == index for call in api.calls) if index is not None else 0
            if is_fetch_path:
                api.calls.append(FamilyCall(method, path, body, key == api.key, -1 if index is None else index))
            else:
                api.strays.append(f"{method} {self.path}")
        if not is_fetch_path:
            self._reply(404, {"message": f"The route {self.path.lstrip('/')} could not be found."})
        elif key != api.key:
            self._reply(200, _wrong_key())
        elif index is None:
            self._reply(200, {"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": TIP})
        else:
            self._reply(200, api.fetch_answer(api.orders[index], now, previous_calls))

    def _file(self) -> None:
        if self.api.key in json.dumps(list(self.headers.items())) + self.path:
            self.api.keys_at_files.append(self.path)
        family_index, remote_id, _ = self.path.removeprefix("/files/").split(".")
        order = next((o for o in self.api.orders if (str(o.family), o.remote_id) == (family_index, remote_id)), None)
        if order is None or time.time() < order.at + SECONDS:
            self._send(404, b"<html><body>404: object not found</body></html>", "text/html")
            return
        family = FAMILIES[order.family]
        self._send(200, content(family.media_type, f"{family.order} {remote_id}"), family.media_type)

    def _json(self) -> dict[str, Any]:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    def _reply(self, status: int, body: object) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, media_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _wrong_key() -> dict[str, Any]:
    return {"status": "error", "message": "Invalid Api Key", "tip": "4. Make sure you have valid API key."}


class FamiliesServer(ThreadingHTTPServer):
    """HTTP server with one thread per connection."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore connection errors of clients."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the stub names its socket types


def main() -> None:
    """Serve until standard input closes, so that the server stops with the program that started it."""
    parser = argparse.ArgumentParser(description="A fake of the hosted API with all families. It records all requests.")
    parser.add_argument("--key", required=True)
    api = Api(parser.parse_args().key)
    server = FamiliesServer(("127.0.0.1", 0), type("BoundHandler", (FamiliesHandler,), {"api": api}))
    api.base = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
