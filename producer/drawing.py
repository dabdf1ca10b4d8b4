"""Draw a figure: `netassay.figure` to a Vega-Lite specification, and that to a PNG, SVG or JSON file, offline.

A label has one colour in the whole figure, and its key is shown once where all panels share their labels. Marks without
a label are not told apart: they are drawn in grey beside labelled ones, else in the first colour.

Reference: Satyanarayan, Moritz, Wongsuphasawat, Heer. Vega-Lite: A Grammar of Interactive Graphics. 2017.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from netassay.errors import UserError
from netassay.figure import Axis, Bars, Figure, Image, Line, Panel, Points, Rule, Value

#: Colours told apart under every common colour blindness; yellow is left out, black last.
#: Okabe, Ito. Color Universal Design. 2008.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: Of marks without a label beside labelled ones.
UNNAMED = "#9AA0A6"
INK, SOFT, GRID = "#1F2328", "#59636E", "#E4E7EB"
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
#: Version of Vega-Lite that the specification is written in and drawn by.
VEGA_LITE = "5.21"
#: Mean width of a letter in units of the font's size; a generous guess, so that text wraps early rather than is cut.
LETTER = 0.5
#: Room of an axis with its labels and title, in pixels.
MARGIN = 70

_CONFIG: dict[str, Any] = {
    "background": "white",
    "font": FONT,
    "padding": 16,
    "view": {"stroke": None},
    "concat": {"spacing": 28},
    "title": {
        "anchor": "start",
        "color": INK,
        "fontSize": 17,
        "fontWeight": 600,
        "subtitleColor": SOFT,
        "subtitleFontSize": 12,
        "subtitleLineHeight": 16,
        "subtitlePadding": 6,
        "offset": 14,
    },
    "axis": {
        "domainColor": "#8C959F",
        "tickColor": "#8C959F",
        "tickSize": 4,
        "gridColor": GRID,
        "labelColor": SOFT,
        "labelFontSize": 11,
        "labelPadding": 4,
        "titleColor": INK,
        "titleFontSize": 12,
        "titleFontWeight": 400,
        "titlePadding": 8,
        "labelOverlap": True,
        "labelFlush": False,
    },
    "legend": {
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 0,
        "symbolStrokeWidth": 2.5,
        "symbolSize": 120,
        "offset": 10,
        "columnPadding": 18,
        "title": None,
    },
}

_POWER_OF_TEN = "abs(log(datum.value) / LN10 - round(log(datum.value) / LN10)) < 1e-9"
#: 0.001 to 10,000 in digits, 1e-4 and 1e5 beyond; ticks that the axis leaves unlabelled stay so.
_LOG_LABEL = (
    "datum.label === '' ? '' : datum.value > 10000 || datum.value < 0.001 ? "
    "replace(format(datum.value, '~e'), '+', '') : format(datum.value, ',~g')"
)


class CannotDraw(UserError, ValueError):
    """The figure cannot be written to that file."""


def to_vega_lite(figure: Figure) -> dict[str, Any]:
    """The complete specification (Vega-Lite 5, JSON values only): the figure's panels in rows of `figure.columns`."""
    columns = max(1, min(figure.columns, len(figure.panels)))
    width = _width(figure.panels, columns)
    labels = list(dict.fromkeys(label for panel in figure.panels for label in _labels(panel)))
    shared = len({tuple(sorted(_labels(panel))) for panel in figure.panels}) == 1
    keys = dict.fromkeys(("color", "strokeDash"), "shared" if shared else "independent")
    title: dict[str, Any] = {"text": _wrapped(figure.title, width, 17)}
    if figure.caption:
        title["subtitle"] = _wrapped(figure.caption, width, 12)
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE.partition('.')[0]}.json",
        "title": title,
        "concat": [_panel(panel, labels, width if shared else panel.width) for panel in figure.panels],
        "columns": columns,
        "resolve": {"scale": keys, "legend": keys},
        "config": _CONFIG,
    }


