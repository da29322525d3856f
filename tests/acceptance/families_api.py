"""Every family of the hosted API, played from its documents alone, with ids that repeat between families.

Runs alone (`python tests/acceptance/families_api.py --key KEY`, prints its port as one JSON line) until its standard
input closes. It knows nothing of the product: standard library only, no import from this repository.
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
IMAGES_FROM = 134_686_749  # pictures are counted together, over all versions of the API
OTHERS_FROM = 298  # each other family by itself: the pages of two of them show this id
IMAGES = ("v3/", "v6/images/", "v6/realtime/", "v7/images/")
SECONDS = 1.0  # from an order until its job is ready


@dataclass(frozen=True, slots=True)
class Family:
    """One family as its page shows it. Paths stand below `/api/`; in `fetch`, `{id}` is the job's id.

    `answer` and `ready` name the forms of its answers. `alone`: the answer to an order says where its job is fetched.
    """

    order: str
    fetch: str
    media_type: str
    answer: str = "plain"
    ready: str = "list"
    method: str = "POST"
    id_field: str = ""
    label: str = "messege"
    named: str = ""  # what `fetch_result` names, where that is not `fetch`
    video: bool = False
    alone: bool = True


PNG, MP4, WAV, GLB = "image/png", "video/mp4", "audio/wav", "model/gltf-binary"
TXT, JSON_TEXT, SRT, VTT = "text/plain", "application/json", "application/x-subrip", "text/vtt"

FAMILIES: tuple[Family, ...] = (
    Family("v3/text2img", "v3/fetch/{id}", PNG),
    Family("v3/img2img", "v3/fetch/{id}", PNG),
    Family("v3/inpaint", "v3/fetch/{id}", PNG),
    Family("v3/text2video", "v3/fetch/{id}", MP4, answer="empty text", video=True),
    Family("v3/dreambooth", "v3/dreambooth/fetch/{id}", PNG),
    Family("v4/dreambooth", "v4/dreambooth/fetch", PNG, id_field="request_id", named="v3/dreambooth/fetch/{id}"),
    Family("v5/controlnet", "v3/fetch/{id}", PNG, answer="empty text"),
    Family("v5/super_resolution", "v3/fetch/{id}", PNG, answer="empty text", ready="text"),
    Family("v5/text2video", "v3/fetch/{id}", MP4, answer="empty text", video=True),
    Family("v6/images/text2img", "v6/images/fetch/{id}", PNG),
    Family("v6/images/flux", "v6/images/fetch/{id}", PNG, answer="newest", ready="proxies object", alone=False),
    Family("v6/realtime/text2img", "v6/realtime/fetch/{id}", PNG, ready="no id"),
    Family("v6/image_editing/outpaint", "v6/image_editing/fetch/{id}", PNG, ready="proxy text"),
    Family("v6/image_editing/fashion", "v6/image_editing/fetch/{id}", PNG),
    Family("v6/interior/make", "v6/interior/fetch/{id}", PNG),
    Family("v6/deepfake/single_video_swap", "v6/deepfake/fetch/{id}", MP4, ready="proxies null"),
    Family("v6/faceswap/multiple_face_swap", "v6/faceswap/fetch/{id}", PNG),
    Family("v6/video/text2video", "v6/video/fetch/{id}", MP4, label="message", video=True),
    Family("v6/video/img2video_ultra", "v6/video/fetch/{id}", MP4, answer="newest", label="message", video=True,
           alone=False),
    Family("v6/voice/text_to_speech", "v6/voice/fetch/{id}", WAV, label="message"),
    Family("v6/voice/music_gen", "v6/voice/fetch/{id}", WAV, label="message", ready="links"),
    Family("v6/voice/speech_to_text", "v6/whisper/fetch/{id}", TXT, label="message"),
    Family("v6/3d/text_to_3d", "v6/3d/fetch/{id}", GLB, answer="extra assets", ready="id null"),
    Family("v6/llm/chat", "v6/llm/get_queued_response", JSON_TEXT, answer="chat", id_field="chat_id"),
    Family("v7/images/text-to-image", "v7/images/fetch/{id}", PNG, answer="newest", alone=False),
    Family("v7/video-fusion/text-to-video", "v7/video-fusion/fetch/{id}", MP4, answer="nameless", label="message",
           video=True),
    Family("v7/voice/speech-to-text", "v7/voice/fetch/{id}", SRT, label="message"),
    Family("v7/voice/text-to-speech", "v7/voice/fetch/{id}", WAV, label="message"),
    Family("v1/enterprise/text2img", "v1/enterprise/fetch", PNG, answer="newest", id_field="request_id", alone=False),
    Family("v1/enterprise/flux/text2img", "v1/enterprise/flux/fetch/{id}", PNG, ready="no id"),
    Family("v1/enterprise/ultra_video/text2video", "v1/enterprise/ultra_video/fetch/{id}", MP4, video=True),
    Family("v1/enterprise/voice/sfx", "v1/enterprise/voice/fetch/{id}", WAV, answer="task", ready="links",
           label="message", alone=False),
    Family("v1/enterprise/speech_to_text/transcribe", "v1/enterprise/speech_to_text/fetch/{id}", VTT),
    Family("v1/enterprise/3d/text_to_3d", "v1/enterprise/3d/fetch/{id}", GLB, ready="id null"),
    Family("v1/enterprise/super_resolution/make", "v1/enterprise/super_resolution/fetch/{id}", PNG, ready="text"),
    Family("v3/fine_tune", "v3/fine_tune_status/{id}", "", answer="training", ready="model"),
    Family("v3/lora_fine_tune", "v3/fine_tune_status/{id}", "", answer="training", ready="lora model"),
    Family("v1/workflows/upscale/run", "v1/workflows/upscale/runs/{id}", PNG, answer="workflow", ready="execution",
           method="GET"),
)  # fmt: skip
ENDINGS = {PNG: "png", MP4: "mp4", WAV: "wav", GLB: "glb", TXT: "txt", JSON_TEXT: "json", SRT: "srt", VTT: "vtt"}
STATES = ("deploying_gpu", "training_started", "trained_model_uploading", "deploying_model")


@dataclass(frozen=True, slots=True)
class Order:
    """An order as it was taken."""

    family: int  # its place in FAMILIES
    remote_id: str
    at: float


@dataclass(frozen=True, slots=True)
class Call:
    """One fetch call: its method and path below `/api/`, its body without the key, and the order that it found."""

    method: str
    path: str
    body: dict[str, Any]
    key_is_right: bool
    order: int  # place in the orders, -1 where it was about none


def content(media_type: str, word: str) -> bytes:
    """A small whole file of a type; another one for every word."""
    noise = hashlib.sha256(word.encode()).digest()
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
            text = json.dumps({"asset": {"version": "2.0", "extras": noise.hex()}}).encode()
            text += b" " * (-len(text) % 4)
            return b"glTF" + struct.pack("<II", 2, 20 + len(text)) + struct.pack("<I", len(text)) + b"JSON" + text
        case "application/json":
            return json.dumps({"choices": [{"message": {"role": "assistant", "content": word}}]}).encode()
        case "application/x-subrip":
            return f"1\n00:00:00,000 --> 00:00:02,000\n{word}\n".encode()
        case "text/vtt":
            return f"WEBVTT\n\n00:00.000 --> 00:02.000\n{word}\n".encode()
        case _:
            return f"What was said: {word}\n".encode()


class Api:
    """The state of the API: orders, and the record of the calls about them."""

    def __init__(self, key: str) -> None:
        self.key, self.base = key, ""
        self.orders: list[Order] = []
        self.calls: list[Call] = []
        self.strays: list[str] = []
        self.keys_at_files: list[str] = []
        self.lock = threading.Lock()

    def ordered(self, place: int) -> tuple[int, dict[str, Any]]:
        """Take an order; HTTP status and body of the answer."""
        family, store = FAMILIES[place], FAMILIES[place].fetch
        with self.lock:
            stores = [FAMILIES[order.family].fetch for order in self.orders]
            if store.startswith(IMAGES):
                number = IMAGES_FROM + sum(other.startswith(IMAGES) for other in stores)
            else:
                number = OTHERS_FROM + stores.count(store)
            text = family.answer in ("training", "chat", "task") or store.startswith("v7/images")
            remote_id = f"{place:02}-{number}-f5jvdz" if text else str(number)
            order = Order(place, remote_id, time.time())
            self.orders.append(order)
        spoken: object = remote_id if text else number
        where = f"{self.base}/api/{(family.named or family.fetch).replace('{id}', remote_id)}"
        plain: dict[str, Any] = {"status": "processing", "tip": TIP, "eta": 2.75}
        plain |= {family.label: "Try to fetch request after seconds estimated", "webhook_status": ""}
        plain |= {"fetch_result": where, "id": spoken, "output": [], "meta": {"prompt": "Server Error"}}
        link = self._links(order)
        match family.answer:
            case "empty text":
                return 200, plain | {"output": "", "future_links": link}
            case "newest":
                return 200, {
                    "status": "processing",
                    "id": spoken,
                    "eta": 30,
                    "message": "Your request is being processed",
                }
            case "nameless":
                del plain["id"]
                return 200, plain | {"future_links": link}
            case "extra assets":
                return 200, plain | {"extra_assets": [], "future_links": link}
            case "chat":
                return 200, {"status": "processing", "eta": 5, "meta": {"chat_id": spoken}}
            case "task":
                return 200, {"status": "queued", "eta": 5, "taskId": spoken, "links": link, "proxy_links": link,
                             "message": "Request has been queued", "seconds": None, "meta": {}}  # fmt: skip
            case "training":
                said = {"status": "success", "messege": "deploying_gpu", "data": "it will take upto 30 minutes."}
                return 200, said | {"training_id": spoken}
            case "workflow":
                return 202, {"status": "success", "execution_id": number, "workflow_id": "upscale", "status_url": where}
            case _:
                return 200, plain

    def fetched(self, order: Order, now: float, times: int) -> dict[str, Any]:
        """The answer about a job that was asked about so many times before."""
        family, spoken = FAMILIES[order.family], _spoken(order.remote_id)
        ready, link = now >= order.at + SECONDS, self._links(order)
        if family.answer == "training":
            name = "model_training_status" if family.ready == "lora model" else "messege"
            state = "model_ready" if ready else STATES[times % len(STATES)]
            return {"status": "success", name: state, "data": " /n Step:1 Training Started", "training_id": spoken}
        if family.answer == "workflow":
            run: dict[str, Any] = {"id": spoken, "status": "completed" if ready else "running"}
            return {"status": "success", "execution": run | ({"output": {"output": link}} if ready else {})}
        if not ready:
            return {"status": "processing", "message": "try again later.", "output": "", "tip": TIP}
        done: dict[str, Any] = {"status": "success", "id": spoken, "output": link}
        match family.ready:
            case "text":
                return done | {"output": link[0]}
            case "links":
                del done["output"]
                return done | {"links": link, "proxy_links": link}
            case "no id":
                del done["id"]
                return done
            case "id null":
                return done | {"id": None, "warning": ""}
            case "proxy text":
                return done | {"proxy_links": link[0]}
            case "proxies null":
                return done | {"proxy_links": None, "tip": "http://sdapi_backend.test/enterprise"}
            case "proxies object":
                return done | {"proxy_links": {"0": link[0]}}
            case _:
                return done

    def find(self, method: str, path: str, body: Mapping[str, Any]) -> tuple[int | None, bool]:
        """The place of the order that a call asks about, and whether the path is a fetch path at all."""
        known = False
        for place, order in enumerate(self.orders):
            family = FAMILIES[order.family]
            for fetch in filter(None, (family.fetch, family.named)):
                by_body = "{id}" not in fetch
                pattern = re.escape(fetch).replace(r"\{id\}", "([A-Za-z0-9_-]+)")
                match = re.fullmatch(pattern, path) if method == family.method else None
                if match is None:
                    continue
                known = True
                if str(body.get(family.id_field, "")) == order.remote_id if by_body else match[1] == order.remote_id:
                    return place, True
        return None, known

    def _links(self, order: Order) -> list[str]:
        ending = ENDINGS.get(FAMILIES[order.family].media_type, "bin")
        return [f"{self.base}/files/{order.family}.{order.remote_id}.{ending}"]


def _spoken(remote_id: str) -> int | str:
    return int(remote_id) if remote_id.isdecimal() else remote_id


class Handler(BaseHTTPRequestHandler):
    """Orders, fetches, files, and /control/ledger for the program that watches."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ClassVar[Api]

    def log_message(self, *_: object) -> None:
        """Say nothing: the ledger is the record."""

    def do_POST(self) -> None:
        """Take an order, or answer a fetch."""
        path = self.path.removeprefix("/api/")
        orders = [place for place, family in enumerate(FAMILIES) if family.order == path]
        body = self._json()
        if orders and self.path.startswith("/api/"):
            status, answer = self.api.ordered(orders[0]) if body.get("key") == self.api.key else (200, _wrong_key())
            self._reply(status, answer)
            return
        self._fetch("POST", path, body)

    def do_GET(self) -> None:
        """Serve a file, the ledger, or the run of a workflow."""
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
            place, known = api.find(method, path, body)
            known = known and self.path.startswith("/api/")
            times = sum(call.order == place for call in api.calls) if place is not None else 0
            if known:
                api.calls.append(Call(method, path, body, key == api.key, -1 if place is None else place))
            else:
                api.strays.append(f"{method} {self.path}")
        if not known:
            self._reply(404, {"message": f"The route {self.path.lstrip('/')} could not be found."})
        elif key != api.key:
            self._reply(200, _wrong_key())
        elif place is None:
            self._reply(200, {"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": TIP})
        else:
            self._reply(200, api.fetched(api.orders[place], now, times))

    def _file(self) -> None:
        if self.api.key in json.dumps(list(self.headers.items())) + self.path:
            self.api.keys_at_files.append(self.path)
        place, remote_id, _ = self.path.removeprefix("/files/").split(".")
        order = next((o for o in self.api.orders if (str(o.family), o.remote_id) == (place, remote_id)), None)
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


class Server(ThreadingHTTPServer):
    """One thread per connection."""

    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that went away is no news here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # the stub names its socket types


def main() -> None:
    """Serve until standard input closes, so that no server outlives the program that started it."""
    parser = argparse.ArgumentParser(description="Every family of the hosted API, with a ledger of all that is asked.")
    parser.add_argument("--key", required=True)
    api = Api(parser.parse_args().key)
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"api": api}))
    api.base = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    print(json.dumps({"port": server.server_address[1]}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
