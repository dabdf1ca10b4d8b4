"""The local l_inf Lipschitz constant of a network around an example, between a sampled floor and a certified bound.

    L = sup over x in B of |J(x)|_inf,   B = {x : |x - x_i|_inf <= r},   |J|_inf = max_c sum_j |d(c f)/dx_j|

x_i: example i of a split of a dataset; r: `radius`, in units of the input; with `clip` B is cut with [0, 1]. Rows c:
all outputs, or one `output` k, or the difference f_k - f_l of it and another one, `minus`. J is the Clarke Jacobian of
f on B, so |f(x) - f(x')|_inf <= L |x - x'|_inf for x, x' in B. Bounds from above, each cut with the one before, so that
they are in this order on every instance:

1. product: |c W_L|_1 |W_(L-1)|_inf ... |W_1|_inf, good for all inputs (|W|_inf: the largest l1 norm of a row);
2. interval: the backward graph c W_L D ... D W_1 by intervals, D_i in {0}, {1} or [0, 1] from CROWN pre-activations;
3. linear: the backward graph by linear relaxations, as CROWN has them for the forward one;
4. bab: branch and bound, `budget` parts: an unstable neuron is split into D = 1 and D = 0, its pre-activation of that
   sign. `exact` where no part is left open; with enough budget every small network ends there.

`until` is the last of them that is computed, `bound` its value. Below: the largest |J| met at `samples` points (half of
them corners) and on `moves` moves of the best ones. Of each row and input feature, `signs` says whether the row is
proved to increase (1) or decrease (-1) with it all over B.

What holds exactly: all bounds, and the floor, in real arithmetic for float64 weights as read, with their own rounding
taken off outward. The exact constant does not decrease with the radius; bab does not where it is `exact`, a bound with
a budget may. `netassay.numerics.bounds.jacobian` and `netassay.numerics.branch_and_bound.jacobians` have the
mathematics. It is not a bound on how f changes outside B, nor for other norms. ReLU networks without skips.

Cost: for L layers of width n and d inputs, u unstable neurons a layer: the forward pass and every bound of a layer of
the backward graph take 2 u rows through up to L products, the Jacobian 2 d rows: O(L^2 u n^2 + L d n^2) a row; so does
every part of branch and bound, less what is stable. Floor: 2 L n^2 for each point and row.

Reference: Shi, Wang, Zhang, Kolter, Hsieh. Efficiently computing local Lipschitz constants of neural networks via bound
propagation. 2022.
Reference: Zhang, Zhang, Hsieh. RecurJac: an efficient recursive algorithm for bounding Jacobian matrix of neural
networks and its applications. 2019.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from netassay import data, networks
from netassay.fields import Array, Count, DatasetRef, Index, NetworkRef, Radius, Seed
from netassay.figure import Axis, Bars, Figure, Line, Panel
from netassay.heavy import np, torch
from netassay.method import Contract, Failure, InvalidInput, MethodError, Needs, NotApplicable, NumericalError
from netassay.networks.graph import Graph
from netassay.numerics.bounds import jacobian, stages
from netassay.numerics.bounds.regions import Ball
from netassay.numerics.branch_and_bound import jacobians

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record

VERSION = 1
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05
#: Sums of a batch are rounded in another order than alone; bounds of deep networks are differences of large numbers.
TOLERANCE = 1e-8


class Params(Contract):
    network: NetworkRef
    dataset: DatasetRef = "digits"
    split: Literal["test", "train", "all"] = "test"
    index: Index
    """which example of the split"""
    radius: Radius
    clip: bool = False
    """cut the ball with [0, 1]"""
    output: Index | None = None
    """the output that is asked about; all of them where none is given"""
    minus: Index | None = None
    """subtract this output from it"""
    until: Literal["interval", "linear", "bab"] = "bab"
    """the last bound to compute"""
    budget: Annotated[Count, Field(le=100_000)] = 256
    """parts that branch and bound may bound"""
    samples: Annotated[Count, Field(le=1_000_000)] = 1000
    """points at which the gradient is taken"""
    moves: Annotated[int, Field(ge=0, le=100_000)] = 100
    """times that the best of these points are moved"""
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Params:
        if self.minus is not None and self.output is None:
            raise ValueError("minus subtracts from an output; give that one as output")
        if self.minus is not None and self.minus == self.output:
            raise ValueError("output and minus are the same: their difference is 0 everywhere")
        # Where stored params are read, the artifact may be elsewhere: then the job itself checks, when it runs.
        if data.is_known(self.dataset) or not data.is_reference(self.dataset):
            data.check_index(self.dataset, self.split, self.index)
        return self


class Result(Contract):
    product: float
    interval: float
    linear: float | None
    bab: float | None
    """None where it was not asked for, or the network is too large for its layers to be matrices"""
    bound: float
    """the smallest of these"""
    sampled: float
    """the largest |J| met at a point; at most L"""
    exact: bool
    """whether branch and bound came to an end: `bab` is L"""
    unstable: int
    """neurons whose sign CROWN leaves open"""
    neurons: int
    parts: int
    """bounded by branch and bound"""
    open: int
    """of them left to split when the budget ended"""
    trace_parts: list[int]
    trace_bounds: list[float]
    """the bound by branch and bound after so many parts"""
    by_row: Array
    """(rows,), the bound of each row before branch and bound"""
    signs: Array
    """(rows, *input), int8: 1 where the row is proved to increase with the feature all over the ball, -1 where to
    decrease, 0 where neither is proved"""
    increasing: int
    decreasing: int
    """how many 1 and -1 there are in `signs`"""
    features: int
    """how many numbers there are in `signs`"""


#: Measured on one core (64-64-64-10 net on digits, radius 0.02, one output): up to the linear bound 10, 3.2, 2.7 ms a
#: job in groups of 1, 8, 64; 1,000 points and 100 moves of 16 more, 30 ms; a part of branch and bound, 2 ms.
NEEDS = Needs(seconds=0.005, memory=512 * 2**20, libraries=("numpy", "torch", "scipy.optimize"), group=64)
_PART, _POINT = 0.002, 1.2e-5


def needs(params: Params) -> Needs:
    """Seconds grow with the budget and the points; a user's dataset is loaded as a whole."""
    parts = params.budget if params.until == "bab" else 0
    seconds = NEEDS.seconds + _PART * parts + _POINT * (params.samples + 16 * params.moves)
    memory = (NEEDS.memory or 0) + data.memory(params.dataset)
    # What branch and bound does, it does job by job: nothing is gained by larger groups.
    return replace(NEEDS, seconds=seconds, memory=memory, group=8 if parts else NEEDS.group)


