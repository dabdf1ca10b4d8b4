"""Whether some input of a box has an unsafe output: a counterexample, a proof that there is none, or neither.

    sat    <=  an x in some box B and a conjunction of B with  c_k.f(x) <= b_k  for all its constraints k
    unsat  <=  for every box B and conjunction of B there is a k with  min over x in B of c_k.f(x)  >  b_k

f: the network's outputs, flattened; B = {x : lower <= x <= upper}, the conjunctions, c_k and b_k: of a VNN-LIB 1
property (`netassay.vnnlib`), whose variables X_i and Y_j number inputs and outputs in row-major order, whatever their
shape in the file. Stages, each for the (box, conjunction) pairs that the ones before left open:

1. ibp: interval bounds (Gowal et al. 2018), with the last layer folded into the constraints;
2. attack: `samples` points of the box and its corners, then `steps` of projected gradient descent from the best
   `restarts` of them (Madry et al. 2018), for each conjunction by itself;
3. crown: backward linear bounds (Zhang et al. 2018), every layer bounded backward; `crown_ibp`: between boxes;
4. attack again, from the corners where the linear bounds of stage 3 are least;
5. splitting: branch and bound over the inputs (`netassay.numerics.branch_and_bound.inputs`), where these are at most
   `INPUTS`, else over what single neurons do (`activations` where all are ReLUs, else `nonlinear`, beside it): parts of
   the box are bounded and halved until all are refuted, one holds a counterexample, or `budget` is used up.

The margin of a pair is max over k of (a lower bound of min c_k.f) - b_k, in units of the property: above 0 it is
refuted. (Of a conjunction that was split, in units of its first constraint.) Of a box that was split it is the least
over its parts, a bound as long as it is at most 0; above 0 it only says that all are refuted, for what clipping cuts
off is no nearer known.

What "unsat" means in floating point: the bounds are computed in float64 with an a-priori bound on their own rounding
taken off, on the box rounded outward: they hold in real arithmetic. Those of stages 1 and 3 hold, as for
`verification.certify`, also for every float32 evaluation of the network, in any order of summation, at every float32
input of the box, whose worst-case error is taken off too (`netassay.numerics.bounds.rounding` says what is not
covered); where such an evaluation might overflow, they claim nothing. Splitting proves real arithmetic only, and so do
all stages for networks with functions such as tanh, or with sums too long for a useful error bound: near a knife's edge
a float32 evaluation may then still be unsafe. What "sat" means: the counterexample consists of float32
numbers, lies in the box of the decimals as they are written, and the outputs that onnxruntime computes of it from the
original file meet the constraints, both in exact arithmetic, without any tolerance. `arithmetic` says whether real
arithmetic agrees; where it does not, the property may hold in one and fail in the other.

"unknown" is an answer about these bounds, this attack and this many parts, not about the network. A box that holds no
float32 point (an input fixed to 0.1) cannot end as sat. Verdicts do not depend on which jobs are computed together;
margins agree to 1e-9 relative to the largest intermediate value of the network over the box.

Cost: for each box ibp one product with |W| a layer, and crown O(sum over layers of n^3) for width n; for each pair the
attack, samples + 2 steps restarts evaluations. A part of a split box costs some 35 us for a network of 5-50x6-5, so
that the usual budget is used up within the minute that a job has where nobody says otherwise. What splits activations
is charged by its products: the usual budget is some 100 s of these, for which a job needs a limit of time. Jobs with a
larger budget are computed alone. A file is read as a graph, and the graph held to onnxruntime on a few random inputs
(`netassay.networks.agreement`), before anything is computed with it.

Reference: Bak, Liu, Johnson. The second international verification of neural networks competition (VNN-COMP 2021):
summary and results. 2021.
Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018.
Reference: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks. 2018.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from netassay import beside, networks, vnnlib
from netassay.fields import AnyNetworkRef, Array, Count, Index, PropertyRef, Seed
from netassay.figure import Axis, Bars, Figure, Panel, Points
from netassay.heavy import np, torch
from netassay.method import Contract, Failure, InvalidInput, MethodError, Needs, NotApplicable
from netassay.networks import agreement, onnx_file
from netassay.networks.graph import Activation, Graph, Product
from netassay.numerics import attacks, replay
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import operations, weights
from netassay.numerics.bounds.regions import Box
from netassay.numerics.branch_and_bound import activations, inputs, nonlinear
from netassay.vnnlib import Case, Conjunction

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record

VERSION = 3
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05

Verdict = Literal["sat", "unsat", "unknown"]


class Params(Contract):
    network: AnyNetworkRef
    property: PropertyRef
    bounds: Literal["crown", "crown_ibp", "ibp"] = "crown"
    """the tightest bounds that are tried on a whole box; parts of it are bounded by crown"""
    samples: Annotated[Index, Field(le=1_000_000)] = 1000
    """points of each box evaluated before the descent"""
    restarts: Annotated[Count, Field(le=1_000)] = 8
    """of them, how many the descent starts at"""
    steps: Annotated[Index, Field(le=10_000)] = 30
    """gradient steps of each start"""
    budget: Annotated[Index, Field(le=1_000_000_000)] = 1_000_000
    """parts of its boxes that may be bounded in branch and bound, counted in those of a small network; 0: none"""
    seed: Seed = 0


class Result(Contract):
    verdict: Verdict
    by: Literal["ibp", "attack", "crown", "splitting"] | None
    """the stage that decided, the last one of several; None for unknown"""
    arithmetic: Literal["real and float32", "float32", "real"] | None
    """what the verdict is proven for: float32 is that of onnxruntime for sat, any for unsat; None for unknown"""
    boxes: int
    pairs: int
    """how many pairs of a box and a conjunction the property consists of"""
    refuted: int
    """how many of them the bounds refute"""
    margin: float
    """the least of `margins`; above 0 exactly for unsat"""
    margins: Array
    """best lower bound of each pair's violation, in the order of the property: (pairs,), float64"""
    nodes: int
    """parts of boxes that were bounded in branch and bound"""
    left: int
    """parts that were open when the search ended"""
    depth: int
    """halvings above the smallest part"""
    trace: Array | None
    """how the least margin of the last box that was split rose with the parts bounded: (steps, 2), float64"""
    violation: float | None
    """the least violation (at most 0: unsafe) onnxruntime met in the attack; None where no point was tried"""
    counterexample: Array | None
    """input of the network, of its shape, float32; None unless sat"""
    output: Array | None
    """what onnxruntime makes of it, flattened"""


