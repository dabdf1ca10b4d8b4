"""The edge between hyperparameters that train and hyperparameters that diverge is a fractal.

A small network without biases is trained from one fixed start at every pixel of a plane of hyperparameters:

    f(x) = (1/n) W1 phi( W0 x / sqrt(n) ),        L = (1/d) sum_i (f(x_i) - y_i)^2,        W_k <- W_k - eta_k dL/dW_k

n is the width (and the number of inputs), W0 is n x n, W1 is 1 x n, phi is tanh, relu or the identity. The d points
x_i, the targets y_i and both weights are drawn once from N(0, 1) by the seed; everything is float64. The loss l_t, for
t = 0 .. steps, is that of all d points after t updates, also where an update sees one point. A pixel *converges* if
every l_t is finite and the mean of the last 20 is below l_0; otherwise it diverges.

One job is one tile of one frame of one plane: log10 of the two rates, or log10 of a common rate against an offset
added to W0. Pixel (i, j) of a frame of r pixels a side stands at centre + size (i/r - 1/2) in x, and so with j in y.
Division is correctly rounded, so i/r and (k i)/(k r) are one number: a frame is, to the bit, every k-th pixel of the
frame of k r pixels, and tiles are, to the bit, pieces of the frame. Two more systems run through the same code as
controls: gradient descent on a quadratic, whose edge is smooth, and z^2 + c, whose edge is known to be rough.

It does not measure the Hausdorff dimension, and one frame shows the spot it was put on: `zoom` seeks the roughest.
Compare dimensions of one resolution only (see `netassay.numerics.box_counting`).

Cost: pixels x steps x (2 n^2 d multiply-adds and n d activations); 128 x 128 pixels of the default network take 15 to
30 seconds on one core, less the more of them overflow early. Memory is that of a few hundred pixels.

Reference: Sohl-Dickstein. The boundary of neural network trainability is fractal. 2024. arXiv:2402.06184
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from netassay.fields import Array, Count, Index, Positive, Real, Seed
from netassay.figure import Axis, Figure, Image, Line, Panel
from netassay.heavy import np, torch
from netassay.method import Contract, InvalidInput, Needs
from netassay.numerics import box_counting, colour

if TYPE_CHECKING:
    from netassay.job import Record

VERSION = 1
#: Near a fractal edge the last bit of a processor's arithmetic decides a pixel.
GOLDEN_TOLERANCE = 0.05

#: Losses at the end whose mean is held against the first one; the paper's rule.
TAIL = 20
#: Ceiling of l_t / l_0 and l_0 / l_t in the intensity, so that one spike does not drown the sum.
CAP = 1e6
#: Pixels trained side by side: their matrices fit a core's second-level cache (about 10 KiB a pixel at width 16).
BLOCK = 128
#: Updates between two looks for pixels that left float64 and need no more work.
LOOK = 16
#: Curvatures of the quadratic L = (a u^2 + b v^2) / 2, started at u = v = 1: its edges are log10 rates 0.30 and 1.30.
CURVATURES = (1.0, 0.1)
#: Exponents a float64 rate can have, with room for products of two rates.
EXPONENT = 100.0


class Params(Contract):
    system: Literal["network", "quadratic", "mandelbrot"] = "network"
    """network; or a control: gradient descent on a quadratic with one rate a coordinate, or the Mandelbrot set."""
    activation: Literal["tanh", "relu", "identity"] = "tanh"
    width: Count = 16
    data: Count = 16
    """points in the training set; a smaller set is the beginning of a larger one of the same seed"""
    steps: Count = 300
    """updates (mandelbrot: iterations)"""
    batch: Literal["full", "one"] = "full"
    """an update sees all points, or one point, in turn"""
    plane: Literal["rates", "rate_offset"] = "rates"
    """x: log10 of the rate of layer 0, y: of layer 1; or x: log10 of both rates, y: offset of all entries of W0"""
    centre_x: Real = 2.0
    centre_y: Real = 2.0
    size: Positive = 4.0
    """side of the frame, in the units of its axes"""
    resolution: Count = 128
    """pixels a side of the frame"""
    tile: Count | None = None
    """pixels a side of a tile; none: the whole frame is one tile"""
    tile_x: Index = 0
    tile_y: Index = 0
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Params:
        tiles = -(-self.resolution // self.tile_side)
        if max(self.tile_x, self.tile_y) >= tiles:
            raise ValueError(
                f"tile ({self.tile_x}, {self.tile_y}) lies outside the frame: {self.resolution} pixels a side make "
                f"{tiles} tiles of {self.tile_side}; count tiles from 0 to {tiles - 1}"
            )
        reach = max(abs(self.centre_x), abs(self.centre_y)) + self.size / 2
        if reach > EXPONENT:
            raise ValueError(
                f"the frame reaches {reach:g}, past {EXPONENT:g}: rates there leave float64; move it inwards"
            )
        finest = 4 * math.ulp(reach)
        if self.size / self.resolution < finest:
            raise ValueError(
                f"pixels {self.size / self.resolution:.1e} apart cannot be told apart in float64 at {reach:g}; "
                f"use a size of at least {finest * self.resolution:.1e}, or fewer pixels"
            )
        return self

    @property
    def tile_side(self) -> int:
        return min(self.tile or self.resolution, self.resolution)

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of the tile's columns and rows in the plane, float64, rising."""

        def along(centre: float, tile: int) -> np.ndarray:
            start = tile * self.tile_side
            places = np.arange(start, min(start + self.tile_side, self.resolution), dtype=np.float64)
            return centre + self.size * (places / self.resolution - 0.5)

        return along(self.centre_x, self.tile_x), along(self.centre_y, self.tile_y)


