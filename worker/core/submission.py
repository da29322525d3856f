"""What a submit answer, or a bare id, says about the job to be tracked."""

import hashlib
import json
import math
from dataclasses import dataclass

from worker.core.fetch_address import checked_remote_id
from worker.core.links import Link, left_out, listed
from worker.core.reply import json_object, message_of, status_of
from worker.errors import NotTrackable


@dataclass(frozen=True, slots=True)
class Submission:
    """What is known of a job when it is handed over. `outputs` is filled where it was ready at once."""

    remote_id: str
    fetch_url: str | None = None
    eta: float | None = None
    model: str | None = None
    outputs: tuple[Link, ...] = ()
    left_out: int = 0

    @property
    def pollable(self) -> bool:
        """Whether the API can be asked about it: an id that we made up from its outputs can't be fetched."""
        return not self.remote_id.startswith("sha256:")


def submission(remote: object) -> Submission:
    """Reads an id (text or number) or a whole submit answer (mapping, or its JSON text).

    Raises NotTrackable for an `error` or `failed` answer, and for one with neither id nor output.
    """
    if isinstance(remote, str) and remote.lstrip("\ufeff \t\r\n").startswith("{"):
        parsed = json_object(remote.encode("utf-8", "replace"))
        if parsed is None:
            raise NotTrackable(
                "the submit answer is no JSON object: hand over the API's answer as it came, or the id alone"
            )
        remote = parsed
    if not isinstance(remote, dict):
        return Submission(checked_remote_id(remote))
    status = status_of(remote)
    if status in ("error", "failed"):
        raise NotTrackable(f"the API did not take the job ({status}): {message_of(remote) or 'no message'}")
    ready = listed(remote) if status == "success" else ()
    remote_id = next((remote[name] for name in ("id", "training_id", "request_id", "taskId") if remote.get(name)), None)
    if remote_id is None and not ready:
        raise NotTrackable("the submit answer has no id, nor the output of a success: there is nothing to ask for")
    return Submission(
        remote_id=_synthetic(ready) if remote_id is None else checked_remote_id(remote_id),
        fetch_url=_text(remote.get("fetch_result")),
        eta=seconds(remote.get("eta")),
        model=_model(remote),
        outputs=ready,
        left_out=left_out(remote) if ready else 0,
    )


def seconds(value: object) -> float | None:
    """A finite, positive number of seconds, or None for anything else.

    >>> seconds("20.9"), seconds(-1), seconds(True)
    (20.9, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _text(value: object) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise NotTrackable(f"fetch_result is text, not {type(value).__name__}")
    return value.strip() or None


def _model(answer: dict[str, object]) -> str | None:
    meta = answer.get("meta")
    model = answer.get("model_id") or (meta.get("model_id") if isinstance(meta, dict) else None)
    if not isinstance(model, str) or not model.isprintable():  # it becomes part of the kind, which people read
        return None
    return model.strip()[:40] or None


def _synthetic(outputs: tuple[Link, ...]) -> str:
    digest = hashlib.sha256(json.dumps([link.url for link in outputs]).encode()).hexdigest()
    return f"sha256:{digest[:32]}"
