"""The trainability fractal against closed forms, an independent trainer, and sets whose edge is known."""

from __future__ import annotations

import base64
import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netassay.figure import Image, Line
from netassay.job import Record
from netassay.method import InvalidInput
from netassay.methods.dynamics import trainability_fractal as fractal
from netassay.methods.dynamics.trainability_fractal import Params, Result, bisect, classify, run, run_many, zoom
from netassay.numerics import box_counting

NETWORKS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(["tanh", "relu", "identity"]),
        "batch": st.sampled_from(["full", "one"]),
        "plane": st.sampled_from(["rates", "rate_offset"]),
        "width": st.integers(1, 19),
        "data": st.integers(1, 18),
        "steps": st.integers(1, 60),
        "seed": st.integers(0, 2**63 - 1),
    }
)


def _same(first: Result, second: Result) -> bool:
    """Equal to the bit in every field."""
    one, two = first.model_dump(), second.model_dump()
    return all(
        np.array_equal(one[name], two[name]) if isinstance(one[name], np.ndarray) else one[name] == two[name]
        for name in one
    )


def _record(number: int, params: Params, result: Result | None) -> Record:
    return Record(
        id=number,
        key=f"{number:032x}",
        method="dynamics.trainability_fractal",
        version=fractal.VERSION,
        params=json.loads(params.model_dump_json()),
        state="done" if result else "pending",
        result=result.model_dump() if result else None,
    )


# --- the grid -----------------------------------------------------------------------------------------------------


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1e-9, 20), st.integers(1, 40), st.integers(1, 9))
def test_coordinates_of_a_coarse_grid_are_those_of_an_aligned_finer_one(
    x: float, y: float, size: float, pixels: int, times: int
) -> None:
    coarse = Params(centre_x=x, centre_y=y, size=size, resolution=pixels).axes()
    fine = Params(centre_x=x, centre_y=y, size=size, resolution=pixels * times).axes()
    assert all(np.array_equal(few, many[::times]) for few, many in zip(coarse, fine, strict=True))


def test_a_coarse_map_is_the_exact_subsample_of_a_finer_one() -> None:
    coarse, fine = (run(Params(centre_x=3.0, resolution=pixels, steps=80)) for pixels in (10, 30))
    assert 0 < coarse.converging < 100
    assert np.array_equal(coarse.converged, fine.converged[::3, ::3])
    assert np.array_equal(coarse.intensity, fine.intensity[::3, ::3])


@pytest.mark.parametrize("condition", [{}, {"activation": "relu", "width": 5, "data": 3}, {"batch": "one", "width": 9}])
def test_tiles_are_pieces_of_the_frame_to_the_bit(condition: dict[str, Any]) -> None:
    frame = Params(centre_x=3.0, resolution=22, steps=60, **condition)
    whole = run(frame)
    tiles = [frame.model_copy(update={"tile": 9, "tile_x": x, "tile_y": y}) for y in range(3) for x in range(3)]
    found = [run(tile) for tile in tiles]
    for name in ("converged", "intensity"):
        rows = [np.concatenate([getattr(found[3 * y + x], name) for x in range(3)], axis=1) for y in range(3)]
        assert np.array_equal(np.concatenate(rows), getattr(whole, name))
    assert sum(tile.converging for tile in found) == whole.converging
    assert all(_same(one, other) for one, other in zip(found, run_many(tiles), strict=True))


@settings(max_examples=40, deadline=None)
@given(NETWORKS, st.data())
def test_the_losses_of_a_pixel_do_not_depend_on_its_neighbours(network: dict[str, Any], data: st.DataObject) -> None:
    params = Params(**network)
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x, y = draw.uniform(0, 4, 140), draw.uniform(0, 4, 140)
    chosen = draw.permutation(140)[: data.draw(st.integers(1, 140))]
    together, apart = classify(params, x, y), classify(params, x[chosen], y[chosen])
    assert all(np.array_equal(many[chosen], few) for many, few in zip(together, apart, strict=True))
    # The classes may hide the last bits of the losses; a chaotic run shows them later.
    start = fractal._start(params)
    with torch.no_grad():
        many, few = (fractal._train(params, start, x[pixels], y[pixels]) for pixels in (slice(None), chosen))
    finite = np.logical_and.accumulate(np.isfinite(few), axis=1)
    assert np.array_equal(many[chosen][finite], few[finite])


