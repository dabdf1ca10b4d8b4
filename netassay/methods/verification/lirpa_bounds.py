"""Certified bounds of a network's outputs over a ball of inputs or of weights, by linear relaxation of every operation.

    A x + b  <=  f_y(x) - f_j(x)   for all x in B,        margin = min over j != y and x in B of A x + b,

with B = {x : ||x - x_i||_p <= r, 0 <= x <= 1} around image i (or other example) of a split of a dataset, p in
{inf, 2, 1}, y its label, f the network's outputs (logits), r: `radius`, in units of the input; without `clip` the ball
is not cut with [0, 1]. `perturbation: weights` keeps the image and perturbs the weights of dense layers instead, each
entry by at most r: of all dense layers, or of those counted in `layers` (from 0, in the order of the graph). Biases
stay. A perturbed weight is an input of the network like another; the product with its layer's input lies between
McCormick's planes, which are exact for the first layer, whose input is known. The method is one of

* ibp: boxes (Gowal et al. 2018); the margin with the last linear layers folded in;
* forward: each value between two linear functions of the input, carried from the input to the output;
* crown_ibp: linear bounds walked backward from the output, ReLUs relaxed over the boxes of ibp;
* crown: the same, the inputs of every ReLU bounded backward too (Zhang et al. 2018);
* alpha_crown: crown with lower slopes of ReLUs that climb by `steps` steps of Adam of rate `rate`, a slope for each
  neuron and each bound; `refined`, as usual, does so for the inputs of ReLUs too. The best iterate of each bound is
  kept, that of crown included, so it is never looser.

`slopes` is where the lower line of an unstable ReLU begins: "adaptive" (1 where u > -l, else 0) or "zero". With "zero",
crown is never looser than crown_ibp, nor crown_ibp than ibp, in a graph of linear maps and ReLUs; adaptive slopes are
tighter on the whole, but may lose on an instance. Margins, losses, linear bounds and the bounds of logits are the
method's own, not cut with others.

Fused and unfused loss: two upper bounds of the largest cross-entropy over B (`netassay.numerics.bounds.fusion`; the
fused one costs a row in place of K - 1, and is mostly the larger); the attack's is a lower one. The attack is projected
gradient descent on the margin (Madry et al. 2018), on weights where these are perturbed: margin_attack - margin is how
much of the bound may be looseness.

What "certified" means: bounds are computed in float64, an a-priori bound on their own rounding taken off, so they hold
for the network in real arithmetic (float32 evaluations are the affair of `verification.certify`). With
`arithmetic: float32` bounds are looser by what its rounding may add (some 0.02 on margins of small networks), the ball
itself is rounded, and nothing is called certified. It is
not a decision procedure: a margin below 0 says nothing; see `verification.verify`.

Results agree for any grouping to 1e-6 relative, verdicts exactly: what lies near 0 is computed again alone.

Cost: with n neurons a layer, K classes, d inputs and L layers: ibp L n^2; forward L n^2 d; crown_ibp 3 K L n^2; crown
L^2 n^3; alpha_crown 3 `steps` times crown_ibp, and `refined` 3 `steps` times crown. Weights: d grows by their number.

Reference: Xu, Shi, Zhang, Wang, Chang, Huang, Kailkhura, Lin, Hsieh. Automatic perturbation analysis for scalable
certified robustness and beyond. 2020.
Reference: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. 2018.
Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from netassay import data, networks
from netassay.fields import Array, Count, DatasetRef, Index, NetworkRef, Positive, Radius, Seed
from netassay.figure import Axis, Figure, Line, Panel
from netassay.heavy import np, torch
from netassay.method import Contract, Failure, InvalidInput, MethodError, Needs, NotApplicable, NumericalError
from netassay.networks import images
from netassay.networks.evaluate import forward as evaluated
from netassay.networks.graph import Activation, Graph, Product, Relu
from netassay.numerics import attacks
from netassay.numerics.bounds import backward, forward, fusion, interval, optimised, rounding, weights
from netassay.numerics.bounds.backward import Lower
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Ball, Region

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record


VERSION = 1
#: Of a trained network: training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05
#: Between groupings: Adam magnifies the last bit of float64, by far less than this.
TOLERANCE = 1e-6

Way = Literal["ibp", "forward", "crown_ibp", "crown", "alpha_crown"]


class Params(Contract):
    network: NetworkRef
    dataset: DatasetRef = "digits"
    split: Literal["test", "train", "all"] = "test"
    index: Index
    """which image of the split"""
    radius: Radius
    perturbation: Literal["input", "weights"] = "input"
    """what the ball is around: the image, or the weights of dense layers"""
    norm: Literal["inf", "2", "1"] = "inf"
    """of the ball; of weights only inf"""
    clip: bool = True
    """cut a ball of inputs with [0, 1], the range of the data"""
    layers: tuple[Index, ...] | None = None
    """dense layers whose weights are perturbed, counted from 0; all of them where none are named"""
    method: Way = "crown"
    slopes: Literal["adaptive", "zero"] = "adaptive"
    """where the lower slopes of unstable ReLUs begin"""
    steps: Annotated[Count, Field(le=10_000)] = optimised.STEPS
    """of Adam, for alpha_crown"""
    rate: Positive = optimised.RATE
    """of Adam, for alpha_crown; it shrinks by 2 % a step"""
    refined: bool = True
    """alpha_crown: optimise the bounds of hidden layers too"""
    arithmetic: Literal["float64", "float32"] = "float64"
    """of the bounds; those in float32 are not certified"""
    coefficients: bool = False
    """return A and b of the margins: classes x inputs numbers"""
    attack_steps: Annotated[int, Field(ge=0, le=10_000)] = 40
    """gradient steps of each start of the attack"""
    restarts: Annotated[Count, Field(le=1_000)] = 4
    """starts of the attack: the image, the others at random in the ball"""
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Params:
        # Where stored params are read, the artifact may be elsewhere: then the job itself checks, when it runs.
        if data.is_known(self.dataset) or not data.is_reference(self.dataset):
            data.check_index(self.dataset, self.split, self.index)
        if self.perturbation == "weights" and self.norm != "inf":
            raise ValueError(f"a ball of weights is of norm inf, not {self.norm}; leave `norm` out")
        if self.perturbation == "input" and self.layers is not None:
            raise ValueError("`layers` names those whose weights are perturbed; set `perturbation: weights`")
        return self


class Result(Contract):
    margin: float
    """the least of `margins` over the other classes"""
    verified: bool
    """margin > 0"""
    certified: bool
    """verified, and computed in float64: no input of the ball (or no weights of it) changes the class"""
    margins: Array
    """lower bounds of f_y - f_j, by class j; 0 for y itself"""
    lower: Array
    """lower bounds of the logits"""
    upper: Array
    """upper bounds of the logits"""
    loss_unfused: float
    """an upper bound of the largest cross-entropy, by the margins"""
    loss_fused: float
    """another, by one linear bound of the sum of exponentials"""
    label: int
    prediction: int
    """class of the image itself; the lowest of equals"""
    correct: bool
    margin_clean: float
    """f_y - max_j f_j at the image"""
    margin_attack: float | None
    """the smallest margin the attack met, an upper bound; None where it met no float32 point of the ball"""
    gap: float | None
    """margin_attack - margin"""
    loss_attack: float
    """the largest cross-entropy at the image and where the attack ended: a lower bound of the largest"""
    layers: list[str]
    """values whose widths are given: what ReLUs, functions and products read, and the output"""
    widths: list[float]
    """mean of upper - lower over each of them; of a ReLU's inputs, those that are stable count 0"""
    a: Array | None
    """A of the margins: (classes, *input), 0 for y; of weights: (classes, pixels and weights); None unless asked for"""
    b: Array | None
    """b of the margins: (classes,); None unless asked for"""


