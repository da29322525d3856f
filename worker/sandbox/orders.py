"""What an order says: how many outputs it asks for, of which kind, and which id its job gets."""

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

from worker.sandbox.families import FAMILIES, Family
from worker.sandbox.files import TIMED
from worker.sandbox.options import MOST_OUTPUTS, SandboxOptions

_TEXT_FORMATS = frozenset({"txt", "json", "srt", "vtt"})


def orders() -> list[str]:
    """Return the paths that orders are posted to."""
    return [order for family in FAMILIES for order in family.orders]


def unused_ids(options: SandboxOptions, moment: float) -> SandboxOptions:
    """Return options whose ids no run before had, where they have no seed; `moment` is in seconds since 1970."""
    if options.seed is not None or options.ids_after:
        return options
    return replace(options, ids_after=max(1, int(moment * 1_000) - 1_750_000_000_000))


def next_id(family: Family, options: SandboxOptions, count: int) -> str:
    """Return the id of a family's next job, of which `count` share the counter so far."""
    number = family.first_id + options.ids_after + count
    if not family.text_ids:
        return str(number)
    digest = sha256(f"{options.seed or 0}|{family.store}|{number}".encode()).hexdigest()
    return digest[:10] if family.shape == "training" else f"{digest[:6]}-{digest[6:12]}"


def extension_of(family: Family, body: Mapping[str, Any]) -> str:
    """Return the extension of the outputs that an order asks for; empty for none."""
    if family.makes == "png" and str(body.get("base64", "")).lower() in ("yes", "true", "1"):
        return "base64"
    if family.makes == "txt":
        form = str(body.get("output_format", "txt")).lower()
        if body.get("timestamp_level") and form == "txt":
            return TIMED
        return form if form in _TEXT_FORMATS else "txt"
    return family.makes


def samples_of(given: object) -> int | None:
    """Return how many pictures are asked for: 0 where nothing is said, None where it can't be."""
    if given is None or given == "":
        return 0
    if isinstance(given, str) and re.fullmatch("[0-9]{1,3}", given):
        given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= MOST_OUTPUTS:
        return given
    return None
