"""The identity of a job: its account, its fetch address and its remote id."""

import re
from typing import NamedTuple

from worker.errors import NotTrackable

ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
REMOTE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
SYNTHETIC_ID = re.compile(r"sha256:[0-9a-f]{32}")
READY = "ready:"  # the start of `base` for a job that was ready when it was tracked, and whose family is unknown
MAX_ID_BITS = 512  # more than 128 digits need; Python refuses to print much longer numbers


class FetchAddress(NamedTuple):
    """Where a job is fetched. `url` is requested. `base` is `url` without the id; it identifies the family of the job.

    This is a tuple for speed, because every request creates one.
    """

    url: str
    base: str
    host: str

    @property
    def id_in_body(self) -> bool:
        """Whether the id is sent in the body, because the path does not contain it.

        >>> FetchAddress("https://h/api/v4/x/fetch", "https://h/api/v4/x/fetch", "h").id_in_body
        True
        """
        return self.url == self.base


def checked_remote_id(value: object) -> str:
    """Return the remote id as text. Raises NotTrackable if the value is not a valid id.

    >>> checked_remote_id(12202888)
    '12202888'
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise NotTrackable(f"a remote id must be text or a whole number, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > MAX_ID_BITS:
        raise NotTrackable(f"a number of {value.bit_length()} bits can't be a remote id")
    text = value.strip() if isinstance(value, str) else f"{value:d}"
    if not REMOTE_ID.fullmatch(text):
        raise NotTrackable(
            f"{text[:60]!r} can't be a remote id: use at most 128 letters, digits, '-' and '_', and start with a letter"
            " or digit"
        )
    return text


def can_be_asked(base: str, remote_id: str) -> bool:
    """Return whether a job can be fetched: its family is known, and its id comes from the API.

    >>> can_be_asked("https://h/api/v3/fetch", "7"), can_be_asked("https://h/api/v3/fetch", "sha256:0a")
    (True, False)
    """
    return not base.startswith(READY) and not remote_id.startswith("sha256:")