#: Measured on one core, 64-32-32-10 net in groups of 128, ms a job: ibp 0.3, forward 2, crown_ibp 0.5, crown 1,
#: alpha_crown 25 (not refined 8); 1.5 for 40 steps of the attack.
NEEDS = Needs(seconds=0.01, memory=512 * 2**20, libraries=("numpy", "torch", "onnx"), group=128)
_SECONDS: dict[str, float] = {"ibp": 0.001, "forward": 0.003, "crown_ibp": 0.001, "crown": 0.002, "alpha_crown": 0.03}
#: Seconds of one step of one start of the attack; what share it takes not to refine; how much longer weights take.
_STEP, _UNREFINED, _WEIGHTS = 4e-5, 0.3, 30.0
#: Jobs computed together where weights are perturbed: each is as large as its network.
_GROUP = 8


def needs(params: Params) -> Needs:
    """Of a network of 10^4 weights; timings replace it."""
    seconds, group = _SECONDS[params.method], NEEDS.group
    if params.method == "alpha_crown":
        seconds *= params.steps / optimised.STEPS * (1.0 if params.refined else _UNREFINED)
    seconds += _STEP * params.attack_steps * params.restarts
    if params.perturbation == "weights":
        seconds, group = seconds * _WEIGHTS, _GROUP
    memory = (NEEDS.memory or 0) + data.memory(params.dataset)
    return replace(NEEDS, seconds=min(seconds, 3000.0), memory=memory, group=group)


