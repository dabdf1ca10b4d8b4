"""Whether every input within a radius of an image keeps the image's class: proved, refuted, or neither.

    certified  <=  min over x in B and j != y of  f_y(x) - f_j(x)  >  0,    B = {x : ||x - x_i|| <= r, 0 <= x <= 1}
    falsified  <=  an x in B with argmax_j f_j(x) != y

x_i, y: image i (or other example) of a split of a dataset and its label; f: the network's outputs (logits); r:
`radius`, in units of the input (pixels in [0, 1]); the norm is l_inf or l_2; without `clip` the ball is not cut with
[0, 1], and data need not lie there. Stages, each for the images that the ones before left open:

1. clean: the image itself is misclassified (falsified, `by` "clean"; the counterexample is the image);
2. ibp: interval bounds (Gowal et al. 2018), with the last layer folded into the margin;
3. attack: three steps of projected gradient descent from the image: most of what falls at all falls here;
4. crown: backward linear bounds (Zhang et al. 2018), every layer bounded backward;
5. attack: `steps` of projected gradient descent from `restarts` starts (Madry et al. 2018).

What "certified" means in floating point: bounds are computed in float64 with an a-priori bound on their own rounding
taken off, so they hold in real arithmetic; and they hold for every float32 evaluation of the network, in any order of
summation, at every float32 input in B, whose worst-case error is taken off too (`netassay.numerics.bounds.rounding`
says what is not covered). Where such an evaluation might overflow in B, the job ends as a numerical error. What
"falsified" means: the counterexample (the image itself, for "clean") consists of float32 numbers, lies in B in exact
arithmetic, and is misclassified by a float64 and a float32 evaluation of the network as it was read, and by onnxruntime
on the original file, with finite outputs.

"unknown" is an answer about these bounds and this attack, not about the network; it is not a robustness estimate.
Verdicts do not depend on which jobs are computed together: bounds within their rounding of a decision are computed
again alone, and the attack's arithmetic is exact (`netassay.numerics.attacks`). Margins agree to 1e-9 relative to the
largest intermediate value of the network over the ball (not to the margin, which may be a small difference of these).

Cost: ibp one product with |W| a layer; crown, a layer of n neurons, u of them unstable: a matrix of 2 u x n through
all layers before it, i.e. O(sum over layers of n^3) for width n; attack 2 steps restarts evaluations.

Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018.
Reference: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks. 2018.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from netassay import data, networks
from netassay.fields import Array, Count, DatasetRef, Index, NetworkRef, Radius, Seed
from netassay.figure import Axis, Figure, Line, Panel
from netassay.heavy import np, torch
from netassay.method import Contract, Failure, InvalidInput, MethodError, Needs, NotApplicable, NumericalError
from netassay.networks import images
from netassay.networks.evaluate import forward
from netassay.networks.graph import Graph
from netassay.numerics import attacks, replay
from netassay.numerics.bounds import backward, interval, rounding
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Ball

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record

VERSION = 1
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05

Verdict = Literal["certified", "falsified", "unknown"]


class Params(Contract):
    network: NetworkRef
    dataset: DatasetRef = "digits"
    split: Literal["test", "train", "all"] = "test"
    index: Index
    """which image of the split"""
    radius: Radius
    norm: Literal["inf", "2"] = "inf"
    clip: bool = True
    """cut the ball with [0, 1], the range of the data"""
    steps: Annotated[Count, Field(le=10_000)] = 40
    """gradient steps of each start of the attack"""
    restarts: Annotated[Count, Field(le=1_000)] = 4
    """starts of the attack: the image, the others at random in the ball"""
    seed: Seed = 0

    @model_validator(mode="after")
    def _index_in_data(self) -> Params:
        # Where stored params are read, the artifact may be elsewhere: then the job itself checks, when it runs.
        if data.is_known(self.dataset) or not data.is_reference(self.dataset):
            data.check_index(self.dataset, self.split, self.index)
        return self


class Result(Contract):
    verdict: Verdict
    by: Literal["clean", "ibp", "attack", "crown"] | None
    """the stage that decided; None for unknown"""
    label: int
    prediction: int
    """class of the image itself; the lowest of equals"""
    correct: bool
    margin_clean: float
    """f_y - max_j f_j at the image"""
    margin_ibp: float
    """a lower bound of the margin over the ball, by interval bounds"""
    margin_crown: float | None
    """a lower bound of the margin over the ball, by CROWN; None where this stage was not needed"""
    margin_attack: float | None
    """the smallest margin an attack met, an upper bound; None where no attack ran or met a float32 point of the ball"""
    counterexample: Array | None
    """input of the network, of its shape, float32; None unless an attack decided"""


#: Measured on one core (benchmarks/certify_bulk.py), ms a job in groups of 1, 8, 32, 128: 64-64-64-10 net 12, 2.2, 1.3,
#: 1.1; small CNN 14, 6, 6, 6. Larger groups gain nothing more.
NEEDS = Needs(seconds=0.005, memory=512 * 2**20, libraries=("numpy", "torch", "onnx", "onnxruntime"), group=128)

#: Seconds of one step of one start of the attack, on the 64-64-64-10 net. Measured in bulk, where nothing is found.
_STEP = 2e-5


def needs(params: Params) -> Needs:
    """The default attack is part of the measured seconds; a longer one comes on top.

    Of a network of 10^5 weights: larger ones are found out by the timings that replace this guess. Memory grows with a
    user's dataset, which is loaded as a whole.
    """
    usual = Params.model_fields["steps"].default * Params.model_fields["restarts"].default
    seconds = NEEDS.seconds + _STEP * max(0, params.steps * params.restarts - usual)
    return replace(NEEDS, seconds=seconds, memory=(NEEDS.memory or 0) + data.memory(params.dataset))


EXAMPLE = {
    "jobs": [
        {
            "method": "verification.certify",
            "params": {
                "network": {
                    "dataset": "digits",
                    "architecture": {"kind": "mlp", "hidden": [32]},
                    "training": {"kind": "ibp"},
                    "seed": 0,
                    "epochs": 8,
                },
                "dataset": "digits",
            },
            "grid": {"radius": [0.01, 0.03], "index": [0, 1, 2, 3, 4]},
        }
    ]
}

#: Gradient steps of the attack that goes before CROWN.
_FIRST_STEPS = 3


def run(params: Params) -> Result:
    """Raises InvalidInput where data and network do not fit, NotApplicable for one output or sums too long to bound,
    NumericalError where bounds or a float32 evaluation may overflow.
    """
    outcome = _outcomes([params])[0]
    if isinstance(outcome, MethodError):
        raise outcome
    return outcome


def run_many(params: list[Params]) -> list[Result | Failure]:
    """All of one network and dataset; radii, images, norms and attacks may differ."""
    return [Failure.of(outcome) if isinstance(outcome, MethodError) else outcome for outcome in _outcomes(params)]


@dataclass
class _Item:
    """One job on its way through the stages. x: (*input shape of the network), float64."""

    params: Params
    x: Tensor
    label: int
    prediction: int = -1
    verdict: Verdict = "unknown"
    by: Any = None
    margins: dict[str, float] = field(default_factory=dict)
    counterexample: Any = None

    def end(self, verdict: Verdict, by: str) -> None:
        self.verdict, self.by = verdict, by

    def result(self) -> Result:
        return Result(
            verdict=self.verdict,
            by=self.by,
            label=self.label,
            prediction=self.prediction,
            correct=self.prediction == self.label,
            margin_clean=self.margins["clean"],
            margin_ibp=self.margins["ibp"],
            margin_crown=self.margins.get("crown"),
            margin_attack=self.margins.get("attack"),
            counterexample=self.counterexample,
        )


def _outcomes(params: Sequence[Params]) -> list[Result | MethodError]:
    outcomes: list[Any] = [None] * len(params)
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    graph = networks.load(params[0].network)
    if not rounding.is_covered(graph):
        why = "certificates hold for float32 evaluations too, and of its functions other than ReLU none is known"
        return [NotApplicable("the network cannot be certified here", why)] * len(params)
    try:
        replay.load(params[0].network)
    except InvalidInput as error:
        return [error] * len(params)
    items: list[_Item | MethodError] = [_read(graph, wanted) for wanted in params]
    for place, (wanted, item) in enumerate(zip(params, items, strict=True)):
        if isinstance(item, MethodError):
            outcomes[place] = item
        else:
            groups[wanted.norm, wanted.clip, wanted.steps, wanted.restarts].append(place)
    with torch.no_grad():
        for places in groups.values():
            group: list[_Item] = [items[place] for place in places]  # type: ignore[misc]
            for place, outcome in zip(places, _decide(graph, group), strict=True):
                outcomes[place] = outcome
    return outcomes


def _read(graph: Graph, params: Params) -> _Item | MethodError:
    """The image of a job, or what is wrong with the job."""
    clip = params.clip
    try:
        return _Item(params, *images.labelled(graph, params.dataset, params.split, params.index, clip))
    except MethodError as error:
        return error


def _ball(items: Sequence[_Item]) -> Ball:
    first = items[0].params
    low, high = (0.0, 1.0) if first.clip else (-np.inf, np.inf)
    radius = torch.tensor([item.params.radius for item in items], dtype=torch.float64)
    return Ball(first.norm, torch.stack([item.x for item in items]), radius, low, high)


def _decide(graph: Graph, group: list[_Item]) -> list[Result | MethodError]:
    """Jobs of one norm, clip and attack."""
    region = _ball(group)
    try:
        boxes = interval.propagate(graph, region, torch.float32)
    except rounding.TooManyTerms as error:
        return [_too_wide(error)] * len(group)
    # So near to a decision, rounding, and with it the grouping, might matter.
    noise = rounding.backward(graph, boxes)[graph.output].flatten(1).amax(1)
    band = backward.NOISE * len(graph.operations) * noise
    finite = _finite(boxes)
    load = rounding.load(graph, boxes, torch.float32)
    load = _settled(load, (load - 1).abs() <= _NEAR_OVERFLOW, lambda place: _load(graph, group[place])[0])
    sound = (finite & (load < 1)).tolist()

    _clean(graph, group, band)
    _ibp(graph, group, boxes, band, sound)
    _attack(graph, _undecided(group, sound), _FIRST_STEPS, 1)
    _crown(graph, _undecided(group, sound))
    first = group[0].params
    _attack(graph, _undecided(group, sound), first.steps, first.restarts)
    # A misclassified image refutes the claim, whatever the bounds are worth.
    return [
        item.result() if ok or item.verdict == "falsified" else _overflow(graph, item, whole)
        for item, ok, whole in zip(group, sound, finite.tolist(), strict=True)
    ]


#: Relative distance of a sum from float32's limit at which the last bit of it, and so the grouping, might decide: far
#: above float64 rounding. Such jobs are computed alone.
_NEAR_OVERFLOW = 1e-6


def _finite(boxes: Mapping[str, Interval]) -> Tensor:
    """Whether all ends are finite: (batch,), bool. Of every value, for a ReLU takes an end of -infinity to 0."""
    ends = [torch.isfinite(box.lower) & torch.isfinite(box.upper) for box in boxes.values()]
    return torch.stack([end.flatten(1).all(1) for end in ends]).all(0)


def _load(graph: Graph, item: _Item, radius: float | None = None) -> Tensor:
    """`rounding.load` of one job, or of its image with another radius: (1,)."""
    if radius is not None:
        item = replace(item, params=item.params.model_copy(update={"radius": radius}))
    return rounding.load(graph, interval.propagate(graph, _ball([item]), torch.float32), torch.float32)


def _overflow(graph: Graph, item: _Item, finite: bool) -> NumericalError:
    what = "a float32 evaluation may overflow within the ball" if finite else "the bounds are not finite"
    if bool(_load(graph, item, 0.0) < 1):
        radius = item.params.radius
        return NumericalError(
            what,
            f"at the image itself all is well, but the radius {radius:g} lets values grow too large",
            "a smaller radius" if item.params.clip else "a smaller radius, or clip: true",
        )
    return NumericalError(
        what,
        "a weight, or a sum of products with weights, is too large, or is not a number",
        "check the network's weights for NaN and infinity, or scale them down",
    )


def _too_wide(error: rounding.TooManyTerms) -> NotApplicable:
    return NotApplicable(
        "a layer of the network is too wide for bounds that hold in float32",
        str(error).partition(";")[0],
        "a network whose layers have fewer than 160,000 inputs and outputs (of a convolution: per output value)",
    )


def _undecided(group: list[_Item], sound: list[bool]) -> list[_Item]:
    return [item for item, ok in zip(group, sound, strict=True) if ok and item.verdict == "unknown"]


def _margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """f_y - max_j!=y f_j. outputs: (batch, classes). Returns (batch,)."""
    others = outputs.scatter(1, labels[:, None], -torch.inf)
    return outputs.gather(1, labels[:, None])[:, 0] - others.amax(1)


def _rows(labels: Tensor, classes: int) -> Tensor:
    """The specification f_y - f_j, one row for each j != y: (batch, classes - 1, classes), float64."""
    one = torch.eye(classes, dtype=torch.float64)
    rows = one[labels][:, None] - one
    return rows[~one[labels].bool()].reshape(len(labels), classes - 1, classes)


def _labels(items: Sequence[_Item]) -> Tensor:
    return torch.tensor([item.label for item in items])


def _settled(values: Tensor, near: Tensor, alone: Callable[[int], Tensor]) -> Tensor:
    """`values` with each that is `near` a decision replaced by what `alone` computes of it, whatever the group."""
    values = values.clone()
    for place in near.nonzero()[:, 0].tolist():
        values[place] = alone(place)
    return values


def _clean(graph: Graph, group: list[_Item], band: Tensor) -> None:
    x = torch.stack([item.x for item in group])
    outputs = forward(graph, x).flatten(1)
    best = outputs.topk(2, dim=1).values
    outputs = _settled(
        outputs, best[:, 0] - best[:, 1] <= band, lambda place: forward(graph, x[place : place + 1]).flatten()
    )
    margins = _margins(outputs, _labels(group)).tolist()
    for item, prediction, margin in zip(group, outputs.argmax(1).tolist(), margins, strict=True):
        item.prediction, item.margins["clean"] = prediction, margin
        if prediction != item.label and bool((item.x == item.x.float()).all()) and _misled(graph, item, item.x):
            item.end("falsified", "clean")


def _misled(graph: Graph, item: _Item, x: Tensor) -> bool:
    """Whether float32 evaluations misclassify x, a float32 point of the ball: of the graph, and of the file."""
    outputs = forward(graph, x[None].float()).flatten()
    if int(outputs.argmax()) == item.label or not bool(torch.isfinite(outputs).all()):
        return False
    replayed = replay.outputs(item.params.network, x.numpy())
    return bool(np.isfinite(replayed).all()) and int(replayed.argmax()) != item.label


def _ibp(graph: Graph, group: list[_Item], boxes: dict[str, Interval], band: Tensor, sound: list[bool]) -> None:
    def least(items: list[_Item], boxes: dict[str, Interval]) -> Tensor:
        rows = _rows(_labels(items), int(np.prod(graph.output_shape)))
        return backward.box_margins(graph, boxes, rows, torch.float32).amin(1)

    def alone(place: int) -> Tensor:
        one = group[place : place + 1]
        return least(one, interval.propagate(graph, _ball(one), torch.float32))[0]

    found = least(group, boxes)
    found = _settled(found, found.abs() <= band, alone)
    for item, margin, ok in zip(group, found.tolist(), sound, strict=True):
        item.margins["ibp"] = margin if ok else -np.inf
        if ok and item.verdict == "unknown" and margin > 0:
            item.end("certified", "ibp")


def _crown(graph: Graph, items: list[_Item]) -> None:
    if not items:
        return

    def bound(items: list[_Item]) -> backward.Lower:
        rows = _rows(_labels(items), int(np.prod(graph.output_shape)))
        return backward.lower(graph, _ball(items), rows, evaluated=torch.float32)

    found = bound(items)
    least = found.lower.amin(1)
    near = (least.abs() <= found.noise) | found.delicate
    least = _settled(least, near, lambda place: bound(items[place : place + 1]).lower.amin())
    for item, margin in zip(items, least.tolist(), strict=True):
        item.margins["crown"] = margin
        if margin > 0:
            item.end("certified", "crown")


def _attack(graph: Graph, items: list[_Item], steps: int, restarts: int) -> None:
    if not items:
        return
    region, labels = _ball(items), _labels(items)
    seeds = [_seed(item.params) for item in items]
    attack = attacks.pgd(graph, region, labels, steps=steps, restarts=restarts, seeds=seeds)
    for place, (item, point) in enumerate(zip(items, attack.points, strict=True)):
        if not bool(attacks.contains(region[place : place + 1], point[None])):
            continue
        # Alone: whether a candidate is accepted must not depend on the group.
        outputs = forward(graph, point[None]).flatten(1)
        margin = float(_margins(outputs, labels[place : place + 1]))
        item.margins["attack"] = min(margin, item.margins.get("attack", margin))
        if int(outputs.argmax()) != item.label and _misled(graph, item, point):
            item.counterexample = point.float().numpy()
            item.end("falsified", "attack")


def _seed(params: Params) -> int:
    """A seed for this image: jobs of one seed draw different starts."""
    text = f"{params.seed} {params.split} {params.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


#: Up to so many networks get a panel each; more share one panel a quantity.
_PANELS = 9


def plot(records: list[Record]) -> Figure:
    """Accuracy against radius, a panel for each network.

    clean: classified rightly; not falsified: an upper bound of robust accuracy; certified: a lower bound; the shade
    between the two is what neither the bounds nor the attack decided. Shares of the jobs that have a result.
    """
    series: defaultdict[str, defaultdict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    norms = {record.params.get("norm", "inf") for record in records}
    datasets = {record.name("dataset") for record in records}
    for record in records:
        name = record.name("network")
        if len(datasets) > 1:
            name += f", {networks.short(record.name('dataset'))}"
        if len(norms) > 1:
            name += f", l_{record.params.get('norm', 'inf')}"
        series[name][float(record.params["radius"])].append(record)
    curves = {name: curve for name, by_radius in series.items() if (curve := _curve(by_radius))["x"]}
    x = Axis(label="radius" if len(norms) != 1 else f"l_{next(iter(norms))} radius", low=0)
    y = Axis(label="share of images", low=0, high=1, percent=True)
    if len(curves) <= _PANELS:
        panels = [Panel(title=name, x=x, y=y, marks=_marks(curve)) for name, curve in curves.items()]
    else:
        panels = [
            Panel(
                title=label,
                x=x,
                y=y,
                marks=[Line(x=curve["x"], y=curve[label], label=name) for name, curve in curves.items()],
            )
            for label in ("certified", "not falsified")
        ]
    missing = sum(record.result is None for record in records)
    caption = f"{len(records):,} jobs"
    if missing:
        caption += f", {missing:,} of them without a result: not in the shares"
    caption += ". Robust accuracy lies in the shade: above what is certified, below what no attack has falsified."
    return Figure(
        title="Certified robustness", caption=caption, panels=panels or [Panel(x=x, y=y, marks=[])], columns=3
    )


def _curve(by_radius: Mapping[float, list[Record]]) -> dict[str, list[Any]]:
    """x: the radii that have results; and for each of them the three shares."""
    shares = {radius: share for radius in sorted(by_radius) if (share := _shares(by_radius[radius])) is not None}
    labels = ("clean", "not falsified", "certified")
    return {"x": list(shares)} | {label: [share[label] for share in shares.values()] for label in labels}


def _marks(curve: Mapping[str, list[Any]]) -> list[Any]:
    x, upper, lower = curve["x"], curve["not falsified"], curve["certified"]
    return [
        Line(x=x, y=curve["clean"], label="clean", dashed=True),
        Line(x=x, y=upper, label="not falsified", points=True),
        Line(x=x, y=lower, label="certified", points=True, low=lower, high=upper),
    ]


def _shares(records: list[Record]) -> dict[str, float] | None:
    results = [record.result for record in records if record.result is not None]
    if not results:
        return None
    return {
        "clean": sum(result["correct"] for result in results) / len(results),
        "not falsified": sum(result["verdict"] != "falsified" for result in results) / len(results),
        "certified": sum(result["verdict"] == "certified" for result in results) / len(results),
    }
