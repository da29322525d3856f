"""Check the content of received files: unpack it, detect its media type, and find out whether it is complete."""

from collections.abc import Iterator

from worker.core.lifecycle import Attempt, BadBody, Unfit
from worker.core.media.base64_text import Base64Decoder, base64_start
from worker.core.media.signatures import Media, is_complete, is_text, pixel_count, sniff
from worker.core.media.text import NotPromisedText, text_media
from worker.downloads.content_coding import TooLarge, detect_coding, unpack
from worker.downloads.options import DownloadOptions
from worker.storage.partial_files import Incoming

MAX_CODINGS = 3  # nested content codings of one body


def check_content(incoming: Incoming, options: DownloadOptions, *, remote: bool) -> Media | Attempt:
    """Unpack a received file, and return its media type, or why it can't be stored.

    `remote`: it was downloaded, so a store with a delay may have sent an incomplete file.
    """
    failure = unpack_body(incoming, options.max_bytes)
    if failure is not None:
        return failure
    media = sniff(incoming.head)
    start = base64_start(incoming.head) if media is None else None
    if start is not None:
        try:
            incoming.replace(_decode_base64(incoming.chunks(), start))
        except ValueError:
            return BadBody("truncated", f"{incoming.size} bytes of an incomplete base64 text", remote)
        media = sniff(incoming.head)
    if media is None:
        text_result = _as_text(incoming, remote=remote)
        if not isinstance(text_result, Media):
            return text_result
        media = text_result
    area = pixel_count(media, incoming.head)
    if area is not None and area > options.max_pixels:
        return Unfit("too_large", f"{area} pixels, more than OUTPUT_MAX_PIXELS ({options.max_pixels})")
    if not is_complete(media, incoming.head, incoming.tail, incoming.size):
        return BadBody("truncated", f"{incoming.size} bytes that do not end like {media.type}", remote)
    return media


def unpack_body(incoming: Incoming, max_bytes: int) -> Attempt | None:
    """Decode a body that is not a media file as it was received. The coding in its headers may be wrong."""
    codings = [] if incoming.source is None else [name for name in incoming.source.coding.split(",") if name]
    for _ in range(MAX_CODINGS):
        if sniff(incoming.head) is not None:
            return None
        coding = detect_coding(incoming.head) or (codings.pop() if codings else None)
        if coding is None:
            return None
        try:
            incoming.replace(unpack(incoming.chunks(), coding, limit=max_bytes))
        except TooLarge:
            return Unfit("too_large", f"unpacked more than OUTPUT_MAX_BYTES ({max_bytes} bytes)")
        except ValueError:
            continue  # the body does not have this coding
    return None


def _as_text(incoming: Incoming, *, remote: bool) -> Media | BadBody:
    """Return the text type of a file that is not another media type, if its URL or its declared type is text."""
    promise = incoming.source.text if incoming.source is not None else ""
    early = remote and is_text(incoming.head)
    if not promise:
        return BadBody("not_media", f"{incoming.size} bytes that begin like no media", early)
    try:
        return text_media(promise, incoming.chunks())
    except NotPromisedText as reason:
        message = f"{incoming.size} bytes where {promise} is promised: {reason}"
        return BadBody("truncated", message, remote) if reason.is_truncated else BadBody("not_media", message, early)


def _decode_base64(chunks: Iterator[bytes], start: int) -> Iterator[bytes]:
    """Decode a base64 text. Raises ValueError if it is not base64, or incomplete."""
    decoder = Base64Decoder()
    for chunk in chunks:
        yield decoder.feed(chunk[start:])
        start = max(0, start - len(chunk))
    yield decoder.finish()
