"""Figures as Vega-Lite and as files: every mark is drawn, nothing that JSON or an axis cannot hold gets through."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from netassay.figure import Axis, Bars, Figure, Image, Line, Panel, Points, Rule
from netassay.numerics import colour
from producer.drawing import PALETTE, draw, to_vega_lite

PICTURE = colour.png(np.zeros((2, 3, 3), dtype=np.uint8))


def _figure(*panels: Panel, **fields: Any) -> Figure:
    return Figure(title="A figure", panels=list(panels), **fields)


def _layers(figure: Figure, panel: int = 0) -> list[dict[str, Any]]:
    return to_vega_lite(figure)["concat"][panel]["layer"]


def _every_mark() -> Figure:
    curve = Panel(
        title="Curves",
        x=Axis(label="radius"),
        y=Axis(label="share", percent=True, low=0, high=1),
        marks=[
            Line(x=[0, 1, 2], y=[1, 0.6, 0.2], label="bound", low=[0.9, 0.5, 0.1], high=[1, 0.7, 0.3], points=True),
            Line(x=[0, 1, 2], y=[1, 0.7, 0.5], label="attack", dashed=True),
            Points(x=[0.5, 1.5], y=[0.8, 0.4], label="seen"),
            Rule(x=1.0, label="8/255"),
            Rule(y=0.5),
        ],
    )
    bars = Panel(
        x=Axis(scale="category"),
        marks=[Bars(x=["a", "b"], y=[1, 2], label="p"), Bars(x=["a", "b"], y=[2, 1], label="q")],
    )
    image = Panel(marks=[Image(png=PICTURE, x0=-1, x1=2, y0=3, y1=4)])
    return _figure(curve, bars, image, caption="What it shows.", columns=2)


# --- pictures -----------------------------------------------------------------------------------------------------


def _decode(png: str) -> np.ndarray:
    """The PNG standard read back: chunks with valid checksums, 8-bit RGB, filter 0 on each line."""
    file = base64.b64decode(png)
    assert file[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    place, chunks = 8, []
    while place < len(file):
        (length,) = struct.unpack(">I", file[place : place + 4])
        kind, data = file[place + 4 : place + 8], file[place + 8 : place + 8 + length]
        assert struct.unpack(">I", file[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + data)
        chunks.append((kind, data))
        place += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    columns, rows, *form = struct.unpack(">IIBBBBB", chunks[0][1])
    assert form == [8, 2, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), dtype=np.uint8).reshape(rows, 1 + 3 * columns)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_a_png_holds_the_picture(rgb: np.ndarray) -> None:
    assert np.array_equal(_decode(colour.png(rgb)), rgb)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 2, 3)), np.zeros((2, 2), dtype=np.uint8), np.zeros((0, 2, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(rows, columns, 3\)"):
        colour.png(wrong)


def test_a_ramp_passes_its_anchors_and_halves_between() -> None:
    anchors = ((0, 0, 0), (100, 50, 200), (255, 255, 255))
    assert colour.ramp(anchors, np.array([0, 0.25, 0.5, 1])).tolist() == [
        [0] * 3,
        [50, 25, 100],
        [100, 50, 200],
        [255] * 3,
    ]


def test_the_two_ramps_share_no_colour_and_grow_lighter() -> None:
    values = np.linspace(0, 1, 256)
    cold, warm = (colour.ramp(anchors, values).astype(int) for anchors in (colour.COLD, colour.WARM))
    assert (cold[:, 2] > cold[:, 0]).all()  # blue over red
    assert (warm[:, 0] > warm[:, 2]).all()
    for ramp in (cold, warm):  # luma of ITU-R BT.601
        assert (np.diff(ramp @ [0.299, 0.587, 0.114]) >= -1).all()


def test_equal_values_share_their_mean_rank() -> None:
    assert colour.equalise(np.array([[5.0, 1.0], [5.0, 9.0]])).tolist() == [[0.5, 0.0], [0.5, 1.0]]


@given(arrays(np.float64, st.integers(0, 30), elements=st.floats(-1e300, 1e300)))
def test_ranks_keep_the_order_and_do_not_see_the_scale(values: np.ndarray) -> None:
    ranks = colour.equalise(values)
    assert np.array_equal(ranks, colour.equalise(np.arctan(np.unique(values, return_inverse=True)[1])))
    assert ((ranks >= 0) & (ranks <= 1)).all()


def test_enlarging_repeats_pixels() -> None:
    assert colour.enlarge(np.array([[1, 2]]), 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
    assert colour.enlarge(np.array([[1, 2]]), 2).tolist() == [[1, 2]]


# --- the specification --------------------------------------------------------------------------------------------


def test_every_mark_becomes_its_layers() -> None:
    figure = _every_mark()
    assert [[layer["mark"]["type"] for layer in _layers(figure, panel)] for panel in range(3)] == [
        ["area", "line", "point", "line", "point", "rule", "rule", "text"],
        ["bar"],
        ["image"],
    ]


def test_nan_infinity_and_what_a_log_axis_cannot_show_are_gaps() -> None:
    line = Line(x=[1, 2, 3, 4, 5], y=[1.0, math.nan, math.inf, 0.0, -1.0])
    shown = [row["y"] for row in _layers(_figure(Panel(y=Axis(scale="log"), marks=[line])))[0]["data"]["values"]]
    assert shown == [1.0, None, None, None, None]
    shown = [row["y"] for row in _layers(_figure(Panel(marks=[line])))[0]["data"]["values"]]
    assert shown == [1.0, None, None, 0.0, -1.0]
    json.dumps(to_vega_lite(_figure(Panel(marks=[line]))), allow_nan=False)


def test_a_label_has_one_colour_in_all_panels() -> None:
    one = Panel(marks=[Line(x=[0], y=[0], label="b"), Line(x=[0], y=[0], label="a")])
    two = Panel(marks=[Line(x=[0], y=[0], label="c"), Line(x=[0], y=[0], label="a")])
    seen: dict[str, set[str]] = {}
    for panel in to_vega_lite(_figure(one, two))["concat"]:
        for layer in panel["layer"]:
            scale = layer["encoding"]["color"]["scale"]
            for label, shade in zip(scale["domain"], scale["range"], strict=True):
                seen.setdefault(label, set()).add(shade)
    assert seen == {"b": {PALETTE[0]}, "a": {PALETTE[1]}, "c": {PALETTE[2]}}


def test_the_key_is_shared_only_by_panels_of_the_same_labels() -> None:
    same, other = (Panel(marks=[Line(x=[0], y=[0], label=label)]) for label in "ab")
    assert to_vega_lite(_figure(same, same))["resolve"]["legend"]["color"] == "shared"
    assert to_vega_lite(_figure(same, other))["resolve"]["legend"]["color"] == "independent"


def test_marks_without_labels_have_no_key() -> None:
    (layer,) = _layers(_figure(Panel(marks=[Points(x=[1], y=[2])])))
    assert "color" not in layer["encoding"]
    assert layer["mark"]["color"] == PALETTE[0]


def test_bars_stand_side_by_side_or_stack_in_the_order_given() -> None:
    def layer(stacked: bool) -> dict[str, Any]:
        bars = [Bars(x=["x", "y"], y=[1, 2], label=label, stacked=stacked) for label in ("q", "p")]
        (only,) = _layers(_figure(Panel(x=Axis(scale="category"), marks=list(bars))))
        return only

    grouped, stacked = layer(False), layer(True)
    assert grouped["encoding"]["xOffset"]["scale"]["domain"] == ["q", "p"]
    assert grouped["encoding"]["y"]["stack"] is None
    assert "xOffset" not in stacked["encoding"]
    assert stacked["encoding"]["y"]["stack"] == "zero"
    assert {row["label"]: row["place"] for row in stacked["data"]["values"]} == {"q": 0, "p": 1}


def test_categories_keep_the_order_given() -> None:
    (layer,) = _layers(_figure(Panel(x=Axis(scale="category"), marks=[Bars(x=["z", "a", 3], y=[1, 2, 3])])))
    assert layer["encoding"]["x"]["scale"]["domain"] == ["z", "a", "3"]


def test_axes_keep_their_ends_their_scale_and_percents() -> None:
    panel = Panel(
        x=Axis(scale="log", low=1e-3, high=10), y=Axis(percent=True, low=0, high=1), marks=[Line(x=[1], y=[0.5])]
    )
    encoding = _layers(_figure(panel))[0]["encoding"]
    assert encoding["x"]["scale"] == {"type": "log", "nice": False, "domainMin": 1e-3, "domainMax": 10}
    assert encoding["y"]["scale"] == {"zero": False, "nice": False, "domainMin": 0, "domainMax": 1}
    assert encoding["y"]["axis"]["format"] == "~%"


# --- files --------------------------------------------------------------------------------------------------------


def test_every_suffix_is_written(tmp_path: Path) -> None:
    figure = _every_mark()
    assert json.loads(draw(figure, tmp_path / "a.json").read_text()) == to_vega_lite(figure)
    assert draw(figure, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    svg = draw(figure, str(tmp_path / "a.SVG")).read_text()
    words = set(re.findall(r">([^<>]+)<", svg))
    assert {"A figure", "What it shows.", "Curves", "radius", "bound", "attack", "seen", "8/255", "100%", "a"} <= words


def test_lines_stand_where_their_numbers_say(tmp_path: Path) -> None:
    # The panel is 200 x 100 pixels over [0, 4] x [0, 1], and pixels count downwards.
    panel = Panel(
        x=Axis(low=0, high=4), y=Axis(low=0, high=1), marks=[Line(x=[0, 1, 4], y=[0, 0.5, 1])], width=200, height=100
    )
    svg = draw(_figure(panel), tmp_path / "a.svg").read_text()
    (path,) = re.findall(r'aria-roledescription="line mark"[^>]* d="M([^"]+)"', svg) or re.findall(
        r'd="M([^"Z]+)"[^>]*aria-roledescription="line mark"', svg
    )
    assert [[float(number) for number in point.split(",")] for point in path.split("L")] == [
        [0, 100],
        [50, 50],
        [200, 0],
    ]


def test_an_image_fills_the_rectangle_it_names(tmp_path: Path) -> None:
    panel = Panel(
        x=Axis(low=0, high=4),
        y=Axis(low=0, high=2),
        marks=[Image(png=PICTURE, x0=1, x1=3, y0=0, y1=1)],
        width=200,
        height=100,
    )
    svg = draw(_figure(panel), tmp_path / "a.svg").read_text()
    (tag,) = re.findall(r"<image [^>]*>", svg)
    assert PICTURE in tag
    found = {name: float(re.search(rf'\b{name}="([^"]+)"', tag)[1]) for name in ("width", "height")}  # type: ignore[index]
    assert found == {"width": 100, "height": 50}
    assert re.search(r"translate\(50,\s*50\)", tag)
    assert 'preserveAspectRatio="none"' in tag


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.jpeg"])
def test_another_suffix_is_refused_with_those_that_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"use \.png, \.svg or \.json"):
        draw(_every_mark(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_figure_without_panels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing done yet"):
        draw(_figure(caption="nothing done yet"), tmp_path / "a.png")


def test_describing_a_figure_loads_no_drawing_library() -> None:
    code = (
        "import sys, producer.drawing as d, netassay.figure as f\n"
        "d.to_vega_lite(f.Figure(title='t', panels=[f.Panel(marks=[f.Line(x=[1], y=[2])])]))\n"
        "print({'torch', 'pandas', 'vl_convert', 'altair', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