EXAMPLE = {
    "jobs": [
        {
            "method": "lipschitz.local_bound_propagation",
            "params": {
                "network": {
                    "dataset": "digits",
                    "architecture": {"kind": "mlp", "hidden": [16, 16]},
                    "seed": 0,
                    "epochs": 8,
                },
                "dataset": "digits",
                "output": 0,
                "budget": 64,
                "samples": 200,
                "moves": 20,
            },
            "grid": {"index": [0, 1], "radius": [0.01, 0.03, 0.1]},
        }
    ]
}


def run(params: Params) -> Result:
    """Raises InvalidInput where data and network do not fit, NotApplicable for networks that are no chain of linear
    maps and ReLU, NumericalError where bounds overflow.
    """
    outcome = _outcomes([params])[0]
    if isinstance(outcome, MethodError):
        raise outcome
    return outcome


def run_many(params: list[Params]) -> list[Result | Failure]:
    """All of one network and dataset; radii, examples and outputs may differ."""
    return [Failure.of(outcome) if isinstance(outcome, MethodError) else outcome for outcome in _outcomes(params)]


@dataclass(frozen=True, eq=False)
class _Item:
    """One job. x: (*input shape of the network), float64."""

    params: Params
    x: Tensor


def _outcomes(params: Sequence[Params]) -> list[Result | MethodError]:
    outcomes: list[Any] = [None] * len(params)
    graph = networks.load(params[0].network)
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    items: list[_Item | MethodError] = [_read(graph, wanted) for wanted in params]
    for place, (wanted, item) in enumerate(zip(params, items, strict=True)):
        if isinstance(item, MethodError):
            outcomes[place] = item
        else:
            groups[wanted.output, wanted.minus, wanted.clip].append(place)
    for places in groups.values():
        group: list[_Item] = [items[place] for place in places]  # type: ignore[misc]
        for place, outcome in zip(places, _bounded(graph, group), strict=True):
            outcomes[place] = outcome
    return outcomes


