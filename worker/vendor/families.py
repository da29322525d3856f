"""The endpoint families of the API: order path, fetch path and output type. One row per family.

Paths are relative to `/api/`. `*` matches one segment, `**` any number of segments, and `{server}` one segment that is
repeated in the fetch path. The first row whose `order` pattern matches is the family of an order. To support a new
family, add a row; no other change is needed.
"""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

FetchStyle = Literal["path", "request_id", "chat_id", "get"]
MediaKind = Literal["picture", "video", "audio", "model", "text", "training", "any"]

MAX_KIND = 64


class ApiFamily(NamedTuple):
    """One family. `fetch` is the fetch path without the id, `media` the type of the outputs.

    `fetch_style` says where the request carries the id: at the end of the path (`path`), in the body under this name
    (`request_id`, `chat_id`), or at the end of the path of a GET request (`get`).
    """

    order: str
    fetch: str
    fetch_style: FetchStyle
    media: MediaKind


# Sources: the vendor's documentation of 2022 to 2026, and the `fetch_result` values in its examples and in captured
# answers. If they disagree, a captured `fetch_result` has priority over the documentation.
FAMILIES: tuple[ApiFamily, ...] = (
    # Trainings are fetched at v3, for orders of every version.
    ApiFamily("*/fine_tune/**", "v3/fine_tune_status", "path", "training"),
    ApiFamily("*/lora_fine_tune/**", "v3/fine_tune_status", "path", "training"),
    ApiFamily("*/lora_fine_tune_v2/**", "v3/fine_tune_status", "path", "training"),
    ApiFamily("*/fine_tune_v2/**", "v3/fine_tune_status", "path", "training"),
    ApiFamily("*/fine_tune_status/**", "v3/fine_tune_status", "path", "training"),
    # Version 3 and the community endpoints. A captured text2video order of version 5 is fetched at v3.
    ApiFamily("v3/dreambooth/**", "v3/dreambooth/fetch", "path", "picture"),
    ApiFamily("v3/text2video/**", "v3/fetch", "path", "video"),
    ApiFamily("v3/**", "v3/fetch", "path", "picture"),
    ApiFamily("v4/dreambooth/**", "v4/dreambooth/fetch", "request_id", "picture"),
    ApiFamily("v4/**", "v3/fetch", "path", "picture"),
    ApiFamily("v5/text2video/**", "v3/fetch", "path", "video"),
    ApiFamily("v5/**", "v3/fetch", "path", "picture"),
    # Version 6: each family has its own fetch path, except transcripts.
    ApiFamily("v6/images/**", "v6/images/fetch", "path", "picture"),
    ApiFamily("v6/realtime/**", "v6/realtime/fetch", "path", "picture"),
    ApiFamily("v6/image_editing/**", "v6/image_editing/fetch", "path", "picture"),
    ApiFamily("v6/fashion/**", "v6/fashion/fetch", "path", "picture"),
    ApiFamily("v6/interior/**", "v6/interior/fetch", "path", "picture"),
    ApiFamily("v6/video/**", "v6/video/fetch", "path", "video"),
    ApiFamily("v6/voice/speech_to_text/**", "v6/whisper/fetch", "path", "text"),
    ApiFamily("v6/voice/speech-to-text/**", "v6/whisper/fetch", "path", "text"),
    ApiFamily("v6/whisper/**", "v6/whisper/fetch", "path", "text"),
    ApiFamily("v6/voice/**", "v6/voice/fetch", "path", "audio"),
    ApiFamily("v6/3d/**", "v6/3d/fetch", "path", "model"),
    ApiFamily("v6/llm/**", "v6/llm/get_queued_response", "chat_id", "text"),
    # Version 7.
    ApiFamily("v7/images/**", "v7/images/fetch", "path", "picture"),
    ApiFamily("v7/video-fusion/**", "v7/video-fusion/fetch", "path", "video"),
    # Enterprise: each model has its own server. Only the text-to-image server expects the id in the body.
    ApiFamily("v1/enterprise/speech_to_text/**", "v1/enterprise/speech_to_text/fetch", "path", "text"),
    ApiFamily("v1/enterprise/*", "v1/enterprise/fetch", "request_id", "picture"),
    ApiFamily("v1/enterprise/{server}/**", "v1/enterprise/{server}/fetch", "path", "any"),
    # Workflows: runs are fetched with GET.
    ApiFamily("v1/workflows/{server}/**", "v1/workflows/{server}/runs", "get", "any"),
    # All other and newer families follow this pattern, for example face swaps and voices of version 7.
    ApiFamily("{version}/{server}/*/**", "{version}/{server}/fetch", "path", "any"),
    ApiFamily("{version}/*", "{version}/fetch", "path", "any"),
)