EXAMPLE = {
    "jobs": [
        {
            "method": "verification.lirpa_bounds",
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
            "grid": {
                "method": ["ibp", "forward", "crown_ibp", "crown", "alpha_crown"],
                "radius": [0.02, 0.06],
                "index": [0, 1, 2, 3],
            },
        }
    ]
}


def run(params: Params) -> Result:
    """Raises InvalidInput where data and network do not fit, NotApplicable for one output, sums too long to bound or
    weights of a network without dense layers, NumericalError where bounds are not finite.
    """
    outcome = _outcomes([params])[0]
    if isinstance(outcome, MethodError):
        raise outcome
    return outcome


def run_many(params: list[Params]) -> list[Result | Failure]:
    """All of one network and dataset; the rest may differ."""
    return [Failure.of(outcome) if isinstance(outcome, MethodError) else outcome for outcome in _outcomes(params)]


#: What the jobs of one computation have in common.
_SHARED = (
    "perturbation", "norm", "clip", "layers", "method", "slopes", "steps", "rate", "refined", "arithmetic",
    "coefficients", "attack_steps", "restarts",
)  # fmt: skip


@dataclass(frozen=True)
class _Item:
    """One job. x: (*input shape of the network), float64."""

    params: Params
    x: Tensor
    label: int


def _outcomes(params: Sequence[Params]) -> list[Result | MethodError]:
    graph = networks.load(params[0].network)
    outcomes: list[Any] = [_read(graph, wanted) for wanted in params]
    groups: defaultdict[tuple, list[int]] = defaultdict(list)
    for place, item in enumerate(outcomes):
        if isinstance(item, _Item):
            groups[tuple(getattr(item.params, name) for name in _SHARED)].append(place)
    with torch.no_grad():
        for places in groups.values():
            try:
                found: list[Any] = _answers(graph, [outcomes[place] for place in places])
            except MethodError as error:
                found = [error] * len(places)
            for place, outcome in zip(places, found, strict=True):
                outcomes[place] = outcome
    return outcomes


def _read(graph: Graph, params: Params) -> _Item | MethodError:
    """The image of a job, or what is wrong with the job."""
    clip = params.clip and params.perturbation == "input"
    try:
        return _Item(params, *images.labelled(graph, params.dataset, params.split, params.index, clip))
    except MethodError as error:
        return error