@pytest.mark.parametrize("system", ["network", "quadratic", "mandelbrot"])
def test_the_same_job_gives_the_same_bits(system: Any) -> None:
    params = Params(system=system, resolution=16, steps=50)
    assert _same(run(params), run(params))


def test_a_tile_outside_the_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        Params(resolution=22, tile=9, tile_x=3)


def test_pixels_that_float64_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="told apart"):
        Params(size=1e-14, resolution=128)
    x, y = Params(size=1e-12, resolution=128).axes()
    assert len(set(x)) == len(set(y)) == 128


def test_rates_past_float64_are_refused() -> None:
    with pytest.raises(ValueError, match="leave float64"):
        Params(centre_x=99.0)


def test_rows_rise_with_y_and_columns_with_x() -> None:
    # The rectangle of the quadratic ends at log10 rates 0.30 and 1.30: it is taller than wide.
    result = run(Params(system="quadratic", centre_x=1.0, centre_y=1.0, size=2.0, resolution=20))
    assert result.converged[:, 0].sum() == 14
    assert result.converged[0].sum() == 4


# --- the network --------------------------------------------------------------------------------------------------


def _losses_by_autograd(params: Params, x: float, y: float) -> list[float]:
    """The definition of the docstring, one pixel, derivatives by autograd."""
    first, second, inputs, targets = (torch.from_numpy(array) for array in fractal._start(params))
    n, d = params.width, params.data
    phi = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}[params.activation]
    w0 = first + (y if params.plane == "rate_offset" else 0.0)
    w1 = second
    rates = (10.0**x, 10.0 ** (y if params.plane == "rates" else x))
    losses = []
    for t in range(params.steps + 1):
        weights = [w0.clone().requires_grad_(), w1.clone().requires_grad_()]
        outputs = weights[1] @ phi(weights[0] @ inputs.T / math.sqrt(n)) / n
        errors = (outputs - targets).square()[0]
        losses.append(float(errors.mean().detach()))
        loss = errors.mean() if params.batch == "full" else errors[t % d]
        gradients = torch.autograd.grad(loss, weights)
        w0, w1 = w0 - rates[0] * gradients[0], w1 - rates[1] * gradients[1]
    return losses


@settings(max_examples=25, deadline=None)
@given(NETWORKS, st.floats(-2, 1), st.floats(-2, 1))
def test_losses_are_those_of_autograd(network: dict[str, Any], x: float, y: float) -> None:
    params = Params(**{**network, "steps": min(network["steps"], 12)})
    with torch.no_grad():
        found = fractal._train(params, fractal._start(params), np.array([x]), np.array([y]))[0]
    expected = np.array(_losses_by_autograd(params, x, y))
    finite = int(np.append(~(expected < 1e200), True).argmax())  # beyond, the two may leave float64 a step apart
    assert finite > 0
    assert found[:finite] == pytest.approx(expected[:finite], rel=1e-7)


def test_one_point_and_one_point_a_step_are_full_batch() -> None:
    full, one = (
        run(Params.model_validate({"data": 1, "batch": batch, "resolution": 12, "steps": 40}))
        for batch in ("full", "one")
    )
    assert np.array_equal(full.converged, one.converged)
    assert full.intensity == pytest.approx(one.intensity, rel=1e-5)


