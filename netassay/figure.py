"""A plot as data. Methods describe; `producer.drawing` draws (Vega-Lite, to PNG, SVG or a page).

A figure is a row-wise grid of panels; a panel is two axes and a list of marks. All values are plain Python numbers or
strings, so a figure can be stored, sent and tested without a plotting library.
"""

from __future__ import annotations

from typing import Literal

from netassay.method import Contract

Value = float | int | str | None


class Axis(Contract):
    label: str = ""
    scale: Literal["linear", "log", "category"] = "linear"
    low: float | None = None
    high: float | None = None
    percent: bool = False
    """Show fractions 0..1 as 0 %..100 %."""


class Line(Contract):
    """A polyline through (x, y), with its points marked where `points` is set; `low`/`high` draw a band around it."""

    mark: Literal["line"] = "line"
    x: list[Value]
    y: list[Value]
    label: str = ""
    points: bool = False
    dashed: bool = False
    low: list[Value] | None = None
    high: list[Value] | None = None


class Points(Contract):
    mark: Literal["points"] = "points"
    x: list[Value]
    y: list[Value]
    label: str = ""


class Bars(Contract):
    """Bars of height y over x; panels with several `Bars` stack them where `stacked`, else group them."""

    mark: Literal["bars"] = "bars"
    x: list[Value]
    y: list[Value]
    label: str = ""
    stacked: bool = False


class Rule(Contract):
    """A straight reference line at x or at y."""

    mark: Literal["rule"] = "rule"
    x: float | None = None
    y: float | None = None
    label: str = ""


class Image(Contract):
    """An RGB image filling [x0, x1] x [y0, y1]; `png` is base64 of a PNG file whose first row is at y1."""

    mark: Literal["image"] = "image"
    png: str
    x0: float = 0.0
    x1: float = 1.0
    y0: float = 0.0
    y1: float = 1.0


class Panel(Contract):
    title: str = ""
    x: Axis = Axis()
    y: Axis = Axis()
    marks: list[Line | Points | Bars | Rule | Image]
    width: int = 360
    height: int = 260


class Figure(Contract):
    title: str
    caption: str = ""
    panels: list[Panel]
    columns: int = 2