#: Inputs of a network whose boxes are split. Halving one of them cuts a volume in two, so what a bound gains by it
#: falls with their number; networks of control have up to a dozen or two, images hundreds and more.
INPUTS = 20
#: Measured on one core, in groups of up to 32: ACAS Xu (5-50x6-5) 0.03 s a job; 784-256x2-10 0.5 s, x4 0.6, x6 0.8.
NEEDS = Needs(seconds=0.2, memory=2**30, libraries=("numpy", "torch", "onnx", "onnxruntime"), group=32)


def needs(params: Params) -> Needs:
    """The default attack is about half of the measured seconds; a longer one comes on top."""
    usual = {name: about.default for name, about in Params.model_fields.items()}
    group = NEEDS.group if params.budget <= usual["budget"] else 1
    evaluations = params.samples + 2 * params.steps * params.restarts
    share = evaluations / (usual["samples"] + 2 * usual["steps"] * usual["restarts"])
    return replace(NEEDS, seconds=NEEDS.seconds * max(1.0, (1 + share) / 2), group=group)


def _example_property(petal: float) -> dict[str, str]:
    """A flower of iris (sepal and petal lengths and widths, scaled to [0, 1]) with petals up to `petal` and sepals of
    medium size is never taken for the third species.
    """
    ends = [(0.2, 0.5), (0.2, 0.5), (0, petal), (0, petal)]
    lines = [f"; petals up to {petal}"]
    lines += [f"(declare-const {name} Real)" for name in ("X_0", "X_1", "X_2", "X_3", "Y_0", "Y_1", "Y_2")]
    lines += [f"(assert (and (>= X_{i} {low}) (<= X_{i} {high})))" for i, (low, high) in enumerate(ends)]
    lines += ["(assert (and (<= Y_0 Y_2) (<= Y_1 Y_2)))"]
    return {"vnnlib": "\n".join(lines)}


EXAMPLE = {
    "jobs": [
        {
            "method": "verification.verify",
            "params": {
                "network": {"dataset": "iris", "architecture": {"kind": "mlp", "hidden": [16, 16]}, "epochs": 100},
            },
            "grid": {"property": [_example_property(petal) for petal in (0.1, 0.2, 0.3)]},
        }
    ]
}

