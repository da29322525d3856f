"""Outputs that are text (transcripts, chats, subtitles): whether text is expected, and whether bytes are such text.

Binary media are detected by their signatures. Text has no signature, so it is accepted only if the URL or the declared
type promises it. HTML pages and errors are refused.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from worker.core.json_size import too_many_values
from worker.core.media.link_kinds import EXTENSIONS, extension_of
from worker.core.media.signatures import Media

Promise = Literal["", "text", "json", "subtitles"]
PROMISES: tuple[Promise, ...] = ("", "text", "json", "subtitles")

PLAIN, JSON = Media("text/plain", "txt"), Media("application/json", "json")
VTT, SRT = Media("text/vtt", "vtt"), Media("application/x-subrip", "srt")

PARSED_CHARACTERS = 4_194_304  # for longer JSON only the first and last characters are checked
START_CHARACTERS = 65_536  # kept from the start and from the end; the errors of stores are shorter

_PROMISED_BY_EXTENSION: dict[str, Promise] = {
    **dict.fromkeys(("txt", "text"), "text"),
    "json": "json",
    **dict.fromkeys(("vtt", "srt"), "subtitles"),
}
_PROMISED_BY_TYPE: dict[str, Promise] = {
    "text/plain": "text",
    "application/json": "json",
    "text/json": "json",
    "text/vtt": "subtitles",
    "text/srt": "subtitles",
    "text/x-srt": "subtitles",
    "application/srt": "subtitles",
    "application/x-srt": "subtitles",
    "application/x-subrip": "subtitles",
}
# A URL with one of these extensions is not text, whatever type is declared: stores declare many files as text/plain,
# and their errors are JSON.
_BINARY_EXTENSIONS = frozenset({"zip", "tar", "7z", "rar", "pdf", "bin", "html", "htm", "xhtml", "xml"}).union(
    *(EXTENSIONS[kind] for kind in ("picture", "video", "audio", "model", "weights"))
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_MARKUP = re.compile(
    r"<(?:[!?]|(?:html|head|body|title|meta|link|script|style|svg|math|iframe|base|table|div|center|h[1-6]|p|br|pre"
    r"|error)\b)",
    re.IGNORECASE,
)
_ELEMENT = re.compile(r"<([A-Za-z][\w:.-]{0,100}+)[\s/>]")
# The start of a base64 text that contains no media, or that continues with other characters.
_BASE64 = re.compile(
    r"[\"']?(?:data:[^,\"'<>]{0,200},|[A-Za-z0-9+/_-]{200}|[A-Za-z0-9+/_-]{60,100}+\r?\n[A-Za-z0-9+/_-]{60,100}+\r?\n)"
)
_VTT = re.compile(r"WEBVTT(?:[ \t\n]|$)")
_SRT = re.compile(r"(?:\d{1,9}[ \t]*\n)?\d{1,4}:\d{1,2}:\d{1,2}[,.]\d{1,3}[ \t]*-->[ \t]*\d{1,4}:\d{1,2}:\d{1,2}[,.]\d")
# The JSON errors of stores and servers: S3 and compatible ones, Google, Azure, Cloudflare, Supabase, Laravel, Spring,
# RFC 9457.
_ERROR_FIELDS = frozenset({"error", "errors", "fault", "exception"})
_STATUS_FIELDS = ("status", "statuscode", "status_code", "code")
_BESIDES = (
    "code message messege msg status statuscode status_code errorcode error_code error_description reason detail"
    " details description tip tips requestid request_id hostid host_id resource timestamp path success ok trace_id"
    " type title instance hint file line trace"
)
_BESIDE_AN_ERROR = _ERROR_FIELDS.union(_BESIDES.split())
_ERROR_WORDS = re.compile(r"not found|no such|forbidden|denied|unauthori[sz]ed|expired|does not exist", re.IGNORECASE)
_MAX_ERROR_TEXT = 200  # characters of an error that consists of one field


class NotPromisedText(Exception):
    """The bytes are not the promised text. `is_truncated`: they are the start of such a text."""

    def __init__(self, text: str, *, is_truncated: bool = False) -> None:
        super().__init__(text)
        self.is_truncated = is_truncated


def promised_text(addresses: Iterable[str], declared: str = "") -> Promise:
    """Return the promised text format of an output, or "". The first URL whose path has an extension decides.

    `addresses` are the link and its redirect target. `declared` is the Content-Type of the answer.

    >>> promised_text(["https://h/a.txt?x=.png"]), promised_text(["https://h/a"], "application/json; charset=utf-8")
    ('text', 'json')
    >>> promised_text(["https://h/a.png"], "text/plain")
    ''
    """
    for address in addresses:
        extension = extension_of(address)
        if extension in _PROMISED_BY_EXTENSION:
            return _PROMISED_BY_EXTENSION[extension]
        if extension in _BINARY_EXTENSIONS:
            return ""
    return _PROMISED_BY_TYPE.get(declared.partition(";")[0].strip().lower(), "")


def text_media(promise: Promise, chunks: Iterable[bytes]) -> Media:
    """Return the text format of some bytes. Raises NotPromisedText for an HTML page, an error and other bytes."""
    start, text, end = "", "", ""
    size = 0
    for piece in _decoded(chunks):
        size += len(piece)
        start += piece[: START_CHARACTERS - len(start)]
        end = (end + piece)[-START_CHARACTERS:]
        if promise == "json":
            text += piece[: max(0, PARSED_CHARACTERS + 1 - len(text))]
    start, end = start.lstrip().replace("\r\n", "\n").replace("\r", "\n"), end.rstrip()
    if not end:
        raise NotPromisedText("empty, or only blanks")
    element = _ELEMENT.match(start)
    if _MARKUP.match(start) or (element is not None and end.endswith((f"</{element[1]}>", "/>"))):
        raise NotPromisedText("an HTML page or XML")
    match promise:
        case "json":
            if not _is_json(text, end, size):
                raise NotPromisedText("not JSON")
            return JSON
        case "subtitles":
            if _VTT.match(start):
                return VTT
            if _SRT.match(start):
                return SRT
            raise NotPromisedText("not subtitles")
        case _:
            if _BASE64.match(start):
                raise NotPromisedText("base64 that is not media")
            if size <= START_CHARACTERS and start.startswith("{"):
                _refuse_error(start)
            return PLAIN


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8, or UTF-16 with a byte order mark. Raises NotPromisedText."""
    decoder: codecs.IncrementalDecoder | None = None
    pending = b""
    for chunk in chunks:
        pending += chunk
        if decoder is None:
            if len(pending) < 3:
                continue
            decoder = _decoder(pending)
        yield _checked(decoder, pending)
        pending = b""
    yield _checked(decoder or _decoder(pending), pending, final=True)


