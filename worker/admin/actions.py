"""The page of the audit trail: the latest actions, newest first."""

from flask_admin import BaseView, expose

from worker.admin.jobs import PAGE_ROWS, before_id
from worker.admin.reader import AdminReader
from worker.store.reports.pages import actions_page


class ActionsView(BaseView):
    """The page of actions of operators and apps."""

    def __init__(self, reader: AdminReader, **arguments: str) -> None:
        self.reader = reader
        super().__init__(**arguments)

    @expose("/")
    def index(self) -> str:
        """Show one page of actions."""
        with self.reader.connection() as (connection, _):
            page = actions_page(connection, before=before_id(), limit=PAGE_ROWS)
        return str(self.render("actions.html", listing=page))