#: Boxes that are bounded together, so that the memory of a property of thousands of boxes stays that of so many.
_BOXES = 256
#: Rows of constraints that one box may carry at once; a box with more is bounded in several pieces.
_ROWS = 512
#: Boxes x constraints x width of the network in one call: 128 MiB in float64.
_COEFFICIENTS = 2**24
#: The smallest number above 0: a margin that is positive is told as no less.
_LEAST = 5e-324
#: Corners of the linear bounds that an attack on one conjunction starts at.
_CORNERS = 8


def run(params: Params) -> Result:
    """Raises NotApplicable for operators and properties that no bound here knows, naming them; InvalidInput where
    network and property do not fit.
    """
    outcome = _outcomes([params])[0]
    if isinstance(outcome, MethodError):
        raise outcome
    return outcome


def run_many(params: list[Params]) -> list[Result | Failure]:
    """All of one network; properties, bounds and attacks may differ."""
    return [Failure.of(outcome) if isinstance(outcome, MethodError) else outcome for outcome in _outcomes(params)]


@dataclass(eq=False)
class _Pair:
    """A box and one conjunction of it. number: its place in the job. margin: the best bound so far, in units of the
    property; the pair is refuted where it is above 0.
    """

    item: _Item
    number: int
    case: Case
    conjunction: Conjunction
    margin: float = -math.inf

    @property
    def open(self) -> bool:
        return self.margin <= 0 and self.item.verdict == "unknown"


@dataclass(eq=False)
class _Item:
    """One job on its way through the stages."""

    params: Params
    cases: tuple[Case, ...]
    pairs: list[_Pair] = field(default_factory=list)
    verdict: Verdict = "unknown"
    by: Any = None
    arithmetic: Any = None
    violation: float | None = None
    counterexample: Any = None
    output: Any = None
    nodes: int = 0
    spent: int = 0
    left: int = 0
    depth: int = 0
    trace: Sequence[tuple[int, float]] = ()

    def result(self) -> Result:
        margins = np.array([pair.margin for pair in self.pairs])
        return Result(
            verdict=self.verdict,
            by=self.by,
            arithmetic=self.arithmetic,
            boxes=len(self.cases),
            pairs=len(self.pairs),
            refuted=int((margins > 0).sum()),
            margin=float(margins.min()),
            margins=margins,
            nodes=self.nodes,
            left=self.left,
            depth=self.depth,
            trace=np.array(self.trace, dtype=np.float64) if self.trace else None,
            violation=self.violation,
            counterexample=self.counterexample,
            output=self.output,
        )


def _outcomes(params: Sequence[Params]) -> list[Result | MethodError]:
    try:
        graph = networks.load(params[0].network)
        operations(graph)
    except (onnx_file.UnsupportedOperator, onnx_file.UnsupportedShape) as error:
        return [NotApplicable(error.what, error.why)] * len(params)
    except onnx_file.NetworkFileError as error:
        return [error] * len(params)
    except NotImplementedError as error:
        return [NotApplicable("the network has an operation without bounds", str(error))] * len(params)
    try:
        replay.load(params[0].network)
        _agreeing(networks.resolve(params[0].network))
    except InvalidInput as error:
        return [error] * len(params)
    outcomes: list[Any] = [_read(graph, wanted) for wanted in params]
    with torch.no_grad():
        _decide(graph, [item for item in outcomes if isinstance(item, _Item)])
    return [outcome.result() if isinstance(outcome, _Item) else outcome for outcome in outcomes]


@functools.lru_cache(maxsize=64)
def _agreeing(reference: str) -> None:
    """Raise InvalidInput where the graph of a network and onnxruntime on its file are two functions."""
    difference = agreement.agrees(networks.load(reference), networks.content(reference))
    # NaN: no sample lies where the network has a value, so nothing is known against it.
    if difference > agreement.LARGEST_DIFFERENCE:
        raise InvalidInput(
            "the network that was read from the file is not what onnxruntime computes",
            f"on random inputs their outputs differ by {difference:.2g} of the largest",
            "exporting it again; if that does not help it is a fault of netassay's reader: please report the file",
        )


def _evaluated(graph: Graph) -> torch.dtype | None:
    """float32, where the error of its evaluations has a bound; else bounds are about real arithmetic alone."""
    if not rounding.is_covered(graph):
        return None
    try:
        rounding.gamma(
            max((w.terms for w in weights(graph, torch.float64).values()), default=1) + rounding.ROUNDINGS,
            torch.float32,
        )
    except rounding.TooManyTerms:
        return None
    return torch.float32


