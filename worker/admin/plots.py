"""The page of plots: the recorded history of hours, a day or a week, drawn as SVG without scripts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flask import request
from flask_admin import BaseView, expose
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response

from worker.admin.curves import (
    SPANS,
    Curve,
    Sample,
    Span,
    delay_curves,
    ended_curves,
    late_curves,
    minutes_of,
    request_curves,
    samples,
    waiting_curves,
)
from worker.admin.drawing import NARROW, WIDE, draw
from worker.admin.reader import AdminReader
from worker.store.reports.history import history_at

SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: its title, unit and curves. `paired` means that every second curve is the limit of the one before."""

    title: str
    unit: str
    curves: Callable[[Sequence[Sample]], list[Curve]]
    paired: bool = False


PLOTS: Mapping[str, Plot] = {
    "delay": Plot("Detection delay: from ready to seen", "s", delay_curves),
    "requests": Plot("Requests per second, and how many are allowed", "/s", request_curves, paired=True),
    "waiting": Plot("Jobs that are not final", "", waiting_curves),
    "ended": Plot("Jobs that ended per minute", "/min", ended_curves),
    "late": Plot("How long the oldest due work waits", "s", late_curves),
}


class PlotsView(BaseView):
    """The page of plots."""

    def __init__(self, reader: AdminReader, **arguments: str) -> None:
        self.reader = reader
        super().__init__(**arguments)

    @expose("/")
    def index(self) -> str:
        """Show all plots of one span."""
        return str(self.render("plots.html", plots=PLOTS, spans=SPANS, chosen=_span()))

    @expose("/picture/<title>.svg")
    def picture(self, title: str) -> Response:
        """Send one plot as SVG."""
        plot, span = PLOTS.get(title), _span()
        if plot is None:
            raise NotFound("there is no such plot")
        with self.reader.connection() as (connection, now):
            history = samples(history_at(connection, minutes_of(span, now)))
        size = NARROW if request.args.get("narrow") == "yes" else WIDE
        svg = draw(plot.curves(history), span, now, unit=plot.unit, paired=plot.paired, size=size)
        response = Response(svg, mimetype="image/svg+xml")
        response.headers["Content-Security-Policy"] = SVG_POLICY
        return response


def _span() -> Span:
    name = request.args.get("span")
    return next((span for span in SPANS if span.name == name), SPANS[0])
