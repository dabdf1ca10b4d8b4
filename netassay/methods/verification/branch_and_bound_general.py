"""Whether a class is kept around an image, by branch and bound over the nonlinearities of any network.

    verified   <=  min over x in B and j != y of  f_y(x) - f_j(x)  >  0,    B = {x : ||x - x_i||_inf <= r, 0 <= x <= 1}
    falsified  <=  an x in B with  f_y(x) <= f_j(x)  for some j != y

x_i, y: image i (or other example) of a split of a dataset and its label; f: the network's outputs; r: `radius`, in
units of the input; without `clip` the box is not cut with [0, 1]. The network may hold ReLU, any elementwise function
(tanh, sigmoid, sin, GELU ...) and products of values. Stages:

1. attack: projected gradient descent from `restarts` starts (Madry et al. 2018);
2. branch and bound (`netassay.numerics.branch_and_bound.nonlinear`): the interval of a neuron that a nonlinear
   operation reads is split at a point; over each half its lines are narrower, and a backward pass with optimised lines
   and a multiplier of each split bounds the margin. `budget` parts are bounded, those of least bounds first; the first
   ones are the whole box, one for each class j. The points where bounds are least are tried as counterexamples.

`heuristic` says which neuron is split: "bbps" estimates the bounds of both halves with all other lines kept, "babsr"
takes what its lines cost at most, "width" the widest interval. `points` says where: "optimised", where the lines of
both halves leave the least area (from a table), or "midpoint"; ReLUs are split at 0.

What "verified" means in floating point: bounds are float64 with their own rounding taken off, on the box rounded
outward, so they hold in real arithmetic; of float32 evaluations they say nothing, for of a runtime's tanh or GELU
nothing is known. "falsified": the counterexample consists of float32 numbers, lies in B, and onnxruntime gives another
class at least the label's output there; `arithmetic` says whether that is proven in real arithmetic too. "unknown" is
an answer about these bounds and this budget, not about the network.

`lower` bounds the least margin over B from below as long as it is at most 0; above 0 it only says so, for parts that
are decided are not bounded further. `trace` is that bound against the parts; it never falls, since a part's bound is
no less than its parent's.

Cost: a part costs `steps` backward passes of one row, some ms for a network of 64-20-20-10 and 3 to 10 times that where
the batch is small: what functions' lines cost is the same for few intervals as for some thousands.

Reference: Shi, Jin, Kolter, Jana, Hsieh, Zhang. Neural network verification with branch-and-bound for general
nonlinearities. 2024.
Reference: Wang, Zhang, Xu, Lin, Jana, Hsieh, Kolter. Beta-CROWN: efficient bound propagation with per-neuron split
constraints for neural network robustness verification. 2021.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from netassay import data, networks
from netassay.fields import Array, Count, DatasetRef, Index, NetworkRef, Radius, Seed
from netassay.figure import Axis, Figure, Line, Panel
from netassay.heavy import np, torch
from netassay.method import Contract, Needs, NotApplicable
from netassay.networks import images
from netassay.networks.graph import Activation, Graph, Product, Relu
from netassay.numerics import attacks, replay
from netassay.numerics.bounds import interval
from netassay.numerics.bounds.linear import operations
from netassay.numerics.bounds.regions import Ball, Box
from netassay.numerics.branch_and_bound import nonlinear
from netassay.numerics.branch_and_bound.inputs import Query

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record

VERSION = 1
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05


class Params(Contract):
    network: NetworkRef
    dataset: DatasetRef = "digits"
    split: Literal["test", "train", "all"] = "test"
    index: Index
    """which image of the split"""
    radius: Radius
    clip: bool = True
    """cut the box with [0, 1], the range of the data"""
    heuristic: Literal["bbps", "babsr", "width"] = "bbps"
    """which neuron is split"""
    points: Literal["optimised", "midpoint"] = "optimised"
    """where it is split"""
    budget: Annotated[Count, Field(le=100_000_000)] = 2_000
    """parts that may be bounded, the whole box for each class included"""
    steps: Annotated[Index, Field(le=1_000)] = 20
    """steps of Adam for the bound of a part; 0: lines of the smallest area, no multipliers"""
    restarts: Annotated[Count, Field(le=1_000)] = 100
    """starts of the attack before branch and bound: the image, the others at random in the box"""
    seed: Seed = 0

    @model_validator(mode="after")
    def _index_in_data(self) -> Params:
        # Where stored params are read, the artifact may be elsewhere: then the job itself checks, when it runs.
        if data.is_known(self.dataset) or not data.is_reference(self.dataset):
            data.check_index(self.dataset, self.split, self.index)
        return self


class Result(Contract):
    verdict: Literal["verified", "falsified", "unknown"]
    by: Literal["attack", "root", "splitting"] | None
    """what decided: "root" where the bounds of the whole box did; None for unknown"""
    arithmetic: Literal["real", "real and float32", "float32"] | None
    """what the verdict is proven for; None for unknown"""
    label: int
    lower: float
    """lower bound of the margin over the box; above 0 its sign only. -inf where none was computed"""
    root: float
    """the same, of the whole box"""
    parts: int
    """the size of the trees: parts of the box that were bounded, for all classes together"""
    left: int
    """parts that were open at the end"""
    depth: int
    """splits above the smallest part"""
    trace: Array | None
    """(parts, lower bound of the margin) as the search went: (steps, 2), float64; None where there was none"""
    counterexample: Array | None
    """input of the network, of its shape, float32; None unless falsified"""


#: Of a 64-20-20-10 network, 2,000 parts that stay open: 10 to 25 ms each on a loaded core.
NEEDS = Needs(seconds=30.0, memory=768 * 2**20, libraries=("numpy", "torch", "onnx", "onnxruntime"))

EXAMPLE = {
    "jobs": [
        {
            "method": "verification.branch_and_bound_general",
            "params": {
                "network": {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [20, 20]}, "epochs": 20},
                "dataset": "digits",
                "budget": 100,
                "restarts": 10,
            },
            "grid": {"radius": [0.06, 0.08], "index": [2, 4], "heuristic": ["bbps", "width"]},
        }
    ]
}

#: Gradient steps of each start of the attack.
_STEPS = 40


def run(params: Params) -> Result:
    """Raises InvalidInput where data and network do not fit, NotApplicable where there is nothing to split or the
    network has an operation without a bound.
    """
    graph = networks.load(params.network)
    try:
        kinds = {type(operation) for operation in operations(graph)}
    except NotImplementedError as error:
        raise NotApplicable("the network has an operation without bounds", str(error)) from None
    if not kinds & {Relu, Activation, Product}:
        raise NotApplicable("the network is affine, so there is nothing to split")
    replay.load(params.network)
    x, label = images.labelled(graph, params.dataset, params.split, params.index, params.clip)
    with torch.no_grad():
        return _decided(graph, params, x, label)


def _decided(graph: Graph, params: Params, x: Tensor, label: int) -> Result:
    low, high = (0.0, 1.0) if params.clip else (-math.inf, math.inf)
    ball = Ball("inf", x[None], torch.tensor([params.radius], dtype=torch.float64), low, high)
    found: dict[str, Any] = {}

    def judge(point: Tensor, conjunction: int = -1) -> bool:
        near = _inside(ball, point.reshape(x.shape))
        if near is None:
            return False
        outputs = replay.outputs(params.network, near.numpy())
        others = np.delete(outputs, label)
        if not bool(np.isfinite(outputs).all()) or outputs[label] > others.max():
            return False
        found["counterexample"] = near.float().numpy()
        found["arithmetic"] = "real and float32" if _holds_in_real(graph, near, label) else "float32"
        return True

    labels = torch.tensor([label])
    attack = attacks.pgd(graph, ball, labels, steps=_STEPS, restarts=params.restarts, seeds=[_seed(params)])
    if judge(x) or judge(attack.points[0]):
        return Result(
            verdict="falsified", by="attack", label=label, lower=-math.inf, root=-math.inf, parts=0, left=0, depth=0,
            trace=None, **found,
        )  # fmt: skip
    lower, upper = (end[0].flatten() for end in ball.box())
    outputs = math.prod(graph.output_shape)
    one = torch.eye(outputs, dtype=torch.float64)
    rows = (one[label] - one)[torch.arange(outputs) != label]
    query = Query(lower, upper, rows, torch.zeros(outputs - 1, dtype=torch.float64), torch.arange(outputs - 1))
    options = nonlinear.Options(params.heuristic, params.points, params.steps)
    answer = nonlinear.search(graph, query, judge, params.budget, options=options)
    least = float(answer.margins.amin())
    verdict: Any = "falsified" if answer.found else "verified" if least > 0 else "unknown"
    by: Any = None if verdict == "unknown" else "splitting" if answer.deepest or answer.found else "root"
    arithmetic: Any = {"falsified": found.get("arithmetic"), "verified": "real"}.get(verdict)
    return Result(
        verdict=verdict, by=by, arithmetic=arithmetic, label=label, lower=least,
        root=answer.trace[0][1] if answer.trace else -math.inf,
        parts=answer.parts, left=answer.open, depth=answer.deepest,
        trace=np.array(answer.trace, dtype=np.float64) if answer.trace else None,
        counterexample=found.get("counterexample"),
    )  # fmt: skip


def _inside(ball: Ball, point: Tensor) -> Tensor | None:
    """The float32 point of the box next to `point`, as float64; None where there is none."""
    lower, upper = (end[0] for end in ball.box())
    low, high = lower.float(), upper.float()
    low = torch.where(low.double() < lower, torch.nextafter(low, torch.full_like(low, math.inf)), low)
    high = torch.where(high.double() > upper, torch.nextafter(high, torch.full_like(high, -math.inf)), high)
    near = torch.minimum(torch.maximum(point.float(), low), high).double()
    return near if bool(attacks.contains(ball, near[None])[0]) else None


def _holds_in_real(graph: Graph, point: Tensor, label: int) -> bool:
    """Whether another class is proven to have at least the label's output at the point, in real arithmetic."""
    output = interval.propagate(graph, Box(point[None], point[None]))[graph.output]
    low, high = output.lower.flatten(), output.upper.flatten()
    others = torch.arange(len(low)) != label
    return bool((low[others] >= high[label]).any())