def _read(graph: Graph, params: Params) -> _Item | MethodError:
    """The boxes and conjunctions of a job, or what is wrong with it."""
    try:
        wanted = vnnlib.load(params.property)
    except MethodError as error:
        return error
    inputs, outputs = math.prod(graph.input_shape), math.prod(graph.output_shape)
    for what, has, asks in (("inputs", inputs, wanted.inputs), ("outputs", outputs, wanted.outputs)):
        if has != asks:
            return InvalidInput(
                f"the property is about {asks} {what}, the network has {has}",
                f"its {what[:-1]} has the shape {graph.input_shape if what == 'inputs' else graph.output_shape}",
                "the network that the property was written for",
            )
    item = _Item(params, wanted.cases)
    pairs = [(case, conjunction) for case in wanted.cases for conjunction in case.unsafe]
    item.pairs = [_Pair(item, number, *pair) for number, pair in enumerate(pairs)]
    return item


def _decide(graph: Graph, items: Sequence[_Item]) -> None:
    _bounded(graph, _pieces(items), "ibp")
    _attacked(graph, items, None)
    for method in ("crown", "crown_ibp"):
        _bounded(graph, _pieces([item for item in items if item.params.bounds == method]), method)
    _attacked(graph, [item for item in items if item.params.bounds != "ibp"], _corners)
    _searched(graph, items)


# --- bounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """A box with the constraints of some of its open conjunctions, for the bounds.

    lower, upper: (1, *input), float64, rounded outward. rows: (rows, outputs), the c of each constraint, times a power
    of two that brings its largest entry into [1, 2), as the error bounds of `rounding` ask for; bound: (rows,), b
    likewise scaled, rounded up; unit: (rows,), the scale. That c is rounded to float64 is one of the roundings which
    `rounding.backward` has to spare: it allows for 24 and more of each number.
    owners: (rows,), the place in `pairs` of each row's pair.
    """

    pairs: list[_Pair]
    lower: Tensor
    upper: Tensor
    rows: Tensor
    bound: Tensor
    unit: Tensor
    owners: list[int]


def _pieces(items: Sequence[_Item]) -> list[_Piece]:
    pieces = []
    for item in items:
        by_case: defaultdict[int, list[_Pair]] = defaultdict(list)
        for pair in item.pairs:
            if pair.open:
                by_case[id(pair.case)].append(pair)
        for pairs in by_case.values():
            pieces += [_piece(part) for part in _parts(pairs)]
    return pieces


def _parts(pairs: Sequence[_Pair]) -> Iterator[list[_Pair]]:
    """Pairs of one box in runs of at most `_ROWS` constraints."""
    part: list[_Pair] = []
    rows = 0
    for pair in pairs:
        if part and rows + len(pair.conjunction) > _ROWS:
            yield part
            part, rows = [], 0
        part.append(pair)
        rows += len(pair.conjunction)
    if part:
        yield part


def _piece(pairs: list[_Pair]) -> _Piece:
    constraints = [(place, one) for place, pair in enumerate(pairs) for one in pair.conjunction]
    outputs = 1 + max(place for _, one in constraints for place, _ in one.coefficients)
    rows = np.zeros((len(constraints), outputs))
    bound, unit = np.zeros(len(constraints)), np.zeros(len(constraints))
    for row, (_, one) in enumerate(constraints):
        largest = max(abs(c) for _, c in one.coefficients)
        scale = Fraction(2) ** -math.frexp(float(largest))[1] * 2
        for place, c in one.coefficients:
            rows[row, place] = float(c * scale)
        bound[row], unit[row] = vnnlib.above(one.bound * scale), float(scale)
    lower, upper = (torch.from_numpy(side)[None] for side in pairs[0].case.outward())
    return _Piece(
        pairs,
        lower,
        upper,
        rows=torch.from_numpy(rows),
        bound=torch.from_numpy(bound),
        unit=torch.from_numpy(unit),
        owners=[place for place, _ in constraints],
    )


def _box(graph: Graph, pieces: Sequence[_Piece]) -> Box:
    lower, upper = (torch.cat([getattr(piece, side) for piece in pieces]) for side in ("lower", "upper"))
    return Box(lower.reshape(-1, *graph.input_shape), upper.reshape(-1, *graph.input_shape))


def _rows(graph: Graph, pieces: Sequence[_Piece]) -> Tensor:
    """(pieces, rows, outputs); a piece with fewer rows than another repeats its first."""
    most = max(len(piece.rows) for piece in pieces)
    found = torch.zeros(len(pieces), most, math.prod(graph.output_shape), dtype=torch.float64)
    for place, piece in enumerate(pieces):
        count, outputs = piece.rows.shape
        found[place, :count, :outputs] = piece.rows
        found[place, count:, :outputs] = piece.rows[0]
    return found


@dataclass(frozen=True, eq=False)
class _Found:
    """What bounds say of pieces. least: (pieces, rows), lower bounds of c.f - b, scaled. near: (pieces,), bool; so near
    to a decision that rounding, and with it the grouping, might matter. linear: coefficients of crown.
    """

    least: Tensor
    near: Tensor
    linear: Tensor | None = None


def _bounded(graph: Graph, pieces: list[_Piece], method: str) -> None:
    """Bound the open pairs and end the jobs of which none is left."""
    bound = _bound_ibp if method == "ibp" else _bound_crown
    for some in _runs(graph, pieces):
        found = bound(graph, some, method)
        for place, piece in enumerate(some):
            again = len(some) > 1 and bool(found.near[place])
            _note(piece, bound(graph, [piece], method).least[0] if again else found.least[place])
    for item in {id(pair.item): pair.item for piece in pieces for pair in piece.pairs}.values():
        if item.verdict == "unknown" and all(pair.margin > 0 for pair in item.pairs):
            item.verdict, item.by = "unsat", "ibp" if method == "ibp" else "crown"
            item.arithmetic = "real" if _evaluated(graph) is None else "real and float32"


def _runs(graph: Graph, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that are bounded together: boxes, and numbers in their linear bounds, within what memory holds."""
    widest = max(
        math.prod(shape) for shape in (graph.input_shape, *(operation.shape for operation in operations(graph)))
    )
    run: list[_Piece] = []
    most = 0
    for piece in pieces:
        most = max(most, len(piece.rows))
        if run and (len(run) == _BOXES or (len(run) + 1) * most * widest > _COEFFICIENTS):
            yield run
            run, most = [], len(piece.rows)
        run.append(piece)
    if run:
        yield run