TRAINING = "/api/v3/fine_tune_status"
CHAT = "/api/v6/llm/get_queued_response"
_RUNS = re.compile(r"/api/v1/workflows/[A-Za-z0-9_-]+/runs")
_KIND_NAME = re.compile(r"/api/v[0-9]+/(?:(?P<name>[A-Za-z0-9_/-]*)/)?fetch")

# The fetch paths besides `/api/v<n>/…fetch`. Each has the id at its end or in the body.
OTHER_FETCH_PATHS = rf"{TRAINING}|{CHAT}|{_RUNS.pattern}"


_PLACEHOLDERS = {
    "**": "(?:/[A-Za-z0-9_.-]{1,100})*",
    "*": "/[A-Za-z0-9_.-]{1,100}",
    "{version}": "/(?P<version>v[0-9]{1,3})",
    "{server}": "/(?P<server>[A-Za-z0-9_-]{1,100})",
}


def _order_pattern(order: str) -> str:
    return "".join(_PLACEHOLDERS.get(part) or f"/{re.escape(part)}" for part in order.split("/"))


_FETCH = re.compile(
    r"/(?P<fetch>v[0-9]{1,3}(?:/[A-Za-z0-9_-]{1,100})*?/fetch)(?:/[A-Za-z0-9_.-]{1,100})?", re.IGNORECASE
)


_ORDERS = tuple(re.compile(_order_pattern(family.order), re.IGNORECASE) for family in FAMILIES)


@lru_cache(maxsize=256)
def family_of_order(path: str) -> ApiFamily | None:
    """Return the family of an order that was posted to `/api/` + `path`. All placeholders in `fetch` are filled in.

    `path` may also be a fetch path, with or without an id.

    >>> family_of_order("v6/video/text2video").fetch
    'v6/video/fetch'
    >>> family_of_order("V1/Enterprise/Flux/Text2Img").fetch
    'v1/enterprise/flux/fetch'
    >>> family_of_order("v1/enterprise/fetch/7")[1:3]
    ('v1/enterprise/fetch', 'request_id')
    """
    if match := _FETCH.fullmatch(f"/{path}"):
        fetch = match["fetch"].lower()
        rows = [row for row in FAMILIES if row.fetch == fetch] or [ApiFamily(path, fetch, "path", "any")]
        return rows[0] if len({row.media for row in rows}) == 1 else rows[0]._replace(media="any")
    for pattern, family in zip(_ORDERS, FAMILIES, strict=True):
        match = pattern.fullmatch(f"/{path}")
        if match is not None:
            names = match.groupdict()
            return family._replace(
                fetch=family.fetch.format(**(names if family.fetch_style == "get" else _lower(names)))
            )
    return None


def _lower(names: dict[str, str]) -> dict[str, str]:
    """Return the names of servers and versions in lower case, as the API writes them. Not for workflow ids."""
    return {name: value.lower() for name, value in names.items()}


def fetch_style(fetch_path: str) -> FetchStyle:
    """Return the fetch style of a path without the id, for jobs whose URL ends with the id.

    >>> fetch_style("/api/v1/workflows/upscale/runs"), fetch_style("/api/v3/fetch")
    ('get', 'path')
    """
    return "get" if _RUNS.fullmatch(fetch_path) else "path"


def id_field(fetch_path: str) -> str:
    """Return the name of the id in the request body, for a fetch path that does not end with the id."""
    return "chat_id" if fetch_path == CHAT else "request_id"


@lru_cache(maxsize=256)
def kind_of(fetch_path: str) -> str:
    """Return the default kind of jobs with this fetch path (without the id).

    >>> kind_of("/api/v6/video/fetch"), kind_of("/api/v3/fetch"), kind_of("/api/v3/fine_tune_status")
    ('video', 'image', 'training')
    """
    if fetch_path == TRAINING:
        return "training"
    if fetch_path == CHAT:
        return "chat"
    if _RUNS.fullmatch(fetch_path):
        return "workflow"
    match = _KIND_NAME.fullmatch(fetch_path)
    name = (match["name"] or "").replace("/", "-") if match else ""
    return name[:MAX_KIND] or "image"


def is_training(fetch_path: str) -> bool:
    """Return whether this path belongs to trainings. In their answers `success` does not mean that the job is done."""
    return fetch_path.endswith("/fine_tune_status")
