"""The page of webhooks: who was told what, and which receivers refuse it."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row

from worker.admin.jobs import PAGE_ROWS, RowsView, before_id, one_of, text
from worker.core.lifecycle import EVENT_STATES
from worker.store.reports.pages import WebhookFilter
from worker.store.reports.pages import webhooks_page as browse_webhooks
from worker.store.schema import events


class WebhooksView(RowsView):
    """The list of webhook events, newest first. The webhooks of selected jobs can be sent again."""

    table = events
    can_view_details = False
    list_template = "webhooks.html"
    column_list = ("job_id", "type", "url", "status", "attempts", "created_at", "due_at", "http_status")

    def get_list(self, *_: Any, **__: Any) -> tuple[None, Sequence[Row[Any]]]:
        """Return one page of the query in the URL."""
        webhook_filter = WebhookFilter(one_of("status", EVENT_STATES), text("receiver"))
        with self.reader.connection() as (connection, now):
            page = browse_webhooks(connection, webhook_filter, before=before_id(), limit=PAGE_ROWS)
        self._template_args.update(listing=page, now=now, webhook_filter=webhook_filter, states=EVENT_STATES)
        return None, page.rows


WebhooksView.keep_urls("index_view")