@dataclass(frozen=True)
class _Problem:
    """network: as read. graph: what is bounded, its input x or x and weights."""

    network: Graph
    graph: Graph
    perturbed: weights.Perturbed | None = None

    @classmethod
    def of(cls, network: Graph, params: Params) -> _Problem:
        if params.perturbation == "input":
            return cls(network, network)
        known = weights.dense_layers(network)
        if not known:
            raise NotApplicable("the network has no dense layer whose weights could be perturbed")
        chosen = range(len(known)) if params.layers is None else params.layers
        if max(chosen, default=0) >= len(known) or not chosen:
            raise InvalidInput(
                f"layers {list(chosen)} are not layers of the network",
                f"it has {len(known)} dense layers, counted from 0",
            )
        made = weights.perturbed(network, [known[layer] for layer in chosen])
        inputs, widest = made.graph.input_shape[0], max(int(np.prod(o.shape)) for o in made.graph.operations)
        # A forward pass carries a coefficient of each input for each number of the largest value, several times.
        if inputs > _INPUTS or (params.method == "forward" and inputs * widest > forward.COEFFICIENTS):
            raise NotApplicable(
                f"{inputs:,} pixels and weights are too many inputs for {params.method} bounds of this network",
                f"a product of each weight with what it meets is a value of up to {widest:,} numbers",
                "fewer `layers`" if params.method != "forward" else "fewer `layers`, or method: crown",
            )
        return cls(network, made.graph, made)

    def region(self, items: Sequence[_Item]) -> Region:
        params = items[0].params
        radius = torch.tensor([item.params.radius for item in items], dtype=torch.float64)
        x = torch.stack([item.x for item in items])
        if self.perturbed is not None:
            return self.perturbed.region(x, radius)
        low, high = (0.0, 1.0) if params.clip else (-np.inf, np.inf)
        return Ball(params.norm, x, radius, low, high)


#: Pixels and weights of a network under perturbed weights: the rows of 10 classes take 24 MiB a box.
_INPUTS = 100_000


def _labels(items: Sequence[_Item]) -> Tensor:
    return torch.tensor([item.label for item in items])


def _answers(network: Graph, items: list[_Item]) -> list[Result | MethodError]:
    """Jobs that have all of `_SHARED` in common."""
    problem = _Problem.of(network, items[0].params)
    try:
        found = _bounded(problem, items)
    except rounding.TooManyTerms as error:
        raise NotApplicable("a layer of the network is too wide for bounds in this arithmetic", str(error)) from None
    attacked = _attacked(problem, items)
    answers: list[Result | MethodError] = []
    for item, bound, attack in zip(items, found, attacked, strict=True):
        # So near to a decision, rounding, and with it the grouping, might matter.
        alone = _bounded(problem, [item])[0] if bound.near and len(items) > 1 else bound
        answers.append(_result(item, alone, attack) if alone.finite else _not_finite(item))
    return answers


def _not_finite(item: _Item) -> NumericalError:
    return NumericalError(
        "the bounds are not finite",
        f"a value of the network may overflow within the radius {item.params.radius:g}, or a weight is not a number",
        "a smaller radius, or check the network's weights",
    )


@dataclass(frozen=True)
class _Bound:
    """Bounds of one job: see `Result`. margins: of the other classes, in their order; a, b: of the same."""

    margins: Tensor
    lower: Tensor
    upper: Tensor
    losses: tuple[float, float]
    widths: dict[str, float]
    a: Tensor | None
    b: Tensor | None
    near: bool
    finite: bool


def _bounded(problem: _Problem, items: Sequence[_Item]) -> list[_Bound]:
    params, graph = items[0].params, problem.graph
    dtype = torch.float64 if params.arithmetic == "float64" else torch.float32
    region = optimised.region_in(problem.region(items), dtype)
    labels, classes = _labels(items), int(np.prod(graph.output_shape))
    boxes = interval.propagate(graph, region)
    finite = torch.stack(
        [(torch.isfinite(x.lower) & torch.isfinite(x.upper)).flatten(1).all(1) for x in boxes.values()]
    ).all(0)
    one = fusion.fused(graph, boxes, labels)
    eye = torch.eye(classes, dtype=dtype).expand(len(items), -1, -1)
    rows = torch.cat([fusion.margin_rows(labels, classes, dtype), eye, -eye, one.row], dim=1)
    found = _lower(graph, region, rows, params)
    margins, lower, upper, last = found.lower.split([classes - 1, classes, classes, 1], dim=1)
    upper = -upper
    losses = torch.stack([fusion.unfused(margins), one.loss(last[:, 0])], dim=1).tolist()
    widths = {
        name: _width(problem.network, name, found.values[name])
        for name in _layers(problem.network)
        if name != graph.output
    } | {graph.output: (upper - lower).mean(1).tolist()}
    near = (margins.amin(1).abs() <= torch.clamp(found.noise, min=TOLERANCE * _NEAR)) | found.delicate
    a = b = None
    if params.coefficients:
        a = found.a[:, : classes - 1]
        least = region.minimum(a.flatten(2))
        # The constant is what the bound leaves beside the minimum of A x: its rounding is taken off once more.
        b = margins - least - 8 * torch.finfo(dtype).eps * (margins.abs() + least.abs())
    return [
        _Bound(
            margins[place],
            lower[place],
            upper[place],
            tuple(losses[place]),
            {name: values[place] for name, values in widths.items()},
            None if a is None else a[place],
            None if b is None else b[place],
            bool(near[place]),
            bool(finite[place]),
        )
        for place in range(len(items))
    ]


