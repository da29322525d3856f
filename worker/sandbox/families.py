"""Families of the hosted API's endpoints, from its documentation: order paths, fetch paths, and form of the answers.

Paths are relative to `/api/`. `*` is one path segment, `{name}` is one segment that the fetch path repeats,
and `{id}` is the job's id. A fetch path without `{id}` takes the id from the body.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

API = "/api/"
RECENT_OUTPUTS = "v6/assets_generated"
ACCOUNT_CALLS = frozenset({"v3/system_load", "v6/processing/request_count", "wallet_balance", RECENT_OUTPUTS})
IMAGES_FROM = 12_202_888
OTHERS_FROM = 298  # the documentation of face swap and interior does show the same id
SERVERS_FROM = 1  # each enterprise server counts its own jobs

Shape = Literal["job", "nameless", "task", "training", "chat", "workflow"]
Output = Literal["list", "text", "links"]
Proxies = Literal["list", "object", "text", "null", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Endpoints with one kind of job and one place to fetch it from.

    `shape` is the form of the answers: a plain `job`; `nameless` if the answer to an order has the id only in
    `fetch_result`; a queued `task`; a `training`; a `chat`; a `workflow`, which is fetched by GET.
    """

    orders: tuple[str, ...]
    fetch: tuple[str, ...]  # the first path names the store of its jobs, and appears in `fetch_result`
    makes: str = "png"
    shape: Shape = "job"
    fetch_result: bool = True  # whether the answer to an order has `fetch_result`
    eta: float | None = None  # seconds shown in the documentation; None: computed from the job
    label: str = "message"  # how the answer to an order spells its message field
    fetch_label: str = "message"  # the same for the answer to a fetch
    output: Output = "list"
    no_output: str | tuple[()] = ()  # value of `output` in the answer to an order before there is an output
    proxies: Proxies = "list"
    promises: bool = True  # whether the answer to an order has `future_links`
    counter: str = ""  # families with the same counter share a sequence of ids; empty: one sequence per store
    first_id: int = OTHERS_FROM
    text_ids: bool = False
    unknown_status: int = 200  # HTTP status for an unknown id
    prompt: bool = False  # whether an order needs a prompt

    @property
    def store(self) -> str:
        """The fetch path without the id. Ids are unique within a store."""
        return self.fetch[0].removesuffix("/{id}")


def _images(*orders: str, fetch: str, in_body: str = "", **changes: Any) -> Family:
    """Return a family whose ids come from the shared sequence of pictures. Path `in_body` takes the id in the body."""
    paths = (f"{fetch}/{{id}}", in_body) if in_body else (f"{fetch}/{{id}}",)
    values = {"counter": "images", "first_id": IMAGES_FROM, "prompt": True, **changes}
    return Family(orders=orders, fetch=paths, **values)


def _simple(name: str, **changes: Any) -> Family:
    """Return a family whose fetch path is next to its order paths."""
    return Family(**{"orders": (f"{name}/*",), "fetch": (f"{name}/fetch/{{id}}",), **changes})


_V3: Mapping[str, Any] = {"fetch": "v3/fetch", "label": "messege"}
_V3_VIDEO: Mapping[str, Any] = {**_V3, "makes": "mp4", "no_output": "", "eta": 6.0}
_V5_PICTURES = tuple(f"v5/{name}" for name in ("controlnet", "interior", "removebg_mask", "pix2pix"))
_BOOTHS = tuple(f"{version}/dreambooth{suffix}" for version in ("v3", "v4") for suffix in ("", "/img2img", "/inpaint"))

# Enterprise: one server per model.
_PLAIN_SERVERS = (
    "flux", "flux_klein", "flux_kontext_dev", "z_image_turbo", "qwen", "realtime", "image_editing", "interior",
    "deepfake",
)  # fmt: skip
_SERVERS: Mapping[str, Mapping[str, Any]] = {
    "video": {"makes": "mp4"},
    "ultra_video": {"makes": "mp4"},
    "image_to_video_ultra": {"makes": "mp4"},
    "voice": {"makes": "wav", "shape": "task", "output": "links", "eta": 5.0},
    "text_to_speech": {"makes": "wav"},
    "speech_to_text": {"makes": "txt"},
    "3d": {"makes": "glb", "eta": 4.0},
    "super_resolution": {"output": "text", "proxies": "text"},
    "face_gen": {"unknown_status": 404},
    "flux_headshot": {"unknown_status": 404},
    "faceswap": {"fetch": ("v1/enterprise/faceswap/fetch/{id}", "v1/enterprise/faceswap/fetch")},
    **{name: {} for name in _PLAIN_SERVERS},
}