def _decoder(start: bytes) -> codecs.IncrementalDecoder:
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")()


def _checked(decoder: codecs.IncrementalDecoder, data: bytes, *, final: bool = False) -> str:
    try:
        text = decoder.decode(data, final)
    except UnicodeDecodeError as error:
        cut = final and error.end >= len(error.object)
        raise NotPromisedText("not UTF-8 text", is_truncated=cut) from None
    if _CONTROL.search(text.replace("\r", "")):
        raise NotPromisedText("text with control characters")
    return text


def _is_json(text: str, end: str, size: int) -> bool:
    """Return whether a text is JSON. If it is too large to parse, only its first and last characters are checked.

    Raises NotPromisedText for the JSON of an error and for truncated JSON.
    """
    text = text.strip()
    if size > PARSED_CHARACTERS or too_many_values(text.encode()):
        return (text[:1], end[-1:]) in (("{", "}"), ("[", "]"))
    try:
        _check_no_error(_parsed(text))
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        raise NotPromisedText("not JSON", is_truncated=cut) from None
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str)  # numbers of any length


def _refuse_error(text: str) -> None:
    """Raise NotPromisedText if a text is the JSON of an error."""
    try:
        parsed = _parsed(text)
    except (ValueError, RecursionError):
        return
    _check_no_error(parsed)


def _check_no_error(parsed: Any) -> None:
    """Raise NotPromisedText for an object that contains only the description of an error."""
    if not isinstance(parsed, dict):
        return
    fields = {str(name).lower(): value for name, value in parsed.items() if value not in (None, "", [], {})}
    if not fields or not _BESIDE_AN_ERROR.issuperset(fields):
        return
    has_error_field = not _ERROR_FIELDS.isdisjoint(fields) or any(
        _is_error_status(fields.get(name)) for name in _STATUS_FIELDS
    )
    has_code = "code" in fields and "message" in fields
    single_texts = [value for name, value in fields.items() if len(fields) == 1 and name in ("message", "detail")]
    says_error = any(
        isinstance(text, str) and len(text) <= _MAX_ERROR_TEXT and _ERROR_WORDS.search(text) for text in single_texts
    )
    if has_error_field or has_code or says_error:
        raise NotPromisedText("the JSON of an error")


def _is_error_status(value: Any) -> bool:
    text = str(value).lower()
    return text in ("error", "failed", "failure", "fail") or (
        text.isascii() and re.fullmatch("[45][0-9]{2}", text) is not None
    )
