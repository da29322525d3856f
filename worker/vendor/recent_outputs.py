"""The API's list of recent outputs of an account: the request for a page of it, and the meaning of the answer.

The vendor documents two paths for the list, and of an answer only that it has `{id, output[]}` and pages. So the answer
is read in every form in which such lists come. Messages are in the API's own words, and not scrubbed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from worker.core.numbers import number
from worker.core.reply import AnotherJob, Empty, Processing, Ready, Reply, Unread
from worker.errors import RefusedAddress
from worker.vendor.answer_fields import json_value
from worker.vendor.answer_links import listed_outputs
from worker.vendor.families import ApiFamily
from worker.vendor.fetch_url import AllowedApi, api_host
from worker.vendor.replies import FAILED_WORDS, ParsedAnswer, Question, rule_for
from worker.vendor.shapes import shape_of
from worker.vendor.submissions import id_of

OutputType = Literal["image", "video", "audio"]

LIST_PATHS = ("v6/assets_generated", "assets_generated")  # below `/api/`; the documentation has either of them
LIST_FIELDS = (
    *("data", "assets", "outputs", "output", "images", "videos", "audios", "files", "items", "generations"),
    *("results", "result", "records"),
)
_CREATED_FIELDS = ("created_at", "createdAt", "created", "created_on", "date", "datetime", "timestamp")
_PAGE_FIELDS = ("last_page", "lastPage", "total_pages", "totalPages", "pages")  # the number of the last page
_NEXT_FIELDS = ("next_page_url", "next_page", "next", "has_more", "has_next")  # empty or false on the last page
_PAGE_HOLDERS = ("data", "meta", "pagination", "paging")
_TYPES: dict[str, OutputType] = {"picture": "image", "video": "video", "audio": "audio"}
_VIDEO_WORDS = ("video", "deepfake")
_AUDIO_WORDS = ("audio", "voice", "speech", "music", "sound")
_MAX_DEPTH = 3  # of the list in objects
_SECONDS = range(1_000_000_000, 100_000_000_000)  # since 1970: a smaller number is a duration
_MAX_TIME = 40  # characters of a time


class ListRequest(NamedTuple):
    """The request for one page. `site` is the scheme and host of the API, `path` one of `LIST_PATHS`."""

    site: str
    path: str
    output_type: OutputType
    page: int = 1


class RecentOutput(NamedTuple):
    """One job in the list: its remote id, the URLs of its outputs, and when it was created, if the API says so."""

    remote_id: str
    urls: tuple[str, ...] = ()
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of the list, in the order of the API. `is_last`: the API says that there are no more pages."""

    outputs: tuple[RecentOutput, ...]
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class NoSuchList:
    """The API has no list at this path."""

    message: str


@dataclass(frozen=True, slots=True)
class ListRefused:
    """The API refuses the list, or its answer can't be read."""

    message: str


ListReply = ListPage | NoSuchList | ListRefused


def output_type_of(family: ApiFamily, kind: str) -> OutputType | None:
    """Return the type under which the API lists the outputs of a job. None for texts, models and trainings.

    >>> output_type_of(ApiFamily("", "v6/video/fetch", "path", "video"), "video")
    'video'
    """
    if family.media != "any":
        return _TYPES.get(family.media)
    words = f"{family.fetch} {kind}".lower()
    if any(word in words for word in _VIDEO_WORDS):
        return "video"
    if any(word in words for word in _AUDIO_WORDS):
        return "audio"
    return "image"


def list_url(request: ListRequest, api: AllowedApi) -> str:
    """Return the URL of the list. Raises RefusedAddress if the key must not be sent there."""
    host = api_host(request.site)
    if host not in api.hosts:
        raise RefusedAddress(
            f"the host {host!r} of the order is refused: it is not on SD_API_HOSTS ({', '.join(sorted(api.hosts))})"
        )
    return f"{request.site}/api/{request.path}"


def list_fields(request: ListRequest) -> dict[str, object]:
    """Return the fields of the request besides the key. The first page is asked for with the documented fields only."""
    return {"type": request.output_type} | ({"page": request.page} if request.page > 1 else {})


