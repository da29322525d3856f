"""The page of plots: how everything went over hours, a day, a week, drawn as SVG without scripts."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from xml.etree import ElementTree

import pygal
from flask import request
from flask_admin import BaseView, expose
from pygal.style import Style
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
from worker.admin.reading import Reading
from worker.store.reports.pages import history_at

# It looks after the imports of its own plugins in a way that Python 3.11 warns of at every import that follows.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
DOTS_MOST = 60
COLOURS = ("#1d6fb8", "#d9822b", "#3b8a5a", "#b23a48", "#7a5ea8", "#5f6b76")
STYLE = Style(
    background="#ffffff",
    plot_background="#ffffff",
    foreground="#4a5560",
    foreground_strong="#1f2933",
    foreground_subtle="#d5dbe1",
    font_family="system-ui, sans-serif",
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=14,
    no_data_font_size=20,
    colors=COLOURS,
    opacity="1",
    guide_stroke_color="#e3e7eb",
    guide_stroke_dasharray="0",
    major_guide_stroke_color="#d5dbe1",
    major_guide_stroke_dasharray="0",
)


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture: what it shows, in which unit, and its curves. `paired`: every second curve is the bound of another."""

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
    """Plots."""

    def __init__(self, reading: Reading, **arguments: str) -> None:
        self.reading = reading
        super().__init__(**arguments)

    @expose("/")
    def index(self) -> str:
        """All of them, over one span."""
        page: str = self.render("plots.html", plots=PLOTS, spans=SPANS, chosen=_span())
        return page

    @expose("/picture/<title>.svg")
    def picture(self, title: str) -> Response:
        """One of them."""
        plot, span = PLOTS.get(title), _span()
        if plot is None:
            raise NotFound("there is no such plot")
        with self.reading.connection() as (connection, now):
            seen = samples(history_at(connection, minutes_of(span, now)))
        drawn = Response(draw(plot, plot.curves(seen), span, now), mimetype="image/svg+xml")
        drawn.headers["Content-Security-Policy"] = SVG_POLICY
        return drawn


def _span() -> Span:
    wanted = request.args.get("span")
    return next((span for span in SPANS if span.name == wanted), SPANS[0])


def draw(plot: Plot, curves: Sequence[Curve], span: Span, now: datetime) -> bytes:
    """The picture as SVG."""
    pattern = "%H:%M" if span.length.days < 2 else "%a %H:%M"
    # The x axis is POSIX time in seconds: pygal's own date axis calls datetime.utcfromtimestamp, deprecated since 3.12.
    chart: Any = pygal.XY(
        js=[],
        style=_style(plot),
        width=900,
        explicit_size=True,
        height=320,
        margin=12,
        margin_bottom=30,
        show_dots=_sparse(curves),
        dots_size=2.5,
        show_y_guides=True,
        include_x_axis=True,
        allow_interruptions=True,
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        legend_box_size=12,
        truncate_legend=40,
        xrange=((now - span.length).timestamp(), now.timestamp()),
        x_value_formatter=lambda seconds: f"{datetime.fromtimestamp(seconds, UTC):{pattern}}",
        value_formatter=lambda value: f"{value:,.4g}{' ' if plot.unit.isalpha() else ''}{plot.unit}",
        no_data_text="nothing was written down in this time",
        pretty_print=False,
        disable_xml_declaration=True,
    )
    for curve in curves:
        dashes = {"dasharray": "6, 5"} if curve.dashed else {}
        if any(value is not None for _, value in curve.points):
            points = [(moment.timestamp(), value) for moment, value in curve.points]
            chart.add(curve.name, points, stroke_style={"width": 2, **dashes})
    return _without_scripts(chart.render(is_unicode=False))


def _sparse(curves: Sequence[Curve]) -> bool:
    """Whether there are so few points that dots help: one between two gaps makes no line."""
    return max((sum(value is not None for _, value in curve.points) for curve in curves), default=0) <= DOTS_MOST


def _style(plot: Plot) -> Any:
    """What belongs together has one colour."""
    if not plot.paired:
        return STYLE
    paired = tuple(colour for colour in COLOURS for _ in range(2))
    return Style(**{**{name: getattr(STYLE, name) for name in vars(STYLE) if name != "colors"}, "colors": paired})


def _without_scripts(svg: bytes) -> bytes:
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # noqa: S314  # drawn here, a moment ago
    for parent in list(root.iter()):
        for child in [one for one in parent if str(one.tag).endswith("script")]:
            parent.remove(child)
    return ElementTree.tostring(root)
