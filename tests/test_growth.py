"""Code that reads text from outside takes time in proportion to the length of the text.

The tests find all regular expressions of the package by themselves. Hand-written scanners are listed in `SCANNERS`. CPU
time is measured, and the fastest of several runs counts, so that other load on the machine has no effect.
"""

import gc
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice

import pytest

from tests.adversaries import Use, texts, untested_patterns, uses
from worker.admin.formatting import without_links
from worker.core.answer_history import parse_history
from worker.core.display import display_json, display_lines, display_text
from worker.core.durations import parse_duration
from worker.core.identity import checked_remote_id
from worker.core.json_size import too_many_values
from worker.core.media.base64_text import Base64Decoder, base64_start
from worker.core.media.signatures import is_text, sniff
from worker.core.plain_text import plain_text
from worker.core.redaction.escapes import decoded
from worker.core.redaction.masking import link_host, mask_personal_data
from worker.core.webhook import checked_url
from worker.errors import WorkerError
from worker.net.address_guard import Guard
from worker.system.redaction import Scrubber
from worker.vendor.answer_links import collect_links
from worker.vendor.fetch_url import AllowedApi, fetch_address
from worker.vendor.recent_outputs import LIST_PATHS, ListRequest, read_recent_outputs
from worker.vendor.replies import Question, parse
from worker.vendor.submissions import submission

