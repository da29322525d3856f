"""The pages of outputs: the list, a gallery of what is stored, and the stored files themselves, behind the login."""

from collections.abc import Sequence
from typing import Any

from flask import request
from flask_admin import expose
from sqlalchemy import Row
from werkzeug.exceptions import NotFound, RequestedRangeNotSatisfiable
from werkzeug.wrappers import Response
from werkzeug.wsgi import FileWrapper

from worker.admin.jobs import RowsView, before_id, number, one_of, text
from worker.client.tracking import open_output
from worker.core.lifecycle import OUTPUT_STATES
from worker.errors import OutputMissing
from worker.store.reports.pages import OutputFilter, jobs_by_id
from worker.store.reports.pages import outputs_page as browse_outputs
from worker.store.schema import outputs

PAGE_ROWS = 50
GALLERY_ROWS = 24
PICTURE_BYTES_MOST = 25_000_000  # larger ones are offered by name: a page of them would be half a gigabyte
PICTURES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"})
FILMS = frozenset({"video/mp4", "video/webm", "video/quicktime"})
SOUNDS = frozenset({"audio/mpeg", "audio/flac", "audio/ogg", "audio/wav", "audio/mp4"})
TEXTS = frozenset({"text/plain", "application/json", "text/vtt", "application/x-subrip"})
CODES = (
    "cancelled", "gone", "http_error", "not_media", "refused_address", "storage", "too_large", "truncated",
    "unreachable",
)  # fmt: skip
BLOCK = 1 << 16
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; media-src 'self'; sandbox"


class OutputsView(RowsView):
    """Outputs, newest first."""

    table = outputs
    can_view_details = False
    list_template = "outputs.html"
    column_list = (
        "id", "job_id", "position", "host", "status", "media_type", "size_bytes", "attempts", "error_code",
    )  # fmt: skip

    def get_list(self, *_: Any, **__: Any) -> tuple[None, Sequence[Row[Any]]]:
        """One page, by what the address asks for."""
        wanted = OutputFilter(one_of("status", OUTPUT_STATES), text("code"), text("host"), number("job"))
        with self.reading.connection() as (connection, now):
            page = browse_outputs(connection, wanted, before=before_id(), limit=PAGE_ROWS)
        self._template_args.update(found=page, now=now, wanted=wanted, states=OUTPUT_STATES, codes=CODES)
        return None, page.rows

    @expose("/gallery/")
    def gallery(self) -> str:
        """What is stored, to look at: of all jobs, or of one."""
        wanted = OutputFilter(status="stored", job_id=number("job"))
        with self.reading.connection() as (connection, _):
            page = browse_outputs(connection, wanted, before=before_id(), limit=GALLERY_ROWS)
            known = jobs_by_id(connection, [row.job_id for row in page.rows])
        shown: str = self.render("gallery.html", found=page, owners=known, wanted=wanted)
        return shown

    @expose("/file/<int:output_id>")
    def file(self, output_id: int) -> Response:
        """A stored file. Text is shown as plain text; what no browser shows safely is only offered for download."""
        row = self.reading.output(output_id)
        if row is None or row.status != "stored":
            raise NotFound("there is no such file")
        try:
            body = open_output(output_id)
        except OutputMissing:
            raise NotFound("the file is gone: `fetch-worker verify` gets it again") from None
        kind = "file" if "download" in request.args else as_what(row.media_type, 0)
        shown = kind != "file"
        response = Response(FileWrapper(body, BLOCK), direct_passthrough=True)
        shown_type = "text/plain; charset=utf-8" if kind == "text" else row.media_type
        response.headers["Content-Type"] = shown_type if shown else "application/octet-stream"
        response.content_length = row.size_bytes
        response.headers["Content-Disposition"] = f'{"inline" if shown else "attachment"}; filename="{file_name(row)}"'
        response.headers["Content-Security-Policy"] = FILE_POLICY
        response.call_on_close(body.close)
        try:
            return response.make_conditional(request.environ, accept_ranges=True, complete_length=row.size_bytes)
        except RequestedRangeNotSatisfiable:
            body.close()
            raise


OutputsView.only_these("index_view", "gallery", "file")


def as_what(media_type: str | None, size_bytes: int | None) -> str:
    """Return how a page shows an output: as a picture, a film, a sound, or by name as a text or another file."""
    if media_type in PICTURES and (size_bytes or 0) <= PICTURE_BYTES_MOST:
        return "picture"
    kinds = {"film": FILMS, "sound": SOUNDS, "text": TEXTS}
    return next((kind for kind, types in kinds.items() if media_type in types), "file")


def file_name(row: Row[Any]) -> str:
    """What a browser saves an output as: by our own ids, never by its link."""
    extension = (row.location or "").rpartition(".")[2]
    return f"job-{row.job_id}-{row.position}" + (f".{extension}" if extension.isalnum() and extension.isascii() else "")
