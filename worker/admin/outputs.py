"""The pages of outputs: the list, the gallery of stored outputs, and the stored files."""

from collections.abc import Sequence
from typing import Any

from flask import request
from flask_admin import expose
from sqlalchemy import Row
from werkzeug.exceptions import NotFound, RequestedRangeNotSatisfiable
from werkzeug.wrappers import Response
from werkzeug.wsgi import FileWrapper

from worker.admin.jobs import RowsView, before_id, number, one_of, text
from worker.client.jobs import open_output
from worker.core.lifecycle import OUTPUT_CODES, OUTPUT_STATES
from worker.errors import OutputMissing
from worker.store.reports.pages import OutputFilter, jobs_by_id
from worker.store.reports.pages import outputs_page as browse_outputs
from worker.store.schema import outputs

PAGE_ROWS = 50
GALLERY_ROWS = 24
MAX_PICTURE_BYTES = 25_000_000  # larger pictures are links: a page of them would be half a gigabyte
PICTURES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"})
FILMS = frozenset({"video/mp4", "video/webm", "video/quicktime"})
SOUNDS = frozenset({"audio/mpeg", "audio/flac", "audio/ogg", "audio/wav", "audio/mp4"})
TEXTS = frozenset({"text/plain", "application/json", "text/vtt", "application/x-subrip"})
BLOCK = 1 << 16
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; media-src 'self'; sandbox"


class OutputsView(RowsView):
    """The list of outputs, newest first."""

    table = outputs
    can_view_details = False
    list_template = "outputs.html"
    column_list = (
        "id", "job_id", "position", "host", "status", "media_type", "size_bytes", "attempts", "error_code",
    )  # fmt: skip

    def get_list(self, *_: Any, **__: Any) -> tuple[None, Sequence[Row[Any]]]:
        """Return one page of the query in the URL."""
        output_filter = OutputFilter(one_of("status", OUTPUT_STATES), text("code"), text("host"), number("job"))
        with self.reader.connection() as (connection, now):
            page = browse_outputs(connection, output_filter, before=before_id(), limit=PAGE_ROWS)
        self._template_args.update(
            listing=page, now=now, output_filter=output_filter, states=OUTPUT_STATES, codes=OUTPUT_CODES
        )
        return None, page.rows

    @expose("/gallery/")
    def gallery(self) -> str:
        """Show the stored outputs of all jobs or of one job."""
        output_filter = OutputFilter(status="stored", job_id=number("job"))
        with self.reader.connection() as (connection, _):
            page = browse_outputs(connection, output_filter, before=before_id(), limit=GALLERY_ROWS)
            owners = jobs_by_id(connection, [row.job_id for row in page.rows])
        return str(self.render("gallery.html", listing=page, owners=owners, output_filter=output_filter))

    @expose("/file/<int:output_id>")
    def file(self, output_id: int) -> Response:
        """Send a stored file. Text is sent as plain text; types that are unsafe in a browser are sent as downloads."""
        row = self.reader.output(output_id)
        if row is None or row.status != "stored":
            raise NotFound("there is no such file")
        try:
            body = open_output(output_id)
        except OutputMissing:
            raise NotFound("the file is missing: run `fetch-worker verify` to download it again") from None
        kind = "file" if "download" in request.args else display_kind(row.media_type, 0)
        inline = kind != "file"
        response = Response(FileWrapper(body, BLOCK), direct_passthrough=True)
        content_type = "text/plain; charset=utf-8" if kind == "text" else row.media_type
        response.headers["Content-Type"] = content_type if inline else "application/octet-stream"
        response.content_length = row.size_bytes
        response.headers["Content-Disposition"] = f'{"inline" if inline else "attachment"}; filename="{file_name(row)}"'
        response.headers["Content-Security-Policy"] = FILE_POLICY
        response.call_on_close(body.close)
        try:
            return response.make_conditional(request.environ, accept_ranges=True, complete_length=row.size_bytes)
        except RequestedRangeNotSatisfiable:
            body.close()
            raise


OutputsView.keep_urls("index_view", "gallery", "file")


def display_kind(media_type: str | None, size_bytes: int | None) -> str:
    """Return how a page shows an output: as picture, film, sound, or a link to a text or another file."""
    if media_type in PICTURES and (size_bytes or 0) <= MAX_PICTURE_BYTES:
        return "picture"
    kinds = {"film": FILMS, "sound": SOUNDS, "text": TEXTS}
    return next((kind for kind, types in kinds.items() if media_type in types), "file")


def file_name(row: Row[Any]) -> str:
    """Return the file name for a download, made from the ids and not from the link."""
    extension = (row.location or "").rpartition(".")[2]
    return f"job-{row.job_id}-{row.position}" + (f".{extension}" if extension.isalnum() and extension.isascii() else "")
