"""What identifies a job: its account, the address it is asked at, and its remote id."""

import re
from typing import NamedTuple

from worker.errors import NotTrackable

ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
REMOTE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
SYNTHETIC_ID = re.compile(r"sha256:[0-9a-f]{32}")
READY = "ready:"  # begins the base of a job that was ready when it was tracked, and whose family nobody knows
MAX_ID_BITS = 512  # more than 128 digits have; Python refuses to print much longer numbers


class FetchAddress(NamedTuple):
    """Where one job is asked about: `url` is called; `base` is `url` without the id, and names the job's family.

    A tuple, since one is made for every single request.
    """

    url: str
    base: str
    host: str

    @property
    def id_in_body(self) -> bool:
        """Whether the id is sent in the body, because the path does not carry it.

        >>> FetchAddress("https://h/api/v4/x/fetch", "https://h/api/v4/x/fetch", "h").id_in_body
        True
        """
        return self.url == self.base


def checked_remote_id(value: object) -> str:
    """Return the remote id as text. Raises NotTrackable for anything that can't be one.

    >>> checked_remote_id(12202888)
    '12202888'
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise NotTrackable(f"a remote id is text or a whole number, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > MAX_ID_BITS:
        raise NotTrackable(f"a number of {value.bit_length()} bits can't be a remote id")
    text = value.strip() if isinstance(value, str) else f"{value:d}"
    if not REMOTE_ID.fullmatch(text):
        raise NotTrackable(
            f"{text[:60]!r} can't be a remote id: letters, digits, '-' and '_', at most 128, no '-' or '_' first"
        )
    return text


def can_be_asked(base: str, remote_id: str) -> bool:
    """Return whether the API can be asked about a job: its family is known, and the API gave it its id.

    >>> can_be_asked("https://h/api/v3/fetch", "7"), can_be_asked("https://h/api/v3/fetch", "sha256:0a")
    (True, False)
    """
    return not base.startswith(READY) and not remote_id.startswith("sha256:")