def read_recent_outputs(
    http_status: int, headers: Mapping[str, str], body: bytes, request: ListRequest, *, now: float
) -> ListReply:
    """Return what the answer says. `now` is in seconds since 1970. Never raises."""
    document = json_value(body)
    fields = document if isinstance(document, dict) else None
    answer = ParsedAnswer(http_status, headers, body, fields, Question(None, now))
    entries = _entries(document) if http_status < 300 and not _is_refusal(answer) else None
    if entries or (entries is not None and answer.meaning is None):
        outputs = _merged(entries)
        if outputs or not entries:
            return ListPage(outputs, _is_last(document, request.page))
        return ListRefused(f"a list without ids: {shape_of(http_status, body)}")
    rule, reply = rule_for(answer)
    if rule.name == "wrong_path" or (answer.is_page and http_status < 300):
        return NoSuchList(_words(reply, answer))
    return ListRefused(_words(reply, answer))


def _is_refusal(answer: ParsedAnswer) -> bool:
    """Return whether the status says so. A message alone does not: it can come with a list."""
    return answer.code >= 400 or answer.word == "error" or answer.word in FAILED_WORDS


def _words(reply: Reply, answer: ParsedAnswer) -> str:
    is_unread = isinstance(reply, Unread) and answer.fields is not None
    if is_unread or isinstance(reply, (Processing, Ready, Empty, AnotherJob)) or not reply.message:
        message = f" ({answer.message})" if answer.message else ""
        return f"an answer without a list{message}: {shape_of(answer.http_status, answer.body)}"
    return reply.message


def _entries(value: Any, depth: int = 0) -> list[Any] | None:
    """Return the entries of the list in an answer, or None if there is no list."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or depth > _MAX_DEPTH:
        return None
    if value and all(name.isdecimal() for name in value):
        return list(value.values())  # PHP writes a list with gaps as an object
    inner = (_entries(value.get(name), depth + 1) for name in LIST_FIELDS)
    return next((entries for entries in inner if entries is not None), None)


def _merged(entries: list[Any]) -> tuple[RecentOutput, ...]:
    """Return the jobs in the list. Entries without an id are left out, and those with the same id are one job."""
    urls: dict[str, dict[str, None]] = {}
    created_at: dict[str, datetime | None] = {}
    for output in _outputs(entries):
        urls.setdefault(output.remote_id, {}).update(dict.fromkeys(output.urls))
        created_at[output.remote_id] = created_at.get(output.remote_id) or output.created_at
    return tuple(RecentOutput(remote_id, tuple(urls[remote_id]), created_at[remote_id]) for remote_id in urls)


def _outputs(entries: list[Any]) -> Iterator[RecentOutput]:
    for entry in entries:
        remote_id = id_of(entry) if isinstance(entry, dict) else None
        if remote_id is not None:
            urls = tuple(link.url for link in listed_outputs(entry).links)
            yield RecentOutput(remote_id, urls, _created_at(entry))


def _created_at(entry: Mapping[str, Any]) -> datetime | None:
    return next((moment for name in _CREATED_FIELDS if (moment := _moment(entry.get(name))) is not None), None)


def _moment(value: object) -> datetime | None:
    """Return a time in ISO 8601, or in seconds or milliseconds since 1970. A time without a time zone is UTC."""
    seconds = number(value)
    try:
        if seconds is not None:
            seconds = seconds / 1_000 if seconds >= _SECONDS.stop else seconds
            return datetime.fromtimestamp(seconds, UTC) if _SECONDS.start <= seconds < _SECONDS.stop else None
        if not isinstance(value, str) or len(value) > _MAX_TIME:
            return None
        moment = datetime.fromisoformat(value.strip())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _is_last(document: Any, page: int) -> bool:
    """Return whether the answer says that there are no pages after this one."""
    if not isinstance(document, dict):
        return False
    for holder in (document, *map(document.get, _PAGE_HOLDERS)):
        if not isinstance(holder, dict):
            continue
        last = next((last for name in _PAGE_FIELDS if (last := number(holder.get(name))) is not None), None)
        if last is not None:
            return page >= last
        following = [holder[name] for name in _NEXT_FIELDS if name in holder]
        if following:
            return not any(following)
    return False