class Result(Contract):
    converged: Array
    """bool (rows, columns) of the tile; the first row has the lowest y, the first column the lowest x"""
    intensity: Array
    """float32, same shape: sum over t of l_t / l_0 where converged, of l_0 / l_t elsewhere, each term at most 1e6;
    mandelbrot: the last |z|, and the iterations before |z| > 2"""
    converging: int
    """pixels of the tile that converge"""
    diverging: int
    overflowed: int
    """pixels among the diverging whose loss left float64"""
    edge: int
    """converging pixels with a diverging 4-neighbour in the same tile"""
    dimension: float | None
    """box-counting dimension of the edge; none for a part of a frame, below 64 pixels a side, or without an edge"""
    dimension_low: float | None
    """95 % block-bootstrap interval of the dimension (below 128 pixels a side: none)"""
    dimension_high: float | None
    box_sizes: list[int]
    box_counts: list[int]
    rule: str
    """when a pixel counts as converging"""


EXAMPLE: dict[str, Any] = {
    "jobs": [
        {
            "method": "dynamics.trainability_fractal",
            "params": {"resolution": 64, "tile": 32, "steps": 60},
            "grid": {"tile_x": [0, 1], "tile_y": [0, 1]},
        }
    ]
}


def group(params: Params) -> str:
    """Tiles of any frames whose pixels are trained alike."""
    return json.dumps(_alike(params))


