"""The site as a whole: its pages put together behind the door, and how its troubles are said."""

from pathlib import Path
from typing import Any

from flask import Flask, Response, g, render_template, request
from flask_admin import Admin, AdminIndexView, expose
from werkzeug.exceptions import HTTPException, NotFound

from worker.admin.breakers import BreakersView
from worker.admin.door import Door, guard
from worker.admin.jobs import JobsView
from worker.admin.outputs import OutputsView, as_what
from worker.admin.plots import PlotsView
from worker.admin.reading import Reading
from worker.admin.wording import age, host_of, moment, size, without_links
from worker.core.display import display_lines
from worker.errors import Unavailable, WorkerError
from worker.settings import Settings

LIST_WORDS = frozenset({"search", "status", "account", "kind", "code", "late", "held", "host", "job"})
ASSETS = Path(__file__).with_name("assets")
ASSET_TYPES = {"site.css": "text/css", "site.js": "text/javascript"}


class StartView(AdminIndexView):
    """How everything stands."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        super().__init__(name="Overview", url="/")

    @expose("/")
    def index(self) -> str:
        """Jobs by state, what is late, what is held."""
        states = self.reading.breakers()
        page: str = self.render(
            "start.html",
            stands=self.reading.overview(),
            held=[one for one in states if one.held],
            states=states,
            snapshot=self.reading.snapshot(),
        )
        return page


def make_site(settings: Settings, door: Door) -> Flask:
    """The site on a database. It reads and acts as the command line does, with the same settings."""
    app = Flask(__name__, static_folder=None)
    guard(app, door)
    reading = Reading(settings)
    admin = Admin(app, name="fetch-worker", index_view=StartView(reading))
    admin.add_view(JobsView(reading, name="Jobs", endpoint="jobs", url="/jobs"))
    admin.add_view(OutputsView(reading, name="Outputs", endpoint="outputs", url="/outputs"))
    admin.add_view(BreakersView(reading, name="Accounts", endpoint="gates", url="/accounts"))
    admin.add_view(PlotsView(reading, name="Plots", endpoint="plots", url="/plots"))
    app.add_url_rule("/assets/<name>", "assets", _asset)
    app.after_request(_display)
    app.register_error_handler(HTTPException, _refused)
    app.register_error_handler(WorkerError, _trouble)
    for shown in (age, host_of, moment, size, without_links):
        app.jinja_env.filters[shown.__name__] = shown
    app.context_processor(
        lambda: {
            "token": getattr(g, "token", ""),
            "menu": admin.menu(),
            "as_what": as_what,
            "without_before": _without_before,
        }
    )
    return app


def _display(response: Response) -> Response:
    """Leave what moves or hides text out of a page, wherever it came from."""
    if response.mimetype in ("text/html", "image/svg+xml") and not response.direct_passthrough:
        response.set_data(display_lines(response.get_data(as_text=True)))
    return response


def _without_before() -> dict[str, str]:
    """What the address asks for, on the first page. The words of the address go through `url_for` as values only."""
    return {name: value for name, value in request.args.items() if name in LIST_WORDS and value}


def _asset(name: str) -> Response:
    """A file of ours, as long as it is one of those few."""
    if name not in ASSET_TYPES:
        raise NotFound
    return Response((ASSETS / name).read_bytes(), mimetype=ASSET_TYPES[name])


def _refused(error: HTTPException) -> Any:
    if error.response is not None:
        return error
    return _said(error.name, error.description or "", error.code or 500)


def _trouble(error: WorkerError) -> Any:
    return _said("That did not work", str(error), 503 if isinstance(error, Unavailable) else 500)


def _said(title: str, words: str, code: int) -> tuple[str, int]:
    return render_template("trouble.html", title=title, words=words), code
