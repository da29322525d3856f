"""The page of plots: the recorded history of hours, a day or a week, drawn as SVG without scripts."""

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
from worker.admin.reader import AdminReader
from worker.store.reports.history import history_at

# The import hook of pygal for its plugins causes a warning at every later import on Python 3.11: remove it.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

SVG_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
MAX_DOTS = 60  # with more points, dots are not drawn
COLOURS = ("#1d6fb8", "#d9822b", "#3b8a5a", "#b23a48", "#7a5ea8", "#5f6b76")


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
        response = Response(draw(plot, plot.curves(history), span, now), mimetype="image/svg+xml")
        response.headers["Content-Security-Policy"] = SVG_POLICY
        return response


def _span() -> Span:
    name = request.args.get("span")
    return next((span for span in SPANS if span.name == name), SPANS[0])


def draw(plot: Plot, curves: Sequence[Curve], span: Span, now: datetime) -> bytes:
    """Draw a plot as SVG."""
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
        no_data_text="no data was recorded in this period",
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
    """Return whether there are few points, so that dots are drawn: a point between two gaps makes no line."""
    return max((sum(value is not None for _, value in curve.points) for curve in curves), default=0) <= MAX_DOTS


def _style(plot: Plot) -> Style:
    """Return the style. A curve and its limit have one colour."""
    return Style(
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
        colors=tuple(colour for colour in COLOURS for _ in range(2)) if plot.paired else COLOURS,
        opacity="1",
        guide_stroke_color="#e3e7eb",
        guide_stroke_dasharray="0",
        major_guide_stroke_color="#d5dbe1",
        major_guide_stroke_dasharray="0",
    )


def _without_scripts(svg: bytes) -> bytes:
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)  # noqa: S314  # the SVG was drawn above
    for parent in list(root.iter()):
        for child in [element for element in parent if str(element.tag).endswith("script")]:
            parent.remove(child)
    return ElementTree.tostring(root)
