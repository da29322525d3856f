"""Unusual answers of the API: real ones with changed fields, random JSON, random bytes."""

import base64
import json
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

from tests.vendor.recorded_fetches import FETCHES
from worker.sandbox import SandboxOptions
from worker.sandbox.behaviour import Behaviour

ID = "12202888"
KEY = "sk/canary+7f3a&q"
LINK = "https://pub-3626.r2.dev/generations/0-1ec64a77.png"
LINKS = [LINK, "https://cdn2.stablediffusionapi.com/generations/1.png"]
TINY = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAACAkQBADs="
MESSAGES = (
    "", "Try Again", "Failed, Try Again", "Request not found", "Rate limit exceeded", "Invalid Api Key", "model_ready",
    "Insufficient credits. Please add more credits to continue.", "This feature requires a premium subscription",
    "Invalid API Request", "Server Error", "Service temporarily unavailable", "please wait for 30 seconds",
    "deploying_gpu", "The specified ID does not exist or is not queued", "limit exceeded " * 100,
)  # fmt: skip
STATUSES = ("success", "processing", "queued", "failed", "error", "ok", "completed", "Success ", "")


def _sandbox() -> list[dict[str, Any]]:
    """Return answers of the stand-in to a submission, and to early, late and unknown fetches."""
    model = Behaviour(SandboxOptions(seed=1))
    key = {"key": "sandbox-key"}
    submit = key | {"prompt": "a lake", "width": "512", "height": "512", "samples": "2"}
    origin = "http://127.0.0.1:1"
    calls = [("/api/v3/text2img", submit, 0.0), (f"/api/v3/fetch/{ID}", key, 0.1), (f"/api/v3/fetch/{ID}", key, 99.0)]
    calls += [("/api/v3/fetch/1", key, 99.0), (f"/api/v3/fetch/{ID}", {}, 99.0)]
    return [json.loads(model.answer(path, body, now=now, origin=origin).body) for path, body, now in calls]


REAL: list[dict[str, Any]] = [
    {"status": "success", "id": int(ID), "output": [LINK]},
    {"status": "success", "id": ID, "output": LINKS, "proxy_links": LINKS[::-1], "generationTime": 1.9, "tip": ""},
    {"status": "success", "output": LINK, "proxy_links": None, "meta": {"seed": 3166507472, "prompt": "failed"}},
    {"status": "success", "id": None, "output": [], "links": [LINK]},
    {"status": "success", "output": {"a": LINK, "b": [TINY]}},
    {"status": "success", "output": TINY},
    {"status": "success", "output": LINK, "proxy_links": ["https://h/" + "é" * 70_000]},
    {"status": "success", "output": "https://h/" + "\U0001f600" * 9_000, "proxy_links": "https://h/" + "\x07" * 8_000},
    {"status": "success", "output": [LINK], "proxy_links": ["https://h/" + "\U0001f600" * 8_000]},
    {"status": "success", "messege": "model_ready", "data": "done", "training_id": "F5jvdzGnYi"},
    {"status": "processing", "messege": "Try to fetch request after seconds estimated", "eta": 20.94, "id": int(ID)},
    {"status": "processing", "message": "try again later.", "output": ""},
    {"status": "queued", "taskId": "a3", "eta": 5, "links": [LINK], "proxy_links": [LINK]},
    {"status": "failed", "id": "", "message": "Failed, Try Again", "output": ""},
    {"status": "failed", "id": "", "message": "Request not found", "output": ""},
    {"status": "error", "message": "Rate limit exceeded. Maximum 5 queued requests allowed.", "retry_after": 30},
    {"status": "error", "message": {"prompt": ["The prompt field is required."]}},
    {"status": "error", "messege": "Invalid Api Key", "tip": "1. Make sure you have valid API key."},
    {"message": "Server Error"},
    *_sandbox(),
    *(json.loads(json.dumps(row.body).replace("{ID}", ID)) for row in FETCHES if isinstance(row.body, dict)),
]
FIELDS = (
    *("status", "id", "output", "proxy_links", "links", "message", "messege", "eta", "retry_after", "tip", "tips"),
    *(
        "future_links",
        "data",
        "meta",
        "error",
        "errors",
        "image_url",
        "execution",
        "type",
        "cloudflare_error",
        "success",
    ),
)

_NUMBERS = st.one_of(
    st.integers(),
    st.integers(min_value=-(2**600), max_value=2**600),
    st.floats(),
    st.sampled_from([0, 1, -1, int(ID), float(ID), 2**63, 10**400, 1e308, 5e-324, -0.0, 12202889]),
)
_TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=st.characters(), max_size=30).map(lambda text: "https://h.example/" + text),
    st.sampled_from([*MESSAGES, *STATUSES, LINK, TINY, ID, f" {ID}", "12202889", "\x00", "\ud800", "x" * 9_000]),
    st.sampled_from(["http://h/" + "é" * 70_000, "https://h/" + "\U0001f600" * 9_000, "A" * 100, "data:,", "DATA:;,%"]),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def key_forms() -> list[str]:
    """The key in the ways that a server may write it into an answer."""
    hexed = "".join(f"\\u{ord(char):04x}" for char in KEY)
    return [
        KEY,
        quote(KEY, safe=""),
        quote(KEY),
        quote(KEY, safe="").lower(),
        "".join(f"%{ord(char):02X}" for char in KEY),
        json.dumps(KEY)[1:-1].replace("/", "\\/"),
        KEY.replace("&", "\\u0026"),
        KEY.replace("&", "\\u0026").replace("/", "\\/").replace("+", "\\u002B"),
        hexed,
        hexed.upper().replace("\\U", "\\u"),
        base64.b64encode(KEY.encode()).decode(),
    ]


