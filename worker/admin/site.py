"""The admin site: all pages with access control, assets and error pages."""

from pathlib import Path
from typing import Any

from flask import Flask, Response, g, render_template
from flask_admin import Admin, AdminIndexView, expose
from werkzeug.exceptions import HTTPException, NotFound

from worker.admin.access import AccessControl, guard, this_path
from worker.admin.actions import ActionsView
from worker.admin.breakers import BreakersView
from worker.admin.curves import SPANS
from worker.admin.formatting import moment, without_links
from worker.admin.jobs import JobsView, list_parameters
from worker.admin.outputs import OutputsView, display_kind
from worker.admin.plots import PLOTS, PlotsView
from worker.admin.reader import AdminReader
from worker.admin.trouble_buttons import trouble_button
from worker.admin.webhooks import WebhooksView
from worker.core.display import display_lines
from worker.core.humanize import format_bytes, format_duration
from worker.core.redaction.masking import link_host
from worker.errors import Unavailable, WorkerError
from worker.settings import Settings

START_PLOTS = {name: PLOTS[name] for name in ("requests", "delay")}
ASSETS = Path(__file__).with_name("assets")
ASSET_TYPES = {"site.css": "text/css", "site.js": "text/javascript"}


class StartView(AdminIndexView):
    """The overview page."""

    def __init__(self, reader: AdminReader) -> None:
        self.reader = reader
        super().__init__(name="Overview", url="/")

    @expose("/")
    def index(self) -> str:
        """Show jobs by state, problems and holds."""
        data = self.reader.start()
        page: str = self.render(
            "start.html",
            overview=data.overview,
            held=data.held,
            claims=data.claims,
            overdue=data.overdue,
            plots=START_PLOTS,
            span=SPANS[0],
        )
        return page


def make_site(settings: Settings, access: AccessControl) -> Flask:
    """Make the site. It uses the same settings and functions as the command line."""
    app = Flask(__name__, static_folder=None)
    guard(app, access)
    reader = AdminReader(settings)
    admin = Admin(app, name="fetch-worker", index_view=StartView(reader))
    admin.add_view(JobsView(reader, name="Jobs", endpoint="jobs", url="/jobs"))
    admin.add_view(OutputsView(reader, name="Outputs", endpoint="outputs", url="/outputs"))
    admin.add_view(WebhooksView(reader, name="Webhooks", endpoint="webhooks", url="/webhooks"))
    admin.add_view(BreakersView(reader, name="Accounts", endpoint="gates", url="/accounts"))
    admin.add_view(ActionsView(reader, name="Actions", endpoint="actions", url="/actions"))
    admin.add_view(PlotsView(reader, name="Plots", endpoint="plots", url="/plots"))
    app.add_url_rule("/assets/<name>", "assets", _asset)
    app.after_request(_display)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(WorkerError, _worker_error)
    for function in (format_bytes, format_duration, link_host, moment, without_links):
        app.jinja_env.filters[function.__name__] = function
    app.context_processor(
        lambda: {
            "login": getattr(g, "login", None),
            "menu": admin.menu(),
            "this_path": this_path,
            "display_kind": display_kind,
            "trouble_button": trouble_button,
            "without_before": list_parameters,
        }
    )
    return app


def _display(response: Response) -> Response:
    """Remove characters that move or hide text from a page."""
    if response.mimetype in ("text/html", "image/svg+xml") and not response.direct_passthrough:
        response.set_data(display_lines(response.get_data(as_text=True)))
    return response


def _asset(name: str) -> Response:
    """Send one of the assets."""
    if name not in ASSET_TYPES:
        raise NotFound
    return Response((ASSETS / name).read_bytes(), mimetype=ASSET_TYPES[name])


def _http_error(error: HTTPException) -> Any:
    if error.response is not None:
        return error
    return _error_page(error.name, error.description or "", error.code or 500)


def _worker_error(error: WorkerError) -> Any:
    return _error_page("Error", str(error), 503 if isinstance(error, Unavailable) else 500)


def _error_page(title: str, message: str, code: int) -> tuple[str, int]:
    return render_template("trouble.html", title=title, message=message), code