def needs(params: Params) -> Needs:
    columns, rows = (
        min(params.tile_side, params.resolution - tile * params.tile_side) for tile in (params.tile_x, params.tile_y)
    )
    pixels = columns * rows
    if params.system != "network":
        seconds = {"quadratic": 25e-9, "mandelbrot": 6e-9}[params.system]
        return Needs(0.02 + pixels * params.steps * seconds, libraries=("numpy",), group=max(1, 65536 // pixels))
    # One pixel and step: overhead, multiply-adds, activations; within 60 % of what widths 4 to 64 and 1 to 272 points
    # took on one core where no pixel overflows.
    n, d = params.width + -params.width % 8, params.data + -params.data % 8
    products = n * n * d * (2 if params.batch == "full" else 1)
    seconds = 1.4e-6 + 0.17e-9 * products + (7.5e-9 if params.activation == "tanh" else 2.5e-9) * n * d
    # A block is full with BLOCK pixels; only smaller tiles gain from company.
    return Needs(0.05 + pixels * params.steps * seconds, group=max(1, 4 * BLOCK // pixels))


def run(params: Params) -> Result:
    return run_many([params])[0]


def run_many(many: list[Params]) -> list[Result]:
    """Tiles that are trained alike (see `group`) as one list of pixels; no pixel's result depends on the others."""
    grids = []
    for params in many:
        x, y = params.axes()
        grids.append(np.meshgrid(x, y))
    x = np.concatenate([columns.ravel() for columns, _ in grids])
    y = np.concatenate([rows.ravel() for _, rows in grids])
    pixels = classify(many[0], x, y)
    ends = np.cumsum([columns.size for columns, _ in grids])[:-1]
    results = []
    for params, (columns, _), *parts in zip(many, grids, *(np.split(array, ends) for array in pixels), strict=True):
        results.append(_result(params, *(part.reshape(columns.shape) for part in parts)))
    return results


def classify(params: Params, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of points of the plane: converged (bool), intensity (float32) and overflowed (bool), each (points,).

    x, y: float64 (points,), in the units of the plane. Of `params` only what makes the system is read, not the frame.
    """
    if params.system == "mandelbrot":
        parts = [_escape(x[cut], y[cut], params.steps) for cut in _cuts(len(x), 4096)]
    elif params.system == "quadratic":
        parts = [_judge(_descend(x[cut], y[cut], params.steps)) for cut in _cuts(len(x), 1024)]
    else:
        with torch.no_grad():
            start = _start(params)
            parts = [_judge(_train(params, start, x[cut], y[cut])) for cut in _cuts(len(x), BLOCK)]
    converged, intensity, overflowed = (np.concatenate(part) for part in zip(*parts, strict=True))
    return converged, intensity, overflowed


def zoom(
    params: Params, frames: int, factor: float = 10.0, on: Literal["roughest", "edge"] = "roughest"
) -> list[tuple[Params, Result]]:
    """Frames one inside the other, each `factor` times smaller, computed one after the other; the first is `params`.

    on: centre of the next frame. "roughest": the 8 x 8 patch with most edge pixels, which picks the roughest part;
    "edge": the point of the edge nearest to the frame's centre, bisected along x or y as far as float64 goes.
    Fewer frames come back where a frame has no edge, or its pixels could no longer be told apart.

    Raises InvalidInput where `params` is not a whole frame of at least 8 pixels a side, or factor is not above 1.
    """
    if params.tile_side < params.resolution or params.resolution < 8 or not factor > 1:
        raise InvalidInput(
            "this frame cannot be zoomed", "", "a whole frame of 8 pixels a side or more, factor above 1"
        )
    found = []
    for _ in range(frames):
        result = run(params)
        found.append((params, result))
        if not result.edge:
            break
        x, y = _roughest(params, result) if on == "roughest" else _nearest(params, result)
        try:
            params = Params.model_validate(
                {**params.model_dump(), "centre_x": x, "centre_y": y, "size": params.size / factor}
            )
        except ValueError:  # past the finest grid of float64
            break
    return found


def bisect(params: Params, converging: tuple[float, float], diverging: tuple[float, float]) -> tuple[float, float]:
    """The last converging point before an edge on the segment between two points (x, y) of the plane.

    Each round trains 15 points between the ends side by side and keeps the 16th of the segment in which the class
    first changes; it ends where the segment's coordinates are neighbours in float64.

    Raises InvalidInput where the first point does not converge or the second does.
    """
    ends = np.array([converging, diverging], dtype=np.float64)
    first, second = classify(params, ends[:, 0], ends[:, 1])[0]
    if not first or second:
        words = {True: "converges", False: "diverges"}
        raise InvalidInput(
            "the segment has no edge to bisect",
            f"{converging} {words[bool(first)]} and {diverging} {words[bool(second)]}",
            "ends of different classes, the converging one first",
        )
    while True:
        points = ends[0] + np.linspace(0.0, 1.0, 17)[:, None] * (ends[1] - ends[0])
        points[-1] = ends[1]
        inner = classify(params, points[1:-1, 0], points[1:-1, 1])[0]
        last = int(np.append(~inner, True).argmax())  # the first that diverges is points[last + 1]
        narrowed = points[last : last + 2]
        if (np.abs(narrowed[1] - narrowed[0]) <= np.spacing(np.abs(narrowed[0]))).all() or (narrowed == ends).all():
            return float(narrowed[0, 0]), float(narrowed[0, 1])
        ends = narrowed


def plot(records: list[Record]) -> Figure:
    """The frames of these tiles, put together: blue converges, orange diverges, grey is not there yet; and N(s)."""
    frames = _frames(records)
    shown = _spread(frames, 12)
    common = (
        {name: value for name, value in frames[0].about.items() if all(frame.about[name] == value for frame in frames)}
        if frames
        else {}
    )
    panels = [frame.panel(set(common)) for frame in shown]
    lines = [line for frame in shown if (line := frame.line(set(common), shown))]
    if lines:
        panels.append(
            Panel(
                title="Boxes on the edge",
                x=Axis(label="side of a box s (pixels)", scale="log"),
                y=Axis(label="boxes N(s)", scale="log"),
                marks=list(lines),
                width=360,
                height=360,
            )
        )
    left_out = f" {len(shown)} of {len(frames)} frames are shown." if len(shown) < len(frames) else ""
    return Figure(
        title="The edge of trainability",
        caption=(
            f"{_words(common)}. Blue pixels converge ({_rule(frames[0].params)}), orange pixels diverge; light blue "
            "learns slowly, light orange diverges slowly (ranks of summed losses). D is the box-counting dimension of "
            f"the edge with its 95 % block-bootstrap interval.{left_out}"
            if frames
            else "No tile has been computed yet."
        ),
        panels=panels,
        columns=min(3, max(1, len(panels))),
    )


# The systems


def _alike(params: Params) -> dict[str, Any]:
    """What two pixels must share to be trained side by side; of a control, only what it reads."""
    names = (
        ("steps",) if params.system != "network" else ("activation", "width", "data", "steps", "batch", "plane", "seed")
    )
    return {name: getattr(params, name) for name in ("system", *names)}


def _cuts(length: int, block: int) -> Iterable[slice]:
    return (slice(start, start + block) for start in range(0, length, block))


def _start(params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W0 (n, n), W1 (1, n), inputs (d, n) and targets (1, d): standard normal, float64."""
    draw = np.random.default_rng(params.seed).standard_normal
    n = params.width
    first, second = draw((n, n)), draw((1, n))
    points = draw((params.data, n + 1))  # a point a row, so that fewer data are the beginning of more
    return first, second, points[:, :n], points[:, n:].T


def _rates(exponents: np.ndarray) -> np.ndarray:
    # Not np.power: its vector and scalar loops may differ in the last bit, and with them a pixel by its neighbours.
    return np.array([10.0**exponent for exponent in exponents.tolist()])


def _padded(array: np.ndarray) -> np.ndarray:
    """A matrix with zeros after its last row and column, up to multiples of 8."""
    return np.pad(array, [(0, -length % 8) for length in array.shape])


def _train(params: Params, start: tuple[np.ndarray, ...], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Losses (pixels, steps + 1) of one block of pixels; after the first that is not finite, none has a meaning.

    A pixel's bits must not depend on its neighbours. So every product is a `bmm` with one matrix a pixel (a gemm over
    all pixels sums in an order that depends on where the pixel lies in it), and every matrix starts on a cache line,
    since gemm kernels treat unaligned rows differently: width and data are padded with zeros to multiples of 8. The
    padding stays zero: phi(0) = 0, so padded units have no gradient and padded points no residual.
    """
    n, d, steps, count = params.width, params.data, params.steps, len(x)
    first, second, inputs, targets = (_padded(array) for array in start)
    second, targets = second[:1], targets[:1]  # rows: (1, n) and (1, d)
    units, points = first.shape[0], targets.shape[1]
    rates = torch.from_numpy(_rates(x)), torch.from_numpy(_rates(y if params.plane == "rates" else x))
    w0 = torch.from_numpy(first).repeat(count, 1, 1)
    if params.plane == "rate_offset":
        w0[:, :n, :n] += torch.from_numpy(y)[:, None, None]
    w1 = torch.from_numpy(second).repeat(count, 1, 1)
    rows = torch.from_numpy(inputs / math.sqrt(n))
    columns = rows.T.contiguous()
    target = torch.from_numpy(targets)
    seen = d if params.batch == "full" else 1
    step0, step1 = (rate.view(-1, 1, 1) * (2.0 / (seen * n)) for rate in rates)  # dL/df = 2 r / seen, df/dW1 = a / n

    losses = torch.full((steps + 1, count), math.inf, dtype=torch.float64)
    alive = torch.arange(count)
    for t in range(steps + 1):
        z = torch.bmm(w0, columns.expand(len(alive), units, points))  # (pixels, n, d)
        if params.activation == "tanh":
            a = z.tanh_()
        elif params.activation == "relu":
            a = z.relu_()
        else:
            a = z
        r = torch.bmm(w1, a).div_(n).sub_(target)  # (pixels, 1, d)
        losses[t, alive] = torch.bmm(r, r.mT).view(-1).div_(d)
        if t == steps:
            break
        if t % LOOK == LOOK - 1:
            keep = losses[t, alive].isfinite()
            if keep.sum() < 0.8 * len(alive):
                if not keep.any():
                    break
                alive, w0, w1, a, r, step0, step1 = (part[keep] for part in (alive, w0, w1, a, r, step0, step1))
        if params.batch == "one":
            place = slice(t % d, t % d + 1)
            a, r, seen_rows = a[:, :, place], r[:, :, place], rows[place]
        else:
            seen_rows = rows
        back = w1.mT * (r * step0)  # rate times dL/dz, (pixels, n, seen), before phi'
        w1 = w1 - torch.bmm(r * step1, a.mT)
        if params.activation == "tanh":
            back.addcmul_(back * a, a, value=-1)
        elif params.activation == "relu":
            back.mul_(a > 0)
        w0 = torch.baddbmm(w0, back, seen_rows.expand(len(alive), -1, -1), alpha=-1)
    return losses.T.contiguous().numpy()


def _descend(x: np.ndarray, y: np.ndarray, steps: int) -> np.ndarray:
    """Losses (points, steps + 1) of gradient descent on the quadratic of `CURVATURES`, one rate a coordinate."""
    w = np.ones((2, len(x)))
    curvature = np.array(CURVATURES)[:, None]
    rates = np.stack([_rates(x), _rates(y)])
    losses = np.empty((steps + 1, len(x)))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps + 1):
            terms = curvature * w * w / 2
            np.add(terms[0], terms[1], out=losses[t])
            w = w - rates * (curvature * w)
    return np.ascontiguousarray(losses.T)


def _judge(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Converged, intensity and overflowed, each (pixels,), from losses (pixels, steps + 1)."""
    # One pixel a row, contiguous: numpy then sums every row in the same order, however many there are.
    finite = np.logical_and.accumulate(np.isfinite(losses), axis=1)
    losses = np.where(finite, losses, np.inf)
    first = losses[:, :1]
    tail = losses[:, -min(TAIL, losses.shape[1] - 1) :]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        converged = tail.mean(axis=1) < first[:, 0]
        rising = np.minimum(losses / first, CAP).sum(axis=1)
        falling = np.minimum(first / losses, CAP).sum(axis=1)
    return converged, np.where(converged, rising, falling).astype(np.float32), ~finite[:, -1]


def _escape(x: np.ndarray, y: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members of the Mandelbrot set up to `iterations` of z -> z^2 + c, c = x + iy: |z| <= 2 throughout."""
    inside = np.zeros(len(x), dtype=bool)
    intensity = np.zeros(len(x))
    alive = np.arange(len(x))
    c, d = x, y
    u, v = x.copy(), y.copy()  # z after the first iteration, from z = 0
    for t in range(1, iterations + 1):
        squares = u * u + v * v
        stays = squares <= 4.0
        if t == iterations:
            inside[alive] = stays
            intensity[alive] = np.where(stays, np.sqrt(squares), t)
        elif not stays.all():
            intensity[alive[~stays]] = t
            alive, c, d, u, v = (part[stays] for part in (alive, c, d, u, v))
        u, v = u * u - v * v + c, 2 * u * v + d
    return inside, intensity.astype(np.float32), np.zeros(len(x), dtype=bool)


def _rule(params: Params) -> str:
    if params.system == "mandelbrot":
        return f"|z| <= 2 for {params.steps} iterations"
    return f"mean of the last {min(TAIL, params.steps)} losses below the first, all finite"


def _result(params: Params, converged: np.ndarray, intensity: np.ndarray, overflowed: np.ndarray) -> Result:
    edge = box_counting.edge(converged)
    whole = params.tile_side == params.resolution
    measured = box_counting.dimension(edge) if whole and len(box_counting.box_sizes(params.resolution)) > 1 else None
    return Result(
        converged=converged,
        intensity=intensity,
        converging=int(converged.sum()),
        diverging=int((~converged).sum()),
        overflowed=int(overflowed.sum()),
        edge=int(edge.sum()),
        dimension=measured.value if measured else None,
        dimension_low=measured.low if measured else None,
        dimension_high=measured.high if measured else None,
        box_sizes=list(measured.sizes) if measured else [],
        box_counts=list(measured.counts) if measured else [],
        rule=_rule(params),
    )


# The zoom


def _roughest(params: Params, result: Result) -> tuple[float, float]:
    row, column = box_counting.densest_patch(box_counting.edge(result.converged), 8)
    x, y = params.axes()
    return float(x[column : column + 8].mean()), float(y[row : row + 8].mean())


def _nearest(params: Params, result: Result) -> tuple[float, float]:
    """The edge between two pixels of different class, bisected; of the pairs, the nearest to the frame's centre."""
    x, y = params.axes()
    inside = result.converged
    pairs = []
    for step_row, step_column in ((0, 1), (1, 0)):
        here = inside[: inside.shape[0] - step_row, : inside.shape[1] - step_column]
        for row, column in np.argwhere(here != inside[step_row:, step_column:]).tolist():
            near = (float(x[column]), float(y[row]))
            far = (float(x[column + step_column]), float(y[row + step_row]))
            pairs.append((near, far) if inside[row, column] else (far, near))
    nearest = min(pairs, key=lambda pair: math.dist(pair[0], (params.centre_x, params.centre_y)))
    return bisect(params, *nearest)


# The picture


class _Frame:
    """The tiles of one frame that are there, put together."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.about = _alike(params)
        side = params.resolution
        self.converged = np.zeros((side, side), dtype=bool)
        self.intensity = np.zeros((side, side), dtype=np.float32)
        self.known = np.zeros((side, side), dtype=bool)

    def add(self, params: Params, converged: np.ndarray, intensity: np.ndarray) -> None:
        row, column = params.tile_y * params.tile_side, params.tile_x * params.tile_side
        place = (slice(row, row + converged.shape[0]), slice(column, column + converged.shape[1]))
        self.converged[place], self.intensity[place], self.known[place] = converged, intensity, True

    def dimension(self) -> box_counting.Dimension | None:
        if not self.known.all() or len(box_counting.box_sizes(self.params.resolution)) < 2:
            return None
        return box_counting.dimension(box_counting.edge(self.converged))

    def picture(self) -> np.ndarray:
        """uint8 (rows, columns, 3), first row on top."""
        # Every k-th pixel of a frame is itself a frame: a picture needs no more pixels than a screen.
        step = slice(None, None, max(1, self.params.resolution // 1024))
        converged, known, values = self.converged[step, step], self.known[step, step], self.intensity[step, step]
        rgb = np.empty((*converged.shape, 3), dtype=np.uint8)
        rgb[:] = colour.GREY
        for chosen, anchors in ((converged & known, colour.COLD), (~converged & known, colour.WARM)):
            rgb[chosen] = colour.ramp(anchors, colour.equalise(values[chosen]))
        return colour.enlarge(rgb[::-1], 512)

    def title(self, common: set[str]) -> str:
        return _words({name: value for name, value in self.about.items() if name not in common})

    def panel(self, common: set[str]) -> Panel:
        params = self.params
        measured = self.dimension()
        if measured is None:
            share = self.known.mean()
            state = "no edge" if share == 1 and not box_counting.edge(self.converged).any() else ""
            state = state if share == 1 else f"{share:.0%} there"
        else:
            interval = f" [{measured.low:.2f}, {measured.high:.2f}]" if measured.low is not None else ""
            state = f"D = {measured.value:.2f}{interval}"
        about = ", ".join(part for part in (f"side {params.size:.3g}", state) if part)
        quantity_x, quantity_y = _quantities(params)
        x, x0, x1 = _axis(quantity_x, params.centre_x, params.size)
        y, y0, y1 = _axis(quantity_y, params.centre_y, params.size)
        return Panel(
            title="\n".join(part for part in (self.title(common), about) if part),
            x=Axis(label=x, low=x0, high=x1),
            y=Axis(label=y, low=y0, high=y1),
            marks=[Image(png=colour.png(self.picture()), x0=x0, x1=x1, y0=y0, y1=y1)],
            width=360,
            height=360,
        )

    def line(self, common: set[str], frames: Sequence[_Frame]) -> Line | None:
        measured = self.dimension()
        if measured is None:
            return None
        label = ", ".join(part for part in (self.title(common), f"side {self.params.size:.3g}") if part)
        if sum(frame.about == self.about and frame.params.size == self.params.size for frame in frames) > 1:
            label += f" at ({self.params.centre_x:.6g}, {self.params.centre_y:.6g}), {self.params.resolution} pixels"
        return Line(x=list(measured.sizes), y=list(measured.counts), label=label, points=True)


def _frames(records: Sequence[Record]) -> list[_Frame]:
    """Frames with at least one tile done: conditions side by side, the widest first."""
    frames: dict[str, _Frame] = {}
    for record in records:
        if record.state != "done":
            continue
        params = Params.model_validate(record.params)
        about = {**params.model_dump(), "tile": None, "tile_x": 0, "tile_y": 0}
        frame = frames.setdefault(json.dumps(about, sort_keys=True), _Frame(Params.model_validate(about)))
        frame.add(params, record.array("converged"), record.array("intensity"))
    return sorted(frames.values(), key=lambda frame: (json.dumps(frame.about, sort_keys=True), -frame.params.size))


def _spread(frames: list[_Frame], most: int) -> list[_Frame]:
    """At most `most` frames, evenly spaced, first and last among them."""
    if len(frames) <= most:
        return frames
    return [frames[round(place * (len(frames) - 1) / (most - 1))] for place in range(most)]


def _quantities(params: Params) -> tuple[str, str]:
    if params.system == "mandelbrot":
        return "Re c", "Im c"
    if params.plane == "rate_offset" and params.system == "network":
        return "log10 rate", "offset of the first weights"
    return "log10 rate of layer 0", "log10 rate of layer 1"


def _axis(quantity: str, centre: float, size: float) -> tuple[str, float, float]:
    """Label and ends: values on a wide frame, else distances from the centre, since its first digits are all alike."""
    half = size / 2
    if size > 0.02 * max(abs(centre), 1.0):
        return quantity, centre - half, centre + half
    power = math.floor(math.log10(half))
    end = half / 10.0**power
    return f"{quantity} − {centre:.{min(1 - power, 15)}f}, in 1e{power}", -end, end


def _words(about: dict[str, Any]) -> str:
    """A condition in words: `tanh, 16 points, full batch, 300 steps, seed 0`."""
    forms: dict[str, Callable[[Any], str]] = {
        "system": lambda value: "" if value == "network" else {"quadratic": "quadratic", "mandelbrot": "z² + c"}[value],
        "activation": str,
        "width": lambda value: f"{value} units",
        "data": lambda value: f"{value} point" + "s" * (value != 1),
        "steps": lambda value: f"{value} steps",
        "batch": lambda value: "full batch" if value == "full" else "one point a step",
        "plane": lambda value: "" if value == "rates" else "rate against offset",
        "seed": lambda value: f"seed {value}",
    }
    return ", ".join(text for name, value in about.items() if (text := forms[name](value)))