def test_fewer_points_are_the_beginning_of_more() -> None:
    few, many = (fractal._start(Params(data=data)) for data in (3, 16))
    for a, b in zip(few, (many[0], many[1], many[2][:3], many[3][:, :3]), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("batch", ["full", "one"])
def test_tiny_rates_converge_and_huge_rates_diverge(batch: Any) -> None:
    small = run(Params(batch=batch, centre_x=-2, centre_y=-2, size=1, resolution=4))
    large = run(Params(batch=batch, centre_x=6, centre_y=6, size=1, resolution=4))
    assert small.converging == 16
    assert large.diverging == large.overflowed == 16
    assert small.rule == large.rule == "mean of the last 20 losses below the first, all finite"


def test_the_first_layer_is_frozen_by_its_rate_and_leaves_a_linear_problem() -> None:
    # With W0 fixed the loss is quadratic in W1: it diverges above 2 / lambda, up to the log(2) / (2 T) of the rule.
    params = Params(steps=400)
    first, _, inputs, _ = fractal._start(params)
    features = np.tanh(first @ inputs.T / 4) / 16  # df/dW1, (n, d)
    largest = np.linalg.eigvalsh(2 / 16 * features @ features.T)[-1]
    edge = math.log10(2 / largest)
    # A rate 2 (1 + e) / lambda multiplies the error along the top direction by 1 + 2 e a step.
    x = np.full(2, -60.0)
    assert classify(params, x, np.array([edge - 1e-4, edge + 0.02]))[0].tolist() == [True, False]


def test_intensity_sums_losses_where_converging_and_their_inverses_elsewhere() -> None:
    losses = np.array([[4.0, 2.0, 1.0], [1.0, 2.0, 4.0], [1.0, 10.0, np.inf], [1.0, 1e9, 1e-9]])
    converged, intensity, overflowed = fractal._judge(losses)
    assert converged.tolist() == [True, False, False, False]
    assert intensity.tolist() == pytest.approx([1.75, 1.75, 1.1, 1.0 + 1e-9 + 1e6])
    assert overflowed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("from_the_end, converges", [(20, False), (21, True)])
def test_the_rule_reads_the_last_20_losses(from_the_end: int, converges: bool) -> None:
    losses = np.full((1, 101), 0.5)
    losses[0, 0], losses[0, -from_the_end] = 1.0, 11.0  # one spike puts a mean of 20 at 1.025
    assert fractal._judge(losses)[0].tolist() == [converges]


def test_a_loss_that_left_float64_does_not_come_back() -> None:
    converged, intensity, overflowed = fractal._judge(np.array([[2.0, np.inf, 1e-3, 1e-3]]))
    assert (converged.tolist(), intensity.tolist(), overflowed.tolist()) == ([False], [1.0], [True])


# --- the controls -------------------------------------------------------------------------------------------------


def test_the_quadratic_map_is_that_of_the_closed_form() -> None:
    params = Params(system="quadratic", centre_x=0.8, centre_y=0.8, size=2.0, resolution=48, steps=120)
    x, y = params.axes()
    factors = np.stack(np.meshgrid(1 - 1.0 * 10**x, 1 - 0.1 * 10**y))  # of u and v, a step
    t = np.arange(101, 121)[:, None, None]
    with np.errstate(over="ignore"):
        tail = (0.5 * factors[0] ** (2 * t) + 0.05 * factors[1] ** (2 * t)).mean(axis=0)
    result = run(params)
    assert np.array_equal(result.converged, tail < 0.55)
    assert 0 < result.converging < 48 * 48


def test_the_edge_of_the_quadratic_lies_log_2_over_2_steps_outside_the_stable_rates() -> None:
    # u alone: (1 + e)^(2 t), averaged over the last 20 t, reaches the first loss (0.55 against 0.5) near T - 9.5.
    params = Params(system="quadratic", steps=1000)
    edge, _ = bisect(params, (0.0, 0.0), (1.0, 0.0))
    excess = 10**edge - 2  # the factor of u is -(1 + excess)
    assert excess == pytest.approx(math.log(1.1) / (2 * (1000 - 9.5)), rel=1e-3)


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("at", [(math.log10(2), 0.5), (0.0, math.log10(20))])
def test_the_edge_of_the_quadratic_is_smooth_at_every_zoom(size: float, at: tuple[float, float]) -> None:
    # log10 of the edge lies about log(2) / (2 ln(10) T) outside 2 / curvature: in the frame at these lengths.
    steps = 300 if size > 1e-3 else 1000
    params = Params(system="quadratic", centre_x=at[0], centre_y=at[1], size=size, resolution=256, steps=steps)
    result = run(params)
    assert result.dimension == pytest.approx(1.0, abs=0.05)


def test_the_mandelbrot_set_is_rough_in_a_window_and_nearly_smooth_as_a_whole() -> None:
    control = Params(system="mandelbrot", centre_x=-0.7436, centre_y=0.1318, size=0.02, resolution=1024, steps=400)
    window = run(control)
    whole = run(control.model_copy(update={"centre_x": -0.5, "centre_y": 0.0, "size": 3.0}))
    assert window.dimension == pytest.approx(1.66, abs=0.05)
    assert whole.dimension == pytest.approx(1.11, abs=0.05)
    assert window.box_sizes == [4, 8, 16, 32, 64]
    # The area of the set is 1.5066 (Bittner, Cheong, Gates, Nguyen. 2017); 400 iterations leave a little more.
    assert 1.50 < whole.converging * (3 / 1024) ** 2 < 1.53


def test_points_known_to_lie_in_and_out_of_the_mandelbrot_set() -> None:
    # 0, -1 and i have finite orbits, -2 ends on the fixed point 2; 1 escapes as 1, 2, 5: inside for two iterations.
    members, intensity, _ = classify(
        Params(system="mandelbrot", steps=50), np.array([0, -1, 0, -2, 1, 3.0]), np.array([0, 0, 1.0, 0, 0, 0])
    )
    assert members.tolist() == [True, True, True, True, False, False]
    assert intensity[[0, 3, 4, 5]].tolist() == [0, 2, 3, 1]


# --- the zoom -----------------------------------------------------------------------------------------------------


def test_bisection_ends_between_neighbours_of_different_class() -> None:
    params = Params(steps=40)
    x, y = bisect(params, (0.0, 0.0), (0.0, 4.0))
    step = np.spacing(y)
    assert x == 0.0
    assert classify(params, np.array([x, x]), np.array([y, y + step]))[0].tolist() == [True, False]


def test_a_segment_without_an_edge_is_refused() -> None:
    with pytest.raises(InvalidInput, match="converging one first"):
        bisect(Params(system="quadratic"), (3.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("on", ["roughest", "edge"])
def test_each_frame_of_a_zoom_lies_on_the_edge_of_the_one_before(on: Any) -> None:
    found = zoom(Params(system="mandelbrot", centre_x=-0.5, centre_y=0, size=3, resolution=64, steps=60), 4, 4.0, on)
    assert [params.size for params, _ in found] == [3.0, 0.75, 0.1875, 0.046875]
    assert all(result.edge > 0 for _, result in found)
    for (outer, _), (inner, _) in itertools.pairwise(found):
        assert abs(inner.centre_x - outer.centre_x) <= outer.size / 2
        assert abs(inner.centre_y - outer.centre_y) <= outer.size / 2


def test_a_zoom_stops_at_the_finest_grid_of_float64() -> None:
    frame = Params(system="quadratic", centre_x=0.3, centre_y=0.3, size=1, resolution=8, steps=30)
    found = zoom(frame, 40, 10.0, "edge")
    assert 1e-16 < found[-1][0].size < 1e-13
    assert len(found) < 20


def test_a_zoom_without_an_edge_stops_at_once() -> None:
    assert len(zoom(Params(system="quadratic", centre_x=-3, centre_y=-3, size=1, resolution=8), 5)) == 1


def test_a_tile_cannot_be_zoomed() -> None:
    with pytest.raises(InvalidInput, match="whole frame"):
        zoom(Params(resolution=16, tile=8), 2)


# --- the job ------------------------------------------------------------------------------------------------------


def test_only_a_whole_frame_has_a_dimension() -> None:
    whole = run(Params(system="quadratic", resolution=128, centre_x=0.3, centre_y=0.3))
    assert whole.dimension is not None
    assert whole.dimension_low is not None
    assert whole.dimension_high is not None
    assert whole.dimension_low <= whole.dimension <= whole.dimension_high
    assert (whole.edge, whole.box_sizes) == (int(box_counting.edge(whole.converged).sum()), [2, 4, 8])
    part = run(Params(system="quadratic", resolution=128, tile=64, centre_x=0.3, centre_y=0.3))
    assert (part.dimension, part.box_sizes, part.converged.shape) == (None, [], (64, 64))


def test_groups_share_what_is_trained_and_not_where() -> None:
    one = Params()
    assert fractal.group(one) == fractal.group(Params(centre_x=1, size=0.1, resolution=7, tile=2, tile_x=1))
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"steps": 9},
        {"activation": "relu"},
        {"batch": "one"},
        {"data": 1},
        {"plane": "rate_offset"},
    ]
    assert len({fractal.group(one), *(fractal.group(Params(**other)) for other in others)}) == 7


def test_needs_grow_with_the_tile_and_not_with_the_frame() -> None:
    tile = fractal.needs(Params(resolution=1024, tile=32))
    assert tile == fractal.needs(Params(resolution=32))
    assert fractal.needs(Params(resolution=64)).seconds == pytest.approx(4 * tile.seconds, rel=0.2)
    # The last column of tiles of a frame may be narrower.
    assert fractal.needs(Params(resolution=40, tile=32, tile_x=1)).seconds < 0.5 * tile.seconds


def test_the_plot_puts_tiles_together_and_leaves_gaps_grey() -> None:
    frame = Params(system="quadratic", centre_x=1, centre_y=1, size=3, resolution=64, tile=32)
    tiles = [frame.model_copy(update={"tile_x": x, "tile_y": y}) for y in (0, 1) for x in (0, 1)]
    records = [_record(number, tile, run(tile)) for number, tile in enumerate(tiles)]
    whole = fractal.plot(records)
    untiled = frame.model_copy(update={"tile": None})
    assert whole == fractal.plot([_record(9, untiled, run(untiled))])
    assert [type(panel.marks[0]) for panel in whole.panels] == [Image, Line]
    gap = fractal.plot([*records[:3], replace(records[3], state="running", result=None)])
    assert len(gap.panels) == 1
    assert "75% there" in gap.panels[0].title
    image = gap.panels[0].marks[0]
    assert isinstance(image, Image)
    assert base64.b64decode(image.png).startswith(b"\x89PNG")
    frames = fractal._frames(records[:3])
    picture = frames[0].picture()
    assert (picture[:256, 256:] == 206).all()  # the last tile is the upper right quarter
    assert not (picture[256:, :256] == 206).all(axis=-1).any()


def test_the_plot_of_a_zoom_shows_the_widest_frame_first() -> None:
    found = zoom(Params(system="mandelbrot", centre_x=-0.5, centre_y=0, size=3, resolution=64, steps=40), 3)
    figure = fractal.plot([_record(number, *pair) for number, pair in enumerate(reversed(found))])
    titles = [panel.title.partition(",")[0] for panel in figure.panels]
    assert titles == ["side 3", "side 0.3", "side 0.03", "Boxes on the edge"]
    lines = [mark.label for mark in figure.panels[-1].marks if isinstance(mark, Line)]
    assert lines == ["side 3", "side 0.3", "side 0.03"]


def test_the_plot_of_nothing_says_so() -> None:
    figure = fractal.plot([_record(0, Params(), None)])
    assert (figure.panels, figure.caption) == ([], "No tile has been computed yet.")


# --- evidence -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_edge_of_a_tanh_network_stays_rough_over_five_decades() -> None:
    # Measured: 1.05, then 1.40, 1.77, 1.73, 1.78, 1.75 from boxes of sides 2 and 4; every row of the last frame crosses
    # the edge more than once. On 128 x 128 pixels, sides 2, 4 and 8, the first four are 1.03, 1.41, 1.81, 1.77.
    found = zoom(Params(resolution=96), 6)
    assert len(found) == 6
    wide, *inner = [result.dimension for _, result in found]
    assert wide is not None
    assert wide < 1.2
    assert all(dimension is not None and dimension > 1.3 for dimension in inner)
    crossings = (np.diff(found[-1][1].converged.astype(np.int8), axis=1) != 0).sum(axis=1)
    assert (crossings > 1).mean() > 0.5