def _read(graph: Graph, params: Params) -> _Item | MethodError:
    """The example of a job in the shape the network wants, or what is wrong with the job."""
    try:
        data.check_index(params.dataset, params.split, params.index)
    except ValueError as error:
        return InvalidInput("the example does not exist", str(error))
    examples = data.load(params.dataset, params.split)
    x = torch.from_numpy(np.array(examples.x[params.index], dtype=np.float64))
    if x.numel() != int(np.prod(graph.input_shape)):
        return InvalidInput(
            f"the network does not take {data.called(params.dataset)}",
            f"its input has the shape {graph.input_shape}, an example {tuple(x.shape)}",
            "another dataset, or a network trained on this one",
        )
    if params.clip and not 0.0 <= float(x.min()) <= float(x.max()) <= 1.0:
        return InvalidInput(
            f"example {params.index} of {data.called(params.dataset)} does not lie in [0, 1]",
            f"its values go from {float(x.min()):g} to {float(x.max()):g}, and the ball is cut with [0, 1]",
            "clip: false, or scale: minmax for the dataset",
        )
    outputs = int(np.prod(graph.output_shape))
    for name in ("output", "minus"):
        wanted = getattr(params, name)
        if wanted is not None and wanted >= outputs:
            return InvalidInput(f"{name} {wanted} does not exist", f"the network has {outputs}: 0..{outputs - 1}")
    return _Item(params, x.reshape(graph.input_shape))


def _rows(graph: Graph, params: Params) -> Tensor:
    """The rows c that are asked about: (rows, outputs)."""
    one = torch.eye(int(np.prod(graph.output_shape)), dtype=torch.float64)
    if params.output is None:
        return one
    row = one[params.output : params.output + 1]
    return row if params.minus is None else row - one[params.minus]


def _ball(items: Sequence[_Item]) -> Ball:
    low, high = (0.0, 1.0) if items[0].params.clip else (-np.inf, np.inf)
    radius = torch.tensor([item.params.radius for item in items], dtype=torch.float64)
    return Ball("inf", torch.stack([item.x for item in items]), radius, low, high)


def _bounded(graph: Graph, group: list[_Item]) -> list[Result | MethodError]:
    """Jobs of the same rows and clip."""
    rows = _rows(graph, group[0].params)
    try:
        product = float(jacobian.product_of_norms(graph, rows).amax())
        found = jacobian.bounds(graph, _ball(group), rows)
    except NotImplementedError as error:
        reason = NotApplicable("the network is not a chain of linear maps and ReLU", str(error))
        return [reason] * len(group)
    results: list[Result | MethodError] = []
    for place, item in enumerate(group):
        if bool(found.delicate[place]):
            # So near to a choice of slopes that the company might decide: computed alone, whoever else is here.
            results.append(_result(graph, item, rows, product, jacobian.bounds(graph, _ball([item]), rows), 0))
        else:
            results.append(_result(graph, item, rows, product, found, place))
    return results


def _result(
    graph: Graph, item: _Item, rows: Tensor, product: float, found: jacobian.Bounds, place: int
) -> Result | MethodError:
    params, region = item.params, _ball([item])
    by_row = found.norm[place] if params.until != "interval" else found.norm_interval[place]
    interval = min(product, float(found.norm_interval[place].amax()))
    if not (np.isfinite(interval) and bool(torch.isfinite(by_row).all())):
        return NumericalError(
            "the bounds are not finite",
            "a weight, or a product of weights along the layers, is too large or is not a number",
            "check the network's weights for NaN and infinity, or scale them down",
        )
    linear = None if params.until == "interval" else min(interval, float(by_row.amax()))
    box = found.interval if params.until == "interval" else found.linear
    signs = (box.lower[place] >= 0).to(torch.int8) - (box.upper[place] <= 0).to(torch.int8)

    def steepest(samples: int, moves: int, points: Tensor | None = None) -> float:
        of = {"samples": samples, "moves": moves, "seed": _seed(params), "points": points}
        return jacobian.steepest(graph, region, rows, pads, found.rounding[place], **of).norm  # type: ignore[arg-type]

    chain = stages.of(graph, torch.float64)
    pads = {
        operation.source: pad.reshape(graph.shape_of(operation.source))
        for operation, pad in zip(chain.activations, stages.boxes(graph, region).pads, strict=True)
    }
    sampled = steepest(params.samples, params.moves)
    answer = None
    if params.until == "bab":
        answer = jacobians.search(graph, region, rows, budget=params.budget, least=sampled)
    if answer is not None and answer.point is not None:
        sampled = max(sampled, steepest(0, 0, answer.point.reshape(1, *graph.input_shape)))
    bab = None if answer is None or linear is None else min(linear, answer.bound)
    best = next(value for value in (bab, linear, interval) if value is not None)
    trace = [] if answer is None else answer.trace
    opened = [(box.lower[place] < 0) & (box.upper[place] > 0) for box in found.values.values()]
    return Result(
        product=product, interval=interval, linear=linear, bab=bab, bound=best, sampled=sampled,
        exact=answer is not None and answer.exact,
        unstable=sum(int(one.sum()) for one in opened), neurons=sum(one.numel() for one in opened),
        parts=0 if answer is None else answer.parts, open=0 if answer is None else answer.open,
        trace_parts=[parts for parts, _ in trace], trace_bounds=[min(bound, linear or bound) for _, bound in trace],
        by_row=by_row.clamp(max=product).numpy(), signs=signs.numpy(),
        increasing=int((signs > 0).sum()), decreasing=int((signs < 0).sum()), features=signs.numel(),
    )  # fmt: skip