def draw(figure: Figure, path: Path | str) -> Path:
    """Write a figure as .png (two pixels a point), .svg or .json (Vega-Lite), by the suffix; returns the path.

    Raises CannotDraw for another suffix, and where there is no panel to draw.
    """
    path = Path(path)
    writers: dict[str, Callable[[dict[str, Any]], bytes]] = {
        ".png": to_png,
        ".svg": to_svg,
        ".json": lambda specification: json.dumps(specification, allow_nan=False).encode(),
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise CannotDraw(
            f"{path.name}: a figure cannot be written as {path.suffix or 'a file without a suffix'}; "
            f"use {', '.join(list(writers)[:-1])} or {list(writers)[-1]}"
        )
    if not figure.panels:
        raise CannotDraw(
            f"{path.name}: the figure {figure.title!r} has no panels; {figure.caption or 'nothing to draw'}"
        )
    path.write_bytes(writer(to_vega_lite(figure)))
    return path


def to_png(specification: dict[str, Any]) -> bytes:
    """A PNG file of a Vega-Lite specification, two pixels a point."""
    import vl_convert  # takes a second

    return vl_convert.vegalite_to_png(specification, vl_version=VEGA_LITE, scale=2)


def to_svg(specification: dict[str, Any]) -> bytes:
    """An SVG file of a Vega-Lite specification."""
    import vl_convert

    return vl_convert.vegalite_to_svg(specification, vl_version=VEGA_LITE).encode()


def _width(panels: Sequence[Panel], columns: int) -> int:
    """Pixels of the widest row of panels."""
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    return max((sum(panel.width + MARGIN for panel in row) - MARGIN for row in rows), default=480)


def _wrapped(text: str, width: float, size: int) -> list[str]:
    return [
        line for part in text.split("\n") for line in textwrap.wrap(part, max(20, int(width / (size * LETTER)))) or [""]
    ]


def _labels(panel: Panel) -> list[str]:
    """Labels of a panel's key, in order; a rule carries its label itself."""
    return list(
        dict.fromkeys(mark.label for mark in panel.marks if isinstance(mark, Line | Points | Bars) and mark.label)
    )


def _panel(panel: Panel, labels: Sequence[str], room: float) -> dict[str, Any]:
    own = _labels(panel)
    context = _Context(panel, labels, own, room)
    layers = [layer for mark in panel.marks if not isinstance(mark, Bars) for layer in context.layers(mark)]
    layers += context.bars()
    # An image covers the grid; rules and points lie on bands and bars. Stable sort: the rest keeps the order given.
    layers.sort(key=lambda layer: {"image": 0, "area": 1, "bar": 2, "rule": 4, "text": 5}.get(layer["mark"]["type"], 3))
    specification: dict[str, Any] = {"width": panel.width, "height": panel.height, "layer": layers or [_empty()]}
    if panel.title:
        specification["title"] = {
            "text": _wrapped(panel.title, panel.width + MARGIN / 2, 13),
            "frame": "group",
            "fontSize": 13,
            "fontWeight": 600,
            "offset": 8,
        }
    return specification


def _empty() -> dict[str, Any]:
    return {"data": {"values": []}, "mark": {"type": "point"}, "encoding": {}}


class _Context:
    """One panel on its way to layers: its axes, and how labels look."""

    def __init__(self, panel: Panel, labels: Sequence[str], own: Sequence[str], room: float) -> None:
        self.panel, self.labels, self.own = panel, labels, own
        self.categories = {"x": _categories(panel, "x"), "y": _categories(panel, "y")}
        has_image = any(isinstance(mark, Image) for mark in panel.marks)
        bars = any(isinstance(mark, Bars) for mark in panel.marks)
        self.x = self._axis(panel.x, "x", grid=not has_image and not bars)
        self.y = self._axis(panel.y, "y", grid=not has_image)
        self.dashes = {mark.label: mark.dashed for mark in panel.marks if isinstance(mark, Line) and mark.label}
        widest = max((len(label) for label in own), default=0) * 12 * LETTER + 48
        marks = {type(mark) for mark in panel.marks if isinstance(mark, Line | Points | Bars) and mark.label}
        symbol = "stroke" if Line in marks else "square" if Bars in marks else "circle"
        legend = {
            "orient": "bottom",
            "direction": "horizontal",
            "columns": max(1, int(room / widest)),
            "symbolType": symbol,
        }
        colours = [self.colour(label) for label in own]
        self.key: dict[str, Any] = {
            "color": {"field": "label", "type": "nominal", "legend": legend, "scale": {"domain": own, "range": colours}}
        }
        if any(self.dashes.values()):
            self.key["strokeDash"] = {
                "field": "label",
                "type": "nominal",
                "legend": legend,
                "scale": {"domain": own, "range": [[6, 4] if self.dashes.get(label) else [1, 0] for label in own]},
            }

    def colour(self, label: str) -> str:
        if label:
            return PALETTE[self.labels.index(label) % len(PALETTE)]
        return UNNAMED if self.own else PALETTE[0]

    def _axis(self, axis: Axis, side: str, grid: bool) -> dict[str, Any]:
        look: dict[str, Any] = {"grid": grid}
        length = self.panel.width if side == "x" else self.panel.height
        encoding: dict[str, Any] = {"title": _wrapped(axis.label, length, 12) if axis.label else None, "axis": look}
        if axis.scale == "category":
            names = self.categories[side]
            # Names that do not fit side by side are slanted rather than dropped.
            crowded = side == "x" and len(names) * (max(map(len, names), default=0) * 11 * LETTER + 8) > length
            look |= {"labelAngle": -35 if crowded else 0, "labelOverlap": False, "labelLimit": 160, "ticks": False}
            encoding |= {"type": "nominal", "sort": None, "scale": {"domain": names}}
            return encoding
        scale: dict[str, Any] = {"zero": False, "nice": axis.low is None and axis.high is None}
        if axis.scale == "log":
            scale = {"type": "log", "nice": False}
            look |= {"tickCount": max(3, length // 60), "format": "~g", "labelExpr": _LOG_LABEL}
            if self._decades(side) >= 2:  # lines between the powers of ten would be a hatching
                power = {"test": _POWER_OF_TEN, "value": 1}
                look |= {
                    "gridOpacity": {"condition": power, "value": 0},
                    "tickOpacity": {"condition": power, "value": 0.4},
                }
        else:
            look |= {"tickCount": max(3, length // 60)}
        if axis.percent:
            look["format"] = "~%"
        if axis.low is not None:
            scale["domainMin"] = axis.low
        if axis.high is not None:
            scale["domainMax"] = axis.high
        return encoding | {"type": "quantitative", "scale": scale}

    def _decades(self, side: str) -> float:
        """Powers of ten that the marks span on a log axis."""
        marks = [mark for mark in self.panel.marks if isinstance(mark, Line | Points | Bars)]
        values = [self.value(value, side) for mark in marks for value in (mark.x if side == "x" else mark.y)]
        shown = [value for value in values if isinstance(value, int | float)]
        return math.log10(max(shown) / min(shown)) if shown else 0.0

    def value(self, value: Value, side: str) -> Value:
        """A value as its axis can show it: None, a gap, for NaN, infinities, and at or below 0 on a log axis."""
        axis = self.panel.x if side == "x" else self.panel.y
        if axis.scale == "category":
            return _name(value)
        if not isinstance(value, int | float) or not math.isfinite(value) or (axis.scale == "log" and value <= 0):
            return None
        return value

    def layers(self, mark: Line | Points | Rule | Image) -> list[dict[str, Any]]:
        if isinstance(mark, Line):
            return list(self._line(mark))
        if isinstance(mark, Points):
            return [
                self._layer(
                    self._rows(mark.x, mark.y, mark.label), mark.label, type="point", filled=True, size=42, opacity=0.8
                )
            ]
        if isinstance(mark, Rule):
            return list(self._rule(mark))
        return [self._image(mark)]

    def _rows(self, x: Sequence[Value], y: Sequence[Value], label: str) -> list[dict[str, Any]]:
        return [{"x": self.value(a, "x"), "y": self.value(b, "y"), "label": label} for a, b in zip(x, y, strict=True)]

    def _layer(self, rows: list[dict[str, Any]], label: str, **mark: Any) -> dict[str, Any]:
        encoding: dict[str, Any] = {"x": {"field": "x", **self.x}, "y": {"field": "y", **self.y}}
        if label:
            encoding |= self.key
        else:
            mark["color"] = self.colour("")
        if mark["type"] != "line":
            encoding.pop("strokeDash", None)
        return {"data": {"values": rows}, "mark": mark, "encoding": encoding}

    def _line(self, mark: Line) -> Iterable[dict[str, Any]]:
        if mark.low is not None and mark.high is not None:
            rows = [
                row | {"y": self.value(low, "y"), "y2": self.value(high, "y")}
                for row, low, high in zip(self._rows(mark.x, mark.y, mark.label), mark.low, mark.high, strict=True)
            ]
            rows = [row for row in rows if row["y"] is not None and row["y2"] is not None]
            band = self._layer(rows, "", type="area", opacity=0.16, line=False)
            band["mark"]["color"] = self.colour(mark.label)
            band["encoding"]["y2"] = {"field": "y2"}
            yield band
        # The order given is the order drawn: a path may turn back.
        rows = [row | {"place": place} for place, row in enumerate(self._rows(mark.x, mark.y, mark.label))]
        dash = {"strokeDash": [6, 4]} if mark.dashed and not mark.label else {}
        line = self._layer(rows, mark.label, type="line", strokeWidth=2, strokeJoin="round", **dash)
        line["encoding"]["order"] = {"field": "place", "type": "quantitative"}
        yield line
        if mark.points:
            yield self._layer(rows, mark.label, type="point", filled=True, size=36, opacity=1)

    def bars(self) -> list[dict[str, Any]]:
        """All bars of the panel: labelled ones in one layer, since only within one they stack or stand side by side."""
        bars = [mark for mark in self.panel.marks if isinstance(mark, Bars)]
        layers = []
        for label in dict.fromkeys(mark.label if not mark.label else "labelled" for mark in bars):
            chosen = [mark for mark in bars if bool(mark.label) == bool(label)]
            rows = [
                row | {"place": place}
                for place, mark in enumerate(chosen)
                for row in self._rows(mark.x, mark.y, mark.label)
            ]
            layer = self._layer(rows, label, type="bar")
            encoding = layer["encoding"]
            # A bar's length is its value, so the axis starts at 0; a log axis has no 0.
            if self.panel.y.scale == "linear" and self.panel.y.low is None:
                encoding["y"] |= {"scale": {**self.y["scale"], "zero": True}}
            stacked = any(mark.stacked for mark in chosen)
            encoding["y"] |= {"stack": "zero" if stacked else None}
            encoding["order"] = {"field": "place", "type": "quantitative"}  # the first lies at the bottom
            if self.panel.x.scale != "category":
                layer["mark"]["width"] = self._bar_width([row["x"] for row in rows])
                layer["mark"]["opacity"] = 1.0 if stacked or len(chosen) == 1 else 0.6  # they lie over each other
            elif label and not stacked:
                names = list(dict.fromkeys(mark.label for mark in chosen))
                encoding["xOffset"] = {"field": "label", "type": "nominal", "sort": None, "scale": {"domain": names}}
            layers.append(layer)
        return layers

    def _bar_width(self, values: Sequence[Value]) -> float:
        """Pixels of a bar on a number axis: nine tenths of the smallest gap between two."""
        places = sorted({float(value) for value in values if isinstance(value, int | float)})
        gaps = [right - left for left, right in itertools.pairwise(places)]
        low, high = self.panel.x.low, self.panel.x.high
        span = (places[-1] if high is None else high) - (places[0] if low is None else low) if places else 0.0
        return (
            0.9 * self.panel.width * min(gaps) / span if gaps and span > 0 and self.panel.x.scale == "linear" else 12.0
        )

    def _rule(self, mark: Rule) -> Iterable[dict[str, Any]]:
        for side, value in (("x", mark.x), ("y", mark.y)):
            if value is None or self.value(value, side) is None:
                continue
            encoding = {side: {"field": side, **(self.x if side == "x" else self.y)}}
            data = {"values": [{side: self.value(value, side)}]}
            yield {
                "data": data,
                "mark": {"type": "rule", "color": INK, "strokeDash": [2, 3], "strokeWidth": 1.5},
                "encoding": encoding,
            }
            if mark.label:
                place = (
                    {"y": 4, "align": "left", "baseline": "top", "dx": 5}
                    if side == "x"
                    else {"x": self.panel.width - 4, "align": "right", "baseline": "bottom", "dy": -4}
                )
                yield {
                    "data": data,
                    "mark": {"type": "text", "text": mark.label, "color": SOFT, "fontSize": 11, **place},
                    "encoding": encoding,
                }

    def _image(self, mark: Image) -> dict[str, Any]:
        row = {"x": mark.x0, "x2": mark.x1, "y": mark.y0, "y2": mark.y1, "url": f"data:image/png;base64,{mark.png}"}
        return {
            "data": {"values": [row]},
            "mark": {"type": "image", "aspect": False},
            "encoding": {
                "x": {"field": "x", **self.x},
                "x2": {"field": "x2"},
                "y": {"field": "y", **self.y},
                "y2": {"field": "y2"},
                "url": {"field": "url", "type": "nominal"},
            },
        }


def _name(value: Value) -> str:
    return "" if value is None else str(value)


def _categories(panel: Panel, side: str) -> list[str]:
    """Names on a category axis, in the order in which the marks give them."""
    marks = [mark for mark in panel.marks if isinstance(mark, Line | Points | Bars)]
    return list(dict.fromkeys(_name(value) for mark in marks for value in (mark.x if side == "x" else mark.y)))
