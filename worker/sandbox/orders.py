"""Parts of an order: number and kind of its outputs, and the id of its job."""

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from worker.sandbox.families import FAMILIES, Family
from worker.sandbox.files import WITH_TIMES
from worker.sandbox.options import MAX_OUTPUTS, SandboxOptions

_TEXT_FORMATS = frozenset({"txt", "json", "srt", "vtt"})


def order_paths() -> list[str]:
    """Return the paths at which orders are accepted."""
    return [order for family in FAMILIES for order in family.orders]


def unused_ids(options: SandboxOptions, moment: float) -> SandboxOptions:
    """Return options with ids that no earlier run used, unless there is a seed. `moment` is in seconds since 1970."""
    if options.seed is not None or options.ids_after:
        return options
    return replace(options, ids_after=max(1, int(moment * 1_000) - 1_750_000_000_000))


def next_id(family: Family, options: SandboxOptions, count: int) -> str:
    """Return the id of a family's next job. `count` ids of its sequence were issued before."""
    number = family.first_id + options.ids_after + count
    if not family.text_ids:
        return str(number)
    digest = sha256(f"{options.seed or 0}|{family.store}|{number}".encode()).hexdigest()
    return digest[:10] if family.shape == "training" else f"{digest[:6]}-{digest[6:12]}"


def extension_of(family: Family, body: Mapping[str, Any]) -> str:
    """Return the file extension of the outputs that an order asks for. Empty if there are none."""
    if family.makes == "png" and str(body.get("base64", "")).lower() in ("yes", "true", "1"):
        return "base64"
    if family.makes == "txt":
        form = str(body.get("output_format", "txt")).lower()
        if body.get("timestamp_level") and form == "txt":
            return WITH_TIMES
        return form if form in _TEXT_FORMATS else "txt"
    return family.makes


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return the prompt or text of an order. Empty if it has none."""
    prompt = body.get("prompt", body.get("text", ""))
    return prompt if isinstance(prompt, str) else ""


def samples_of(value: object) -> int | None:
    """Return the number of pictures that an order asks for: 0 if it does not say, None if the value is invalid."""
    if value is None or value == "":
        return 0
    if isinstance(value, str) and re.fullmatch("[0-9]{1,3}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_OUTPUTS:
        return value
    return None