def _seed(params: Params) -> int:
    """A seed for this example: jobs of one seed draw different points. The radius is no part of it, so that the points
    of two radii correspond."""
    text = f"{params.seed} {params.split} {params.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


# --- plot -------------------------------------------------------------------------------------------------------------

#: Traces in one panel, and networks with panels of their own; more cannot be told apart.
_TRACES, _NETWORKS = 7, 4
_LABELS = {"interval": "interval", "linear": "linear", "bab": "branch and bound", "sampled": "sampled (from below)"}


def plot(records: list[Record]) -> Figure:
    """For each network: bounds against radius, means over the jobs, with the gap between the best bound and the floor
    shaded; the bound against the parts of branch and bound; and the share of features proved monotone."""
    by_network: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.result is not None:
            by_network[record.name("network")].append(record)
    panels: list[Panel] = []
    for name, of in list(by_network.items())[:_NETWORKS]:
        panels += [_against_radius(name, of), _against_parts(of), _monotone(of)]
    missing = sum(record.result is None for record in records)
    caption = f"{len(records):,} jobs"
    if missing:
        caption += f", {missing:,} of them without a result"
    if len(by_network) > _NETWORKS:
        caption += f"; the first {_NETWORKS} of {len(by_network):,} networks"
    caption += ". The local Lipschitz constant lies in the shade; lines are means over the jobs of a radius."
    return Figure(
        title="Local Lipschitz constants, l_inf", caption=caption, panels=panels or [Panel(marks=[])], columns=3
    )


def _by_radius(records: list[Record]) -> dict[float, list[Any]]:
    found: defaultdict[float, list[Any]] = defaultdict(list)
    for record in records:
        found[float(record.params["radius"])].append(record.result)
    return {radius: found[radius] for radius in sorted(found)}


def _mean(results: list[Any], name: str) -> float | None:
    """The mean over results that have this bound, None where none has; where some have, only these are comparable."""
    values = [result[name] for result in results if result[name] is not None]
    return float(sum(values) / len(values)) if len(values) == len(results) else None


def _against_radius(name: str, records: list[Record]) -> Panel:
    groups = _by_radius(records)
    radii: list[Any] = list(groups)
    means: dict[str, list[Any]] = {
        bound: [_mean(results, bound) for results in groups.values()] for bound in (*_LABELS, "bound")
    }
    marks: list[Any] = []
    for bound in ("interval", "linear", "bab"):
        if any(value is not None for value in means[bound]):
            marks.append(Line(x=radii, y=means[bound], label=_LABELS[bound], points=True, dashed=bound == "interval"))
    floor = means["sampled"]
    marks.append(Line(x=radii, y=floor, label=_LABELS["sampled"], points=True, low=floor, high=means["bound"]))
    wide = any(high > 20 * low > 0 for high, low in zip(means["interval"], floor, strict=True))
    y = Axis(label="Lipschitz constant", scale="log") if wide else Axis(label="Lipschitz constant", low=0)
    return Panel(title=networks.short(name), x=Axis(label="l_inf radius", low=0), y=y, marks=marks)


def _against_parts(records: list[Record]) -> Panel:
    marks: list[Any] = []
    # The longest searches, for those of a few parts show nothing.
    longest = sorted(records, key=lambda record: -len((record.result or {})["trace_parts"]))[:_TRACES]
    for record in longest:
        result: Any = record.result
        if result["trace_parts"]:
            label = f"{record.params['index']}, radius {float(record.params['radius']):g}"
            marks.append(Line(x=result["trace_parts"], y=result["trace_bounds"], label=label))
    title = "Branch and bound, by example"
    x, y = Axis(label="parts bounded", scale="log"), Axis(label="bound")
    return Panel(title=title, x=x, y=y, marks=marks)


def _monotone(records: list[Record]) -> Panel:
    groups = _by_radius(records)
    x: list[Any] = [f"{radius:g}" for radius in groups]
    marks: list[Any] = []
    for name in ("increasing", "decreasing"):
        shares: list[Any] = []
        for results in groups.values():
            shares.append(sum(result[name] for result in results) / sum(result["features"] for result in results))
        marks.append(Bars(x=x, y=shares, label=name, stacked=True))
    y = Axis(label="share of features", low=0, high=1, percent=True)
    return Panel(title="Proved monotone", x=Axis(label="l_inf radius", scale="category"), y=y, marks=marks)