def _seed(params: Params) -> int:
    """A seed for this image: jobs of one seed draw different starts."""
    text = f"{params.seed} {params.split} {params.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


# --- plot -------------------------------------------------------------------------------------------------------------


def plot(records: list[Record]) -> Figure:
    """Instances verified within a number of parts, and within a time, for each heuristic; and of the instance that took
    most parts, the lower bound against the parts.
    """
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.result is not None:
            groups[f"{record.params.get('heuristic', 'bbps')}, {record.params.get('points', 'optimised')}"].append(
                record
            )
    panels = []
    for label, scale, of in (
        ("parts", "log", lambda record: _result(record)["parts"]),
        ("seconds", "log", lambda record: max(record.seconds, 1e-3)),
    ):
        marks: list[Any] = []
        for name, group in sorted(groups.items()):
            costs = sorted(of(record) for record in group if _result(record)["verdict"] == "verified")
            if costs:
                marks.append(Line(x=costs, y=list(range(1, len(costs) + 1)), label=name, points=True))
        panels.append(
            Panel(title="Verified", x=Axis(label=label, scale=scale), y=Axis(label="instances", low=0), marks=marks)  # type: ignore[arg-type]
        )
    panels.append(_bounds(groups))
    verdicts = [_result(record)["verdict"] for group in groups.values() for record in group]
    counts = ", ".join(f"{verdicts.count(verdict):,} {verdict}" for verdict in ("verified", "falsified", "unknown"))
    caption = f"{len(records):,} jobs: {counts}."
    return Figure(title="Branch and bound for general nonlinearities", caption=caption, panels=panels, columns=3)


def _result(record: Record) -> dict[str, Any]:
    assert record.result is not None
    return record.result


def _bounds(groups: dict[str, list[Record]]) -> Panel:
    """The lower bound against parts, of the instance that took most parts under any heuristic, under each."""

    def instance(record: Record) -> tuple[Any, ...]:
        return tuple(str(record.params.get(name)) for name in ("network", "dataset", "split", "index", "radius"))

    known = [r for group in groups.values() for r in group if _result(r)["trace"] is not None]
    marks: list[Any] = []
    title = "Lower bound"
    if known:
        hardest = max(known, key=lambda record: _result(record)["parts"])
        title += f", image {hardest.params['index']}, radius {hardest.params['radius']:g}"
        for name, group in sorted(groups.items()):
            for record in group:
                if instance(record) == instance(hardest) and record in known:
                    trace = np.asarray(record.array("trace"))
                    seen = [(int(parts), min(float(bound), 0.0)) for parts, bound in trace if math.isfinite(bound)]
                    marks.append(Line(x=[p for p, _ in seen], y=[b for _, b in seen], label=name))
                    break
    return Panel(title=title, x=Axis(label="parts", scale="log"), y=Axis(label="margin at least", high=0), marks=marks)