#: A margin nearer to 0 than this many `TOLERANCE` is computed alone.
_NEAR = 10.0


#: Boxes x rows x width of a block's backward pass: 128 MiB in float64, and several times that with slopes.
_COEFFICIENTS = 1 << 24


def _layers(graph: Graph) -> list[str]:
    """What operations that are not linear read, in the order of the graph, and the output."""
    kinds = Relu | Activation | Product
    return list(
        dict.fromkeys(
            [of for operation in graph.needed if isinstance(operation, kinds) for of in operation.sources]
            + [graph.output]
        )
    )


def _width(graph: Graph, name: str, box: Interval) -> list[float]:
    """Of each item, the mean over a layer's numbers. Where only ReLUs read them, a stable one counts 0: it is relaxed
    exactly, whatever its bounds, and crown does not sharpen them.
    """
    width = box.upper - box.lower
    if all(isinstance(operation, Relu) for operation in graph.needed if name in operation.sources):
        width = torch.where((box.lower < 0) & (box.upper > 0), width, 0.0)
    return width.flatten(1).mean(1).tolist()


def _lower(graph: Graph, region: Region, rows: Tensor, params: Params) -> Lower:
    """Lower bounds of `rows`, (batch, rows, outputs), by the method that was asked for."""
    flat = params.slopes == "zero"
    widest = max([int(np.prod(graph.input_shape)), *(int(np.prod(operation.shape)) for operation in graph.needed)])
    block = max(1, min(backward.BLOCK, _COEFFICIENTS // (rows.shape[1] * widest)))
    match params.method:
        case "ibp":
            return _by_boxes(graph, region, rows)
        case "forward":
            return forward.lower(graph, region, rows, flat=flat)
        case "crown_ibp":
            return backward.lower(graph, region, rows, intermediates="interval", flat=flat, block=block)
        case "crown":
            return backward.lower(graph, region, rows, flat=flat, block=block)
        case "alpha_crown":
            start = backward.lower(graph, region, rows, flat=flat, block=block)
            best = optimised.lower(
                graph,
                region,
                rows,
                refined=params.refined,
                steps=params.steps,
                rate=params.rate,
                search=rows.dtype,
                flat=flat,
                block=block,
            )
            # Where hidden bounds are tightened, adaptive slopes change, and not always for the better.
            better = best.lower > start.lower
            a = torch.where(better.reshape(*better.shape, *[1] * (best.a.dim() - 2)), best.a, start.a)
            return Lower(torch.maximum(best.lower, start.lower), a, best.values, start.noise, best.delicate)
    raise ValueError(params.method)


def _by_boxes(graph: Graph, region: Region, rows: Tensor) -> Lower:
    values = interval.propagate(graph, region)
    noise = rounding.backward(graph, values)[graph.output].flatten(1).amax(1)
    a = rows.new_zeros(1, 1, *[1] * len(graph.input_shape)).expand(*rows.shape[:2], *graph.input_shape)
    return Lower(
        backward.box_margins(graph, values, rows),
        a,
        values,
        backward.NOISE * len(graph.operations) * noise,
        torch.zeros(len(region), dtype=torch.bool),
    )


@dataclass(frozen=True)
class _Attack:
    """prediction, margin and loss of the image; margin and loss where the attack ended, None outside of the ball."""

    prediction: int
    clean: tuple[float, float]
    found: tuple[float, float] | None


#: Numbers in the inputs attacked together: 64 MiB in float64.
_NUMBERS = 1 << 23


def _attacked(problem: _Problem, items: list[_Item]) -> list[_Attack]:
    params, region, labels = items[0].params, problem.region(items), _labels(items)
    seeds = [_seed(item.params) for item in items]
    size = max(1, _NUMBERS // (params.restarts * int(np.prod(problem.graph.input_shape))))
    parts = [
        attacks.pgd(
            problem.graph,
            region[start : start + size],
            labels[start : start + size],
            steps=params.attack_steps,
            restarts=params.restarts,
            seeds=seeds[start : start + size],
            stop=False,
        )
        for start in range(0, len(items), size)
    ]
    points, insides = (torch.cat([getattr(part, name) for part in parts]) for name in ("points", "inside"))
    found = []
    # One by one: which class is the largest must not depend on the group.
    for place, (point, inside) in enumerate(zip(points, insides.tolist(), strict=True)):
        one = slice(place, place + 1)
        outputs = evaluated(problem.network, items[place].x[None]).flatten(1)
        at = _at(evaluated(problem.graph, point[None]).flatten(1), labels[one]) if inside else None
        found.append(_Attack(int(outputs.argmax()), _at(outputs, labels[one]), at))
    return found


def _at(outputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """f_y - max_j!=y f_j and the cross-entropy. outputs: (1, classes)."""
    others = outputs.scatter(1, labels[:, None], -torch.inf)
    margin = outputs.gather(1, labels[:, None])[:, 0] - others.amax(1)
    return float(margin), float(torch.nn.functional.cross_entropy(outputs, labels))


def _seed(params: Params) -> int:
    """A seed for this image: jobs of one seed draw different starts."""
    text = f"{params.seed} {params.split} {params.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def _result(item: _Item, bound: _Bound, attack: _Attack) -> Result:
    margin = float(bound.margins.min())
    met = None if attack.found is None else min(attack.found[0], attack.clean[0])
    ends = [attack.clean[1]] + ([] if attack.found is None else [attack.found[1]])
    return Result(
        margin=margin,
        verified=margin > 0,
        certified=margin > 0 and item.params.arithmetic == "float64",
        margins=_with_label(bound.margins, item.label),
        lower=bound.lower.numpy(),
        upper=bound.upper.numpy(),
        loss_unfused=bound.losses[0],
        loss_fused=bound.losses[1],
        label=item.label,
        prediction=attack.prediction,
        correct=attack.prediction == item.label,
        margin_clean=attack.clean[0],
        margin_attack=met,
        gap=None if met is None else met - margin,
        loss_attack=max(ends),
        layers=list(bound.widths),
        widths=list(bound.widths.values()),
        a=None if bound.a is None else _with_label(bound.a, item.label),
        b=None if bound.b is None else _with_label(bound.b, item.label),
    )


def _with_label(others: Tensor, label: int) -> Any:
    """Rows of the other classes with zeros in the place of the label's own."""
    return torch.cat([others[:label], torch.zeros_like(others[:1]), others[label:]]).numpy()


#: Up to so many networks and balls get two panels each; more share one panel a method.
_PANELS = 6
#: From loose to tight.
_ORDER = ("ibp", "forward", "crown_ibp", "crown", "alpha_crown")


def plot(records: list[Record]) -> Figure:
    """Verified accuracy against radius, a line a method, below the accuracy under attack; and mean width by layer."""
    done = [record for record in records if record.result is not None]
    titles = _named(done, ("perturbation", "norm"), ("network", "dataset"))
    methods = _named(done, ("slopes", "refined", "steps", "arithmetic"), (), "method")
    series: defaultdict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(done, key=lambda record: _ORDER.index(record.params["method"])):
        series[titles[record.id]][methods[record.id]].append(record)
    x = Axis(label="radius", low=0)
    y = Axis(label="share of images", low=0, high=1, percent=True)
    panels: list[Panel] = []
    if len(series) <= _PANELS:
        for title, by_method in series.items():
            panels.append(Panel(title=title, x=x, y=y, marks=_accuracies(by_method)))
            panels.append(_by_layer(title, by_method))
    else:
        for method in dict.fromkeys(name for by_method in series.values() for name in by_method):
            marks = [
                _share(title, by_method[method], "verified")
                for title, by_method in series.items()
                if method in by_method
            ]
            panels.append(Panel(title=method, x=x, y=y, marks=list(marks)))
    caption = f"{len(records):,} jobs"
    if missing := len(records) - len(done):
        caption += f", {missing:,} of them without a result: not in the shares"
    caption += ". Robust accuracy lies between what is verified and what survives the attack."
    if any(record.params["arithmetic"] == "float32" for record in done):
        caption += " Bounds in float32 are not certified."
    return Figure(
        title="Verified accuracy by method", caption=caption, panels=panels or [Panel(x=x, y=y, marks=[])], columns=2
    )


def _named(
    records: Sequence[Record], fields: Sequence[str], references: Sequence[str], always: str = ""
) -> dict[int, str]:
    """A name of each record, by id: a field that is always told, the first reference, and of the others what differs.

    What concerns alpha_crown alone is told of it alone.
    """
    told = [field for field in fields if len({record.params.get(field) for record in records}) > 1]
    shown = [
        reference
        for place, reference in enumerate(references)
        if place == 0 or len({record.name(reference) for record in records}) > 1
    ]
    names = {}
    for record in records:
        parts = [str(record.params[always])] if always else []
        parts += [networks.short(record.name(reference)) for reference in shown]
        alpha = record.params["method"] == "alpha_crown"
        parts += [f"{field} {record.params.get(field)}" for field in told if alpha or field not in ("refined", "steps")]
        names[record.id] = ", ".join(parts)
    return names


def _accuracies(by_method: dict[str, list[Record]]) -> list[Any]:
    everyone = [record for records in by_method.values() for record in records]
    lines = [_share(method, records, "verified") for method, records in by_method.items()]
    return [_share("under attack", everyone, "survived"), *lines]


def _share(label: str, records: Sequence[Record], what: Literal["verified", "survived"]) -> Line:
    """What share of the images of each radius is verified, or right and not lost to the attack."""
    met: defaultdict[float, dict[Any, bool]] = defaultdict(dict)
    for record in records:
        result, params = record.result, record.params
        assert result is not None
        attacked = result["margin_attack"]
        survived = result["correct"] and (attacked is None or attacked > 0)
        image = (params["dataset"], params["split"], params["index"])
        # Of an image attacked several times (by jobs of several methods, with other seeds) the worst counts.
        known = met[params["radius"]].get(image, what == "survived")
        good = known and survived if what == "survived" else known or result["verified"]
        met[params["radius"]][image] = good
    radii = sorted(met)
    shares = [sum(met[radius].values()) / len(met[radius]) for radius in radii]
    return Line(x=list(radii), y=list(shares), label=label, points=True, dashed=what == "survived")


def _by_layer(title: str, by_method: dict[str, list[Record]]) -> Panel:
    """Mean width of the bounds of each layer, at the middle one of the radii above 0."""
    radii = sorted({record.params["radius"] for records in by_method.values() for record in records} - {0.0})
    radius = radii[len(radii) // 2] if radii else 0.0
    marks = []
    for method, records in by_method.items():
        results = [record.result for record in records if record.params["radius"] == radius]
        if not results:
            continue
        layers = results[0]["layers"]  # type: ignore[index]
        rows = [result["widths"] for result in results]  # type: ignore[index]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        marks.append(Line(x=list(layers), y=list(means), label=method, points=True))
    return Panel(
        title=f"{title}, radius {radius:g}",
        x=Axis(label="layer", scale="category"),
        y=Axis(label="mean width of bounds, stable ReLUs 0"),
        marks=list(marks),
    )