def _note(piece: _Piece, least: Tensor) -> None:
    for place, value, unit in zip(piece.owners, least.tolist(), piece.unit.tolist(), strict=False):
        pair = piece.pairs[place]
        pair.margin = max(pair.margin, _in_units(value, unit))


def _in_units(scaled: float, unit: float) -> float:
    """A margin in units of the property, with the sign that it has where nothing underflows."""
    margin = scaled / unit
    return min(max(margin, _LEAST), sys.float_info.max) if scaled > 0 else margin


def _bound_ibp(graph: Graph, pieces: Sequence[_Piece], method: str) -> _Found:
    region, rows, evaluated = _box(graph, pieces), _rows(graph, pieces), _evaluated(graph)
    boxes = interval.propagate(graph, region, evaluated)
    sound, doubtful = _sound(graph, boxes)
    least = backward.box_margins(graph, boxes, rows, evaluated)
    noise = rounding.backward(graph, boxes)[graph.output].flatten(1).amax(1)
    return _found(pieces, rows, least, sound, doubtful, backward.NOISE * len(graph.operations) * noise)


def _bound_crown(graph: Graph, pieces: Sequence[_Piece], method: str) -> _Found:
    region, rows, evaluated = _box(graph, pieces), _rows(graph, pieces), _evaluated(graph)
    boxes = interval.propagate(graph, region, evaluated)
    sound, doubtful = _sound(graph, boxes)
    intermediates: backward.Intermediates = "backward" if method == "crown" else "interval"
    # Boxes of thousands of constraints fill the memory a few at a time.
    block = max(1, min(backward.BLOCK, backward.BLOCK * 64 // rows.shape[1]))
    bound = backward.lower(graph, region, rows, intermediates=intermediates, evaluated=evaluated, block=block)
    doubtful = doubtful | bound.delicate
    return _found(pieces, rows, bound.lower, sound, doubtful, bound.noise, bound.a)


def _found(
    pieces: Sequence[_Piece],
    rows: Tensor,
    least: Tensor,
    sound: Tensor,
    doubtful: Tensor,
    noise: Tensor,
    linear: Tensor | None = None,
) -> _Found:
    """Lower bounds of c.f turned into those of c.f - b."""
    bound = torch.stack([torch.cat([p.bound, p.bound[:1].expand(rows.shape[1] - len(p.bound))]) for p in pieces])
    # One rounding of a difference does not change its sign.
    violation = torch.where(sound[:, None] & torch.isfinite(least), least - bound, -torch.inf)
    band = noise[:, None] * rows.abs().sum(2).clamp(min=1)
    return _Found(violation, doubtful | (violation.abs() <= band).any(1), linear)


#: Relative distance of a sum from float32's limit at which the last bit of it, and so the grouping, might decide: far
#: above float64 rounding. Such boxes are computed alone.
_NEAR_OVERFLOW = 1e-6


def _sound(graph: Graph, boxes: dict[str, Interval]) -> tuple[Tensor, Tensor]:
    """Whether no float32 evaluation overflows in a box, so that bounds speak of all of them; and whether that is so
    near that it has to be asked of the box alone. Both (batch,), bool. Of networks of which only real arithmetic is
    spoken, whether all bounds are finite.
    """
    ends = [torch.isfinite(box.lower) & torch.isfinite(box.upper) for box in boxes.values()]
    finite = torch.stack([end.flatten(1).all(1) for end in ends]).all(0)
    if _evaluated(graph) is None:
        return finite, torch.zeros_like(finite)
    load = rounding.load(graph, boxes, torch.float32)
    inputs = boxes[graph.input].magnitude().flatten(1).amax(1) <= torch.finfo(torch.float32).max
    return finite & inputs & (load < 1), (load - 1).abs() <= _NEAR_OVERFLOW


# --- branch and bound -------------------------------------------------------------------------------------------------


def _searched(graph: Graph, items: Sequence[_Item]) -> None:
    """Split the boxes of the open pairs, one job after the other: what is known of one has nothing to do with the
    others.
    """
    open_ = [item for item in items if item.verdict == "unknown" and item.params.budget]
    few = math.prod(graph.input_shape) <= INPUTS
    curved = any(isinstance(operation, Activation | Product) for operation in operations(graph))
    if not open_:
        return
    search = activations.search if not curved else nonlinear.search
    stack = inputs.layers(graph, torch.float64) if few else None
    for item in open_:
        for piece in _pieces([item]):
            if item.verdict != "unknown" or item.spent >= item.params.budget:
                break
            if not few and bool((torch.cat([piece.lower, piece.upper]).abs() > torch.finfo(torch.float32).max).any()):
                continue  # the search runs in float32
            _search(graph, stack, item, piece, None if few else search)
        if item.verdict == "unknown" and all(pair.margin > 0 for pair in item.pairs):
            item.verdict, item.by, item.arithmetic = "unsat", "splitting", "real"


#: What one part of input splitting stands for: products of the bounds of hidden values where activations are split (20
#: ps each, so that the usual budget is some 100 s), and the share of a part of other networks (30 ms each).
_PRODUCTS, _COST = 5e6, 1000


def _search(
    graph: Graph,
    stack: Sequence[inputs.Layer] | None,
    item: _Item,
    piece: _Piece,
    by_neurons: Callable[..., inputs.Answer] | None,
) -> None:
    """Split one box: its inputs, or what its neurons do, where a search for that is given."""
    lower, upper = _representable(graph, piece.pairs[0].case)

    def judge(point: Tensor, conjunction: int) -> bool:
        near = torch.minimum(torch.maximum(point.reshape(lower.shape), lower), upper)
        _judge(graph, piece.pairs[conjunction], near.float().double())
        return item.verdict == "sat"

    outputs = math.prod(graph.output_shape)
    rows = torch.zeros(len(piece.rows), outputs, dtype=torch.float64)
    rows[:, : piece.rows.shape[1]] = piece.rows
    query = inputs.Query(
        piece.lower[0].flatten(), piece.upper[0].flatten(), rows, piece.bound, torch.tensor(piece.owners)
    )
    budget = item.params.budget - item.spent
    if by_neurons is None:
        answer = inputs.search(graph, stack, query, judge, budget, _seed(piece.pairs[0]))
    else:
        by_products = {"products": budget * _PRODUCTS} if by_neurons is activations.search else {}
        answer = by_neurons(graph, query, judge, budget if by_products else max(1, budget // _COST), **by_products)
    item.spent += int(answer.products / _PRODUCTS) or answer.parts * (1 if by_neurons is None else _COST)
    units = torch.stack([piece.unit[piece.owners.index(number)] for number in range(len(piece.pairs))])
    item.nodes, item.left = item.nodes + answer.parts, item.left + answer.open
    item.trace = [(parts, bound / float(units[0])) for parts, bound in answer.trace]
    item.depth = max(item.depth, answer.deepest)
    if answer.found:
        item.by = "splitting"
    for pair, margin, unit in zip(piece.pairs, answer.margins.tolist(), units.tolist(), strict=True):
        pair.margin = max(pair.margin, _in_units(margin, unit))


# --- attack -----------------------------------------------------------------------------------------------------------


def _corners(graph: Graph, pairs: Sequence[_Pair], lower: Tensor, upper: Tensor) -> Tensor:
    """Where the linear bounds of the constraints of each pair are least over its box: (pairs, `_CORNERS`, *input).

    Bounded one by one: near 0 the sign of a coefficient may depend on the group. lower, upper: (pairs, *input).
    """
    found: list[Tensor] = []
    by_case: dict[tuple[int, int], list[_Pair]] = {}
    for pair in pairs:
        by_case.setdefault((id(pair.item), id(pair.case)), []).append(pair)
    place = 0
    for of_box in by_case.values():
        for part in _parts(of_box):
            piece = _piece(part)
            linear = _bound_crown(graph, [piece], part[0].item.params.bounds).linear
            assert linear is not None
            for number in range(len(part)):
                rows = [row for row, owner in enumerate(piece.owners) if owner == number][:_CORNERS]
                rows += rows[:1] * (_CORNERS - len(rows))
                found.append(torch.where(linear[0, rows] > 0, lower[place], upper[place]))
                place += 1
    return torch.stack(found)


def _attacked(graph: Graph, items: Sequence[_Item], corners: Callable[..., Tensor] | None) -> None:
    """Search a counterexample for the open pairs: among samples, or from the corners of the linear bounds."""
    groups: defaultdict[tuple[int, int, int], list[_Pair]] = defaultdict(list)
    for item in items:
        for pair in item.pairs:
            if pair.open:
                wanted = item.params
                groups[wanted.samples, wanted.restarts, wanted.steps].append(pair)
    for (samples, restarts, steps), pairs in groups.items():
        size = max(1, min(_BOXES, _COEFFICIENTS // (_CORNERS * math.prod(graph.input_shape))))
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            ends = [_representable(graph, pair.case) for pair in some]
            lower, upper = (torch.stack(side) for side in zip(*ends, strict=True))
            # Where an input has no float32 within its bounds, a box of floats stands in; its points are refused below.
            attack = attacks.meet(
                graph,
                Box(torch.minimum(lower, upper), torch.maximum(lower, upper)),
                _conjunctions(some),
                samples=0 if corners else samples,
                steps=steps,
                restarts=restarts,
                seeds=[_seed(pair) for pair in some],
                starts=corners(graph, some, lower, upper) if corners else None,
            )
            for pair, point, inside in zip(some, attack.points, attack.inside.tolist(), strict=True):
                if inside:
                    _judge(graph, pair, point)


def _representable(graph: Graph, case: Case) -> tuple[Tensor, Tensor]:
    """The box's float32 numbers, in the network's shape, as float64."""
    largest = float(torch.finfo(torch.float32).max)
    lower, upper = (
        torch.from_numpy(side.astype(np.float64)).reshape(graph.input_shape).clamp(-largest, largest)
        for side in case.inward()
    )
    return lower, upper


def _conjunctions(pairs: Sequence[_Pair]) -> attacks.Conjunctions:
    most = max(len(pair.conjunction) for pair in pairs)
    terms = max(len(one.coefficients) for pair in pairs for one in pair.conjunction)
    output, weight = np.zeros((len(pairs), most, terms), dtype=np.int64), np.zeros((len(pairs), most, terms))
    bound = np.full((len(pairs), most), np.inf)
    for place, pair in enumerate(pairs):
        for row, one in enumerate(pair.conjunction):
            bound[place, row] = float(one.bound)
            for term, (number, c) in enumerate(one.coefficients):
                output[place, row, term], weight[place, row, term] = number, float(c)
    return attacks.Conjunctions(*(torch.from_numpy(array) for array in (output, weight, bound)))


def _judge(graph: Graph, pair: _Pair, point: Tensor) -> None:
    """Note what onnxruntime makes of a candidate; the first counterexample of a job ends it."""
    item, x = pair.item, point.flatten().tolist()
    if item.verdict == "sat" or not pair.case.contains(x):
        return
    output = replay.outputs(item.params.network, point.numpy())
    if not bool(np.isfinite(output).all()):
        return
    violation = max(one.violation(output.tolist()) for one in pair.conjunction)
    item.violation = min(vnnlib.above(violation), math.inf if item.violation is None else item.violation)
    if violation <= 0:
        item.verdict, item.by = "sat", "attack"
        item.arithmetic = "real and float32" if _holds_in_real(graph, pair, point) else "float32"
        item.counterexample, item.output = point.float().numpy(), output


def _holds_in_real(graph: Graph, pair: _Pair, point: Tensor) -> bool:
    """Whether the constraints are proven at the point in real arithmetic, by intervals around the exact values."""
    output = interval.propagate(graph, Box(point[None], point[None]))[graph.output]
    ends = output.lower.flatten().tolist(), output.upper.flatten().tolist()
    if not all(map(math.isfinite, ends[0] + ends[1])):
        return False
    # The largest value of c.y over the box of outputs takes the upper end where c > 0, in exact arithmetic.
    largest = (
        sum((c * Fraction(ends[c > 0][place]) for place, c in one.coefficients), -one.bound) for one in pair.conjunction
    )
    return all(value <= 0 for value in largest)


def _seed(pair: _Pair) -> int:
    """A seed for this pair: pairs of one job draw different points."""
    text = f"{pair.item.params.seed} {pair.number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


# --- plot -------------------------------------------------------------------------------------------------------------

_VERDICTS = ("unsat", "sat", "unknown", "no result")
#: More networks or properties than this are not told apart.
_BARS = 40
#: Labels that a figure has colours for; groups of points get none beyond.
_COLOURS = 7
#: Where a log axis of margins begins.
_NEAREST = 1e-9


def plot(records: list[Record]) -> Figure:
    """Verdicts by property or by network (whichever are fewer); how many instances were decided within a time; and of
    each undecided one, how far the bound and the attack are from deciding it.
    """
    return _figure(records, _decided(records), "")


def plot_beside(records: list[Record], times: beside.Times) -> Figure:
    """The same, but how many instances were decided within a time is shown beside other tools, on the instances that
    they and these records have in common.
    """
    panel, said = beside.cactus(records, times, lambda record: _verdict(record) in ("unsat", "sat"))
    return _figure(records, panel, said)


def _figure(records: list[Record], decided: Panel, said: str) -> Figure:
    """said: an addition to the caption."""
    names = {of: [networks.short(record.name(of)) for record in records] for of in ("property", "network")}
    by = min(names, key=lambda of: (len(set(names[of])) < 2, len(set(names[of]))))
    groups = names[by] if len(set(names[by])) <= _BARS else ["all"] * len(records)
    order = sorted(set(groups), key=lambda name: [int(p) if p.isdigit() else p for p in _DIGITS.split(name)])
    counts = Counter((group, _verdict(record)) for group, record in zip(groups, records, strict=True))
    seen = [verdict for verdict in _VERDICTS if any(counts[group, verdict] for group in order)]
    bars: list[Any] = [
        Bars(x=list(order), y=[counts[g, verdict] for g in order], label=verdict, stacked=True) for verdict in seen
    ]
    panels = [Panel(title="Verdicts", x=Axis(label=by, scale="category"), y=Axis(label="instances", low=0), marks=bars)]
    panels.append(decided)
    told = len(order) + len(seen) <= _COLOURS
    points: list[Any] = [
        one for group in order if (one := _undecided(records, groups, group, group if told else "")) is not None
    ]
    if points:
        panels.append(
            Panel(
                title="Undecided",
                x=Axis(label="least violation the attack met", scale="log"),
                y=Axis(label="lower bound, below 0 by", scale="log"),
                marks=points,
            )
        )
    ended = sum(counts[group, verdict] for group in order for verdict in ("unsat", "sat"))
    caption = f"{ended:,} of {len(records):,} instances decided.{said}"
    if points:
        caption += (
            " Of the undecided, those far left nearly have a counterexample, those at the bottom are nearly proven."
        )
    return Figure(title="Verification", caption=caption, panels=panels, columns=3)


_DIGITS = re.compile(r"(\d+)")


def _verdict(record: Record) -> str:
    return record.result["verdict"] if record.result is not None else "no result"


def _decided(records: Sequence[Record]) -> Panel:
    """Instances within a time, by verdict."""
    seconds = {verdict: [r.seconds for r in records if _verdict(r) == verdict] for verdict in ("unsat", "sat")}
    return beside.within(seconds, "Decided")


def _undecided(records: Sequence[Record], groups: Sequence[str], group: str, label: str) -> Points | None:
    found = [
        (max(result["violation"], _NEAREST), max(-result["margin"], _NEAREST))
        for record, of in zip(records, groups, strict=True)
        if of == group and (result := record.result) is not None and result["verdict"] == "unknown"
        and result["violation"] is not None and math.isfinite(result["margin"])
    ]  # fmt: skip
    return Points(x=[x for x, _ in found], y=[y for _, y in found], label=label) if found else None