FAMILIES: tuple[Family, ...] = (
    # Version 3, its communities, and version 5, which is fetched at version 3. For the version 4 community, answers
    # name a version 3 path and the documentation one that takes the id in the body. Both find the job.
    _images("v3/text2img", "v3/img2img", "v3/inpaint", **_V3),
    _images("v3/text2video", **_V3_VIDEO),
    _images(*_BOOTHS, fetch="v3/dreambooth/fetch", in_body="v4/dreambooth/fetch", label="messege",
            fetch_label="messege"),
    _images(*_V5_PICTURES, **_V3, no_output="", prompt=False),
    _images("v5/super_resolution", **_V3, no_output="", output="text", prompt=False),
    _images("v5/text2video", **_V3_VIDEO),
    # Version 6.
    _images("v6/images/*", fetch="v6/images/fetch", in_body="v6/images/fetch", label="messege", fetch_label="messege"),
    _images("v6/realtime/*", fetch="v6/realtime/fetch", label="messege", eta=33.0),
    # Fashion is ordered at image editing. The documentation names either fetch path.
    _simple("v6/image_editing", orders=("v6/image_editing/*", "v6/fashion/*"),
            fetch=("v6/image_editing/fetch/{id}", "v6/fashion/fetch/{id}"), label="messege", eta=5.0, proxies="text"),
    _simple("v6/interior", label="messege", eta=20.0),
    _simple("v6/deepfake", label="messege", eta=605.0, makes="mp4", proxies="null"),
    _simple("v6/faceswap", label="messege", eta=605.0),
    _simple("v6/video", eta=960.0, makes="mp4"),
    _simple("v6/whisper", orders=("v6/voice/speech_to_text", "v6/whisper/*"), eta=5.0, makes="txt"),
    _simple("v6/voice", eta=100.0, makes="wav"),
    _simple("v6/3d", label="messege", eta=4.0, makes="glb"),
    _simple("v6/llm", fetch=("v6/llm/get_queued_response",), makes="json", shape="chat", fetch_result=False, eta=5.0,
            promises=False, proxies="none", text_ids=True),
    # Version 7. The newest documentation has no `fetch_result`; in a captured video answer there is no id.
    _images("v7/images/*", fetch="v7/images/fetch", fetch_result=False, promises=False, proxies="object", eta=30.0,
            text_ids=True),
    _simple("v7/video-fusion", shape="nameless", eta=10.0, makes="mp4"),
    _simple("v7/voice", eta=100.0, makes="wav", output="links"),
    # Enterprise. Only the text-to-image server takes the id in the body.
    Family(orders=tuple(f"v1/enterprise/{name}" for name in ("text2img", "img2img", "inpaint")),
           fetch=("v1/enterprise/fetch",), first_id=SERVERS_FROM, fetch_result=False, eta=10.0, prompt=True),
    *(_simple(f"v1/enterprise/{name}", **{"first_id": SERVERS_FROM, "eta": 10.0, **changes})
      for name, changes in _SERVERS.items()),
    # Trainings are fetched at version 3. They produce a model instead of a file.
    Family(orders=("v3/fine_tune", "v3/lora_fine_tune"), fetch=("v3/fine_tune_status/{id}",), makes="",
           shape="training", label="messege", text_ids=True, promises=False),
    Family(orders=("v1/workflows/{name}/run", "v1/workflows/{name}/runs"), fetch=("v1/workflows/{name}/runs/{id}",),
           shape="workflow", first_id=12_345),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """The job that a fetch request asks about: an id in one store."""

    family: Family
    id: str

    @property
    def store(self) -> str:
        """The store of the job."""
        return self.family.store


def family_of(path: str) -> Family | None:
    """Return the family for an order path below `/api/`, or None if the path takes no orders.

    >>> family_of("v6/video/text2video").fetch
    ('v6/video/fetch/{id}',)
    """
    for pattern, family in _ORDERS:
        match = pattern.fullmatch(path)
        if match is not None and not path.endswith("/fetch"):
            return _with_name(family, match.groupdict())
    return None


def request_of(path: str, body: Mapping[str, Any], method: str = "POST") -> Target | Family | str | None:
    """Return what a request is about: the job to fetch, the family to order from, or one of `ACCOUNT_CALLS`.

    Return None if this method has no such path.
    """
    route = path.removeprefix(API)
    if route == path:
        return None
    for pattern, in_path, family in _FETCHES:
        match = pattern.fullmatch(route)
        if match is not None and method == ("GET" if family.shape == "workflow" else "POST"):
            names = match.groupdict()
            job_id = names.pop("id", None) if in_path else _id_in(body, family)
            return Target(_with_name(family, names), str(job_id))
    if method != "POST":
        return None
    return family_of(route) or (route if route in ACCOUNT_CALLS else None)


def _id_in(body: Mapping[str, Any], family: Family) -> object:
    if family.shape == "chat":
        return body.get("chat_id", "")
    return body.get("request_id", body.get("id", ""))


def _with_name(family: Family, names: Mapping[str, str]) -> Family:
    if not names:
        return family
    return replace(family, fetch=tuple(path.replace("{name}", names["name"]) for path in family.fetch))


def _pattern(path: str) -> re.Pattern[str]:
    text = re.escape(path).replace(r"\*", "[A-Za-z0-9_-]{1,100}").replace(r"\{name\}", "(?P<name>[A-Za-z0-9_-]{1,100})")
    return re.compile(text.replace(r"\{id\}", "(?P<id>[A-Za-z0-9][A-Za-z0-9_-]{0,127})"))


_ORDERS = tuple((_pattern(order), family) for family in FAMILIES for order in family.orders)
_FETCHES = tuple(
    (_pattern(path), path.endswith("/{id}"), family)
    for family in {family.fetch: family for family in reversed(FAMILIES)}.values()
    for path in family.fetch
)