def written(answer: object) -> str:
    """An answer as JSON, NaN and lone surrogates included; what Python refuses to write is left out."""
    try:
        return json.dumps(answer)
    except ValueError:  # a number too long to be written down
        return "{}"


LIKELY = [
    ("id", (12202889, "999", ID, float(ID), 1.5, " ", f" {ID} ", True, None, [], -1)),
    (
        "output",
        (
            "",
            [],
            None,
            {},
            [""],
            LINK,
            LINKS,
            ", ".join(LINKS),
            "null",
            [TINY],
            [LINK, LINK],
            [[LINK]],
            7,
            "x" * 9_000,
            [None, LINK],
        ),
    ),
    ("proxy_links", ("", None, LINKS, [LINK], "javascript:x", ["https://h/" + "\U0001f600" * 8_000])),
    ("links", ([LINK], "", None)),
    ("future_links", ([LINK], {"0": LINK}, "", [None])),
    ("data", ({"output": [LINK]}, {"images": LINKS, "init_image": LINK}, [{"url": LINK}], "Training Failed: x", LINK)),
    ("meta", ({"output": [LINK]}, {"init_image": LINK, "prompt": "rate limit exceeded"}, [LINK], 7)),
    ("error", ("Insufficient credits", {"code": "rate_limit_exceeded", "message": "x", "retry_after": 7}, False, [])),
    ("execution", ({"status": "completed"}, {"status": "running", "id": ID}, {"status": "failed"}, {}, "completed")),
    ("status", STATUSES),
    ("message", (*MESSAGES, {"prompt": ["is required"]}, "\x00\ud800" * 300, 7, ["failed"])),
    ("messege", MESSAGES),
    ("eta", (0, -1, 5, "20", 1e308, 5e-324, float("nan"), float("inf"), 10**400, True)),
    ("retry_after", (0, -5, 30, "30", 1e400, "x", None, 10**400)),
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Draw a real answer with changed, removed or added fields."""
    answer = dict(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(0, 3))):
        name, values = draw(st.sampled_from(LIKELY))
        match draw(st.integers(0, 7)):
            case 0:
                answer.pop(name, None)
            case 1:
                answer[draw(st.sampled_from(FIELDS))] = draw(VALUES)
            case _:
                answer[name] = draw(st.sampled_from(values))
    return written(answer)


@st.composite
def nested(draw: st.DrawFn) -> str:
    """Draw a known field in deeply nested data."""
    depth = draw(st.sampled_from([7, 8, 9, 50, 900, 5_000, 100_000]))
    opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}"), ('[1,{"output":', "}]")]))
    core = draw(st.sampled_from([f'"{LINK}"', "null", "", "1e999", "9" * 5_000]))
    whole = opening * depth + core + (closing * depth if draw(st.booleans()) else "")
    return f'{{"status": "{draw(st.sampled_from(STATUSES))}", "{draw(st.sampled_from(FIELDS))}": {whole}}}'


@st.composite
def with_key(draw: st.DrawFn) -> str:
    """Draw a real answer with the key in one of its texts or at a random position."""
    text, form = written(draw(st.sampled_from(REAL))), draw(st.sampled_from(key_forms()))
    places = [at + 1 for at, char in enumerate(text) if char == '"']
    at = draw(st.sampled_from(places) | st.integers(0, len(text)))
    return text[:at] + form + text[at:]


def _cut(parts: tuple[str, int]) -> bytes:
    text, at = parts
    return text.encode("utf-8", "surrogatepass")[: at or None]


TEXTS = st.one_of(mutated(), mutated(), mutated(), with_key(), nested(), VALUES.map(written))
BODIES = st.one_of(
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.tuples(TEXTS, st.integers(0, 200)).map(_cut),
    TEXTS.map(lambda text: b"\xef\xbb\xbf" + text.encode("utf-16", "surrogatepass")),
    st.binary(max_size=200),
)
CODES = st.one_of(
    st.sampled_from([200] * 12 + [201, 206, 299, 400, 401, 402, 403, 404, 429, 500, 503]),
    st.sampled_from([200] * 12 + [*range(200, 1_000, 7)]),
)
_HEADER_VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["30", "-1", "nan", "inf", "1e400", "86400", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 5_000, "\uff11\uff12"]
    ),
    st.sampled_from(["Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 0 Foo 0000 99:99:99 +9999", "0.5", " 7 ", KEY]),
)
HEADERS = st.dictionaries(
    st.sampled_from(["Retry-After", "retry-after", "X-RateLimit-Reset", "Content-Type", "X-Odd"]),
    _HEADER_VALUES,
    max_size=3,
)
