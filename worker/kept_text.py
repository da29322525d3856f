"""What is kept of an answer: its first 64 KiB as text, without any key, and with its links as they are."""

import re

from worker.scrubber import Scrubber

MAX_BYTES = 64 * 1024
# A link, as JSON may write it too. A signed one may begin like a key, so only whole keys are taken out of it.
_LINK = re.compile(r"(https?:(?:\\?/){2}[^\s\"'<>]+)", re.IGNORECASE)


def kept_text(body: bytes, scrubber: Scrubber) -> str:
    """Return the first 64 KiB of a body. Give more of it where there is more: keys are taken out before it is cut.

    Bytes that are no UTF-8 and NUL, which no database takes as text, become replacement characters.
    """
    text = body.decode("utf-8", "replace").replace("\x00", "\N{REPLACEMENT CHARACTER}")
    whole = scrubber.link(text)
    pieces = [part if _LINK.fullmatch(part) else scrubber.text(part) for part in _LINK.split(whole)]
    return "".join(pieces).encode()[:MAX_BYTES].decode("utf-8", "ignore")