STAGES = 22, 200, 1_500, 6_000  # characters: the first finds exponential patterns, the last quadratic ones
LENGTH, LONG_LENGTH = 60_000, 8 << 20
RATIO = 2.5
TRIES = 12
USUAL_SUM_SECONDS = 0.012  # to sum up a million numbers
COPY_SECONDS = 4e-9  # per character: time to copy it, which is longer in newly allocated memory
KEYS = [f"{number:02d}{'Kq3vZ8mT1xRw5yLb7nPd0cGh2sJf6aUe9iDo4kXe'[number % 9 :]}" for number in range(100)]
USES = uses()
LIST_REQUEST = ListRequest("https://api.example", LIST_PATHS[0], "image")
ALLOWED = AllowedApi("https://api.example/api/v3", frozenset({"api.example"}))
BACKTRACKING = r"data:[\w.+-]*/?[\w.+-]*;", r"\w*prompt\w*[:=]", r"(?:a|a)*b", r"\s*x?\s*y", r"<.*?>", r"(?:%|a)*="


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call."""
    started_at = time.process_time()
    work()
    return time.process_time() - started_at


def machine_factor() -> float:
    """Return how many times slower this machine is than a usual one, at least 1."""
    return max(1.0, min(cpu_seconds(lambda: sum(range(1_000_000))) for _ in range(3)) / USUAL_SUM_SECONDS)


MAX_SECONDS = 0.02 * machine_factor()  # for a text of any stage; usual is a thousandth


def grows_too_fast(work: Callable[[str], object], text: Callable[[int], str], length: int) -> str | None:
    """Compare half of `length` with all of it. Return None if the fastest times differ by at most a factor of RATIO."""
    half_text, full_text = text(length // 2), text(length)
    best = [float("inf"), float("inf")]
    gc.collect()
    for _ in range(TRIES):
        best = [min(best[0], cpu_seconds(lambda: work(half_text))), min(best[1], cpu_seconds(lambda: work(full_text)))]
        if best[1] <= RATIO * best[0] + 0.0005 + COPY_SECONDS * len(full_text):
            return None
    return f"{best[0]:.4f} s for {len(half_text)} characters, {best[1]:.4f} s for {len(full_text)}"


def slowest_use(use: Use) -> tuple[float, str, int]:
    """Return (seconds, method, text number) of the slowest use of a pattern."""
    slowest = (-1.0, "", 0)
    for length in STAGES:
        slowest = (-1.0, "", 0)
        for number, text in enumerate(texts(use.pattern, length)):
            for method in sorted(use.methods):
                run = partial(use.run, method, text)
                seconds = cpu_seconds(run)
                if seconds > MAX_SECONDS:
                    seconds = min(seconds, cpu_seconds(run))
                slowest = max(slowest, (seconds, method, number))
                if slowest[0] > MAX_SECONDS:
                    return slowest
    return slowest


def text_of(use: Use, number: int, length: int) -> str:
    """Return the text of that number, with about this length."""
    return next(islice(texts(use.pattern, length), number, None))


def growth_of(use: Use, method: str, number: int, length: int) -> str | None:
    """Apply `grows_too_fast` to a pattern."""
    return grows_too_fast(partial(use.run, method), partial(text_of, use, number), length)


# ── regular expressions ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_pattern_of_the_package_is_found() -> None:
    """Patterns that are built at run time or are not in a module variable are not found: assign them in the module."""
    assert untested_patterns() == []
    assert len(USES) > 50


@pytest.mark.parametrize("pattern", BACKTRACKING)
def test_given_a_pattern_that_backtracks_when_measured_then_it_is_detected(pattern: str) -> None:
    use = Use("bad", re.compile(pattern), frozenset({"search"}))

    seconds, method, number = slowest_use(use)

    assert seconds > MAX_SECONDS or growth_of(use, method, number, 12_000)


@pytest.mark.parametrize("use", USES, ids=[use.place for use in USES])
def test_given_texts_that_nearly_match_when_doubled_then_a_pattern_takes_at_most_twice_as_long(use: Use) -> None:
    seconds, method, number = slowest_use(use)

    assert seconds <= MAX_SECONDS, f"{seconds:.3f} s for {text_of(use, number, 60)!r}…"
    assert growth_of(use, method, number, LENGTH) is None


@pytest.mark.long
@pytest.mark.parametrize("use", USES, ids=[use.place for use in USES])
def test_given_eight_megabytes_that_nearly_match_then_a_pattern_takes_at_most_twice_as_long_as_for_four(
    use: Use,
) -> None:
    _, method, number = slowest_use(use)

    assert growth_of(use, method, number, LONG_LENGTH) is None


# ── hand-written scanners ─────────────────────────────────────────────────────────────────────────────────────────────

FLOODS = (
    *(KEYS[0][:-1], KEYS[0][:20], "".join(key[:25] for key in KEYS), KEYS[0] + " "),
    *(
        "%",
        "%41",
        "%25",
        "%41B",
        "\\",
        "\\u0041",
        "\\\\u0041",
        "\\ud83d",
        "\\u",
        "&",
        "&#",
        "&#65;",
        "&#0",
        "&amp;",
        "&amp",
    ),
    *("a", "QUJD", "+", " ", "\n", "\x1b[31m", "\u202e", "\u200d", "é", "\U0001f511", "\ud800", "\0", "\xff"),
    *("/", "..", ":", "::", "a.", "a@", "1", "1 ", "'", '"', "“", "prompt", "data:", "https://", "-", "=", "<"),
    *("[],", "[", "{", '{"a":', '"",', '\\"', ","),
)
scrubber = Scrubber(KEYS)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def answer(text: str) -> bytes:
    return json.dumps({"status": "error", "message": text, "output": [text, text]}).encode()


def list_answer(text: str) -> bytes:
    entries = [{"id": text, "output": text, "created_at": text}, {"id": 7, "output": [text], "created_at": text}]
    return json.dumps({"message": text, "data": entries, "last_page": text}).encode()


SCANNERS: dict[str, Callable[[str], object]] = {
    "Scrubber.text": scrubber.text,
    "Scrubber.link": scrubber.link,
    "Scrubber.body": lambda text: scrubber.body(encoded(text)),
    "decoded": lambda text: decoded(encoded(text)),
    "display_text": display_text,
    "display_lines": display_lines,
    "display_json": display_json,
    "plain_text": plain_text,
    "mask_personal_data": mask_personal_data,
    "link_host": link_host,
    "without_links": without_links,
    "answers": parse_history,
    "too_many_values": lambda text: too_many_values(encoded(text)),
    "parse, the body": lambda text: parse(200, {}, encoded(text), Question("1", 0.0)),
    "parse, a value": lambda text: parse(200, {}, answer(text), Question("1", 0.0)),
    "parse, headers": lambda text: parse(
        429, {"Retry-After": text, "x-ratelimit-reset": text}, b"{}", Question("1", 0.0)
    ),
    "links": lambda text: collect_links([text, f"data:image/png;base64,{text}", f"data:{text}"]),
    "recent outputs, the body": lambda text: read_recent_outputs(200, {}, encoded(text), LIST_REQUEST, now=0.0),
    "recent outputs, values": lambda text: read_recent_outputs(200, {}, list_answer(text), LIST_REQUEST, now=0.0),
    "submission": submission,
    "checked_remote_id": checked_remote_id,
    "fetch_address": lambda text: fetch_address(f"https://api.example/{text}", "1", ALLOWED),
    "checked_url": lambda text: checked_url(f"https://shop.example/{text}"),
    "Guard.check_url": lambda text: Guard(()).check_url(f"https://{text}"),
    "parse_duration": parse_duration,
    "sniff": lambda text: sniff(encoded(text)),
    "is_text": lambda text: is_text(encoded(text)),
    "base64_start": lambda text: base64_start(encoded(text)),
    "Base64Decoder": lambda text: Base64Decoder().feed(encoded(text)),
}  # fmt: skip


def scan(name: str, text: str) -> None:
    with suppress(WorkerError, ValueError):
        SCANNERS[name](text)


def flood_of(unit: str, length: int) -> str:
    return unit * (length // len(unit))


def slowest_floods(name: str) -> list[str]:
    """Return the two floods for which a scanner is slowest."""
    return sorted(FLOODS, key=lambda unit: -cpu_seconds(partial(scan, name, flood_of(unit, 4_000))))[:2]


@pytest.mark.parametrize("name", SCANNERS)
def test_given_a_flood_when_doubled_then_a_scanner_takes_at_most_twice_as_long(name: str) -> None:
    for unit in slowest_floods(name):
        growth = grows_too_fast(partial(scan, name), partial(flood_of, unit), LENGTH)
        assert growth is None, f"{unit!r}: {growth}"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCANNERS)
def test_given_eight_megabytes_of_a_flood_then_a_scanner_takes_at_most_twice_as_long_as_for_four(name: str) -> None:
    for unit in slowest_floods(name):
        growth = grows_too_fast(partial(scan, name), partial(flood_of, unit), LONG_LENGTH)
        assert growth is None, f"{unit!r}: {growth}"


@pytest.mark.long
@pytest.mark.parametrize("unit", ["a lake at dawn, ", '{"output":["https:\\/\\/h\\/a.png"]},', KEYS[0][:12]])
def test_given_32_megabytes_and_100_keys_when_scrubbed_then_it_takes_less_than_a_second(unit: str) -> None:
    text = flood_of(unit, 32 << 20)
    data = text.encode()

    assert min(cpu_seconds(lambda: scrubber.text(text)) for _ in range(3)) < 1.0
    assert min(cpu_seconds(lambda: scrubber.body(data)) for _ in range(3)) < 1.0
