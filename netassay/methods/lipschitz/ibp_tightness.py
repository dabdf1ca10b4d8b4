"""How tight interval bounds are on a network, and how training, width and depth change it.

    tau_i(x) = (|W_L D_(L-1) W_(L-1) ... D_1 W_1| 1)_i / (|W_L| D_(L-1) |W_(L-1)| ... D_1 |W_1| 1)_i,    0 <= tau_i <= 1

W_l: weights of layer l (outputs x inputs; a convolution as a matrix); D_l: diagonal, 1 for the ReLUs that are on at the
input x, else 0; 1: the vector of ones; i: an output. It is the half-width of the smallest box around output i over that
of the box which interval bound propagation (IBP) finds, for a box of vanishing radius around x. tau = 1, *propagation
invariance*: no sum of products cancels. `tau` is the mean over outputs and inputs (initialisation: and networks). It is
no bound over a box of some radius: what such bounds prove is in the accuracies.

`experiment` is one of

* `network`: a user's network (or recipe) on the first `examples` of a dataset, or on as many inputs from N(0, 1) where
  `dataset` is null (tau only).
* `training`: an mlp of `depth` layers, the hidden ones of `width`, trained here on the split train (cross-entropy of,
  for `standard`, the example; for `pgd`, an attacked point of the box of `radius`; for `ibp`, the worst case that IBP
  allows in it; for `sabr`, in a box of `share` x radius around an attacked point; for `crown_ibp`, a mixture of linear
  and interval bounds that ends at `share` linear). Over the first half of training the radius grows from 0, and what
  bounds give is mixed with the loss at the example, whose share falls from 1 to 0: without that, networks of 5 layers
  died. Adam, its rate falling to 0 along half a cosine. Measured as for `network`, and tau before training too.
* `initialisation`: `samples` networks with weights from N(0, 1), `inputs` inputs and 10 outputs, with ReLUs (each at an
  input of its own from N(0, 1)) or linear. The mean half-widths have the ratio, exactly for linear layers,

      E exact / E IBP = g(width)^(depth - 1),  g(d) = sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2)) ~ sqrt(pi / (2 d)).

* `reconstruction`: a linear autoencoder of `width` hidden units on Gaussian data of `rank` in `inputs` dimensions, free
  and held to tau = 1 by signs (see `netassay.numerics.linear_autoencoders`; a local search).

Also of a network: tau from each layer on; and of each two consecutive layers, ReLUs left out, tau and the share of
(i, j) for which all nonzero W2_ik W1_kj have one sign (1 if and only if these two are invariant), and the share of
products that have the commoner sign. Accuracies: at the example; after projected gradient descent; proved in the l_inf
ball, cut with [0, 1] if `clip`, by IBP, and by IBP or CROWN (in exact arithmetic; for float32 evaluations see
`verification.certify`); and with `exact`, of mixed-integer programming up to `nodes` nodes: what it calls robust, and
that with what it leaves open. The last is a figure with the solver's tolerances, not a proof.

Measured with the defaults (digits, radius 0.1, one seed; accuracies of 200 test images):

    training            standard   pgd     ibp     sabr    crown_ibp      before
    tau, width 16        0.157    0.124   0.649   0.477      0.510         0.175
    tau, width 64        0.072    0.047   0.518   0.358      0.400         0.038
    tau, width 256       0.029      -     0.520     -          -           0.0095
    clean, width 64      98.5 %   98.5 %  92.0 %  96.5 %     95.0 %
    IBP proves            0 %      0 %    69.0 %  54.0 %     61.5 %
    IBP or CROWN proves   2.5 %   35.0 %  69.5 %  67.0 %     71.5 %

So more tightness is not more certified accuracy, once CROWN proves too. Over `standard`, ibp gains a factor 7 at width
64 and depth 3, 215 at depth 5, but 2.1 at depth 2, where little was lost. A tau of 1 may be a dead network: see
`constant` and the accuracies.

Cost: tau two backward passes of all outputs an input; pairs n^3 for width n; CROWN as `verification.certify`; training
epochs x examples x 3 to 30 passes. No `run_many`: a job is a batch already, and jobs share little.

Reference: Mao, Mueller, Fischer, Vechev. Understanding certified training with interval bound propagation. 2024.
Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018.
Reference: Mueller, Eckert, Fischer, Vechev. Certified training: small boxes are all you need. 2023.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from netassay import data, networks
from netassay.fields import Array, Count, DatasetRef, NetworkRef, Positive, Radius, Seed
from netassay.figure import Axis, Figure, Line, Panel, Points
from netassay.heavy import np, torch
from netassay.method import Contract, InvalidInput, Needs, NotApplicable, NumericalError
from netassay.networks import recipes
from netassay.networks.evaluate import forward
from netassay.networks.graph import Graph
from netassay.numerics import attacks
from netassay.numerics import linear_autoencoders as autoencoders
from netassay.numerics.bounds import backward, interval, milp, tightness
from netassay.numerics.bounds.regions import Ball

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.job import Record

VERSION = 1

Training = Literal["standard", "pgd", "ibp", "sabr", "crown_ibp"]
TRAININGS: tuple[Training, ...] = ("standard", "pgd", "ibp", "sabr", "crown_ibp")


class Params(Contract):
    experiment: Literal["network", "training", "initialisation", "reconstruction"] = "network"
    network: NetworkRef | None = None
    """network: what is measured"""
    dataset: DatasetRef | None = "digits"
    """network, training"""
    split: Literal["test", "train", "all"] = "test"
    """whose first examples are measured on; training itself sees train"""
    examples: Count = 200
    """of the split, or all of it where it has fewer; inputs drawn where there is no dataset"""
    radius: Radius = 0.1
    """of the l_inf ball, for training and for the accuracies"""
    clip: bool = True
    """cut the ball with [0, 1], the range of the data; training does not"""
    steps: Annotated[Count, Field(le=10_000)] = 20
    """gradient steps of each start of the attack that is measured"""
    restarts: Annotated[Count, Field(le=1_000)] = 2
    exact: bool = False
    """also decide what bounds and attack leave open by mixed-integer programming"""
    nodes: Count = 1000
    """of the search tree, for each rival class of an example"""
    training: Training = "ibp"
    width: Count = 64
    """hidden units, of each hidden layer"""
    depth: Count = 3
    """layers with weights"""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """sabr: size of the small box; crown_ibp: share of linear bounds at the end"""
    epochs: Annotated[Count, Field(le=100_000)] = 300
    learning_rate: Positive = 5e-4
    batch: Count = 64
    activation: Literal["relu", "linear"] = "relu"
    """initialisation"""
    inputs: Count = 64
    """initialisation, reconstruction: dimension of the input"""
    samples: Count = 100
    """initialisation: networks; reconstruction: points"""
    rank: Count = 8
    """reconstruction: of the data"""
    starts: Count = 4
    """reconstruction: of the search with tau = 1"""
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Params:
        if (self.network is not None) != (self.experiment == "network"):
            raise ValueError("experiment: network asks about a given network, and no other experiment takes one")
        if self.experiment == "training":
            if self.dataset is None:
                raise ValueError("experiment: training needs a dataset")
            if self.training != "standard" and self.radius == 0:
                raise ValueError(f"training: {self.training} needs a radius above 0")
        return self


class Result(Contract):
    tau: float
    """mean local tightness over outputs and inputs (networks); reconstruction: of the free autoencoder"""
    tau_deviation: float
    """standard deviation over inputs (networks) of the mean over outputs"""
    taus: Array | None = None
    """(examples,): of each input, mean over outputs"""
    constant: float | None = None
    """share of (input, output) that are constant near the input, whose tau counts as 1"""
    layers: list[str] = Field(default_factory=list)
    """names of the layers with weights"""
    onward: list[float] = Field(default_factory=list)
    """tau from each layer to the outputs"""
    pair_signs: list[float | None] = Field(default_factory=list)
    """of each two consecutive layers: share of (i, j) whose nonzero products have one sign; None: too large"""
    pair_majority: list[float | None] = Field(default_factory=list)
    """share of nonzero products that have the commoner sign of their (i, j)"""
    pair_tau: list[float | None] = Field(default_factory=list)

    accuracy_clean: float | None = None
    accuracy_pgd: float | None = None
    """right at the image and at what the attack found: an upper bound of robust accuracy"""
    certified_ibp: float | None = None
    certified_crown: float | None = None
    """by IBP or CROWN"""
    exact_robust: float | None = None
    """called robust by bounds or mixed-integer programming"""
    exact_possible: float | None = None
    """that, and what is neither called robust nor refuted"""

    network: str | None = None
    """training: `onnx:<sha-256>`, the trained network among the artifacts"""
    tau_initial: float | None = None
    """training: before it, at the same inputs"""
    accuracy_train: float | None = None

    ratio: float | None = None
    """initialisation: mean exact half-width over mean IBP half-width"""
    ratio_expected: float | None = None
    """its closed form"""
    ratio_asymptotic: float | None = None
    """(pi / (2 d))^((depth - 1) / 2), d: width, or half of it with ReLUs"""

    error_free: float | None = None
    """reconstruction: share of the data's squared norm that is lost"""
    error_invariant: float | None = None
    """the least found with tau = 1"""
    tau_invariant: float | None = None
    """of that autoencoder: 1 up to rounding"""


EXAMPLE: dict[str, Any] = {
    "jobs": [
        {
            "method": "lipschitz.ibp_tightness",
            "params": {"experiment": "initialisation", "samples": 30},
            "grid": {"depth": [2, 3, 4], "width": [8, 16, 32, 64]},
        },
        {
            "method": "lipschitz.ibp_tightness",
            "params": {"experiment": "training", "examples": 50, "depth": 2, "epochs": 20, "learning_rate": 5e-3},
            "grid": {"training": ["standard", "pgd", "ibp", "sabr"], "width": [16, 32]},
        },
        {
            "method": "lipschitz.ibp_tightness",
            "params": {
                "network": {
                    "dataset": "digits",
                    "architecture": {"kind": "mlp", "hidden": [32]},
                    "training": {"kind": "ibp"},
                    "seed": 0,
                    "epochs": 8,
                },
                "examples": 50,
                "radius": 0.05,
            },
        },
        {
            "method": "lipschitz.ibp_tightness",
            "params": {"experiment": "reconstruction", "inputs": 16, "rank": 4, "starts": 2},
            "grid": {"width": [1, 2, 4, 8]},
        },
    ]
}

#: Outputs of the networks drawn for `initialisation`, as many as digits has classes.
OUTPUTS = 10


def needs(params: Params) -> Needs:
    """A first guess, of digits and small networks: measured timings replace it."""
    libraries = ("numpy", "torch", "sklearn.datasets", "scipy.optimize")
    memory = 768 * 2**20 + (data.memory(params.dataset) if params.dataset is not None else 0)
    inner = max(0, params.depth - 2) * params.width**2
    weights = params.width * (params.inputs + OUTPUTS) + inner
    if params.experiment == "initialisation":
        # Two products of OUTPUTS rows, and the draws themselves, of which there are as many as weights.
        seconds = 0.05 + params.samples * (3e-4 + 4e-8 * weights)
        return Needs(seconds=seconds, memory=memory, libraries=libraries)
    if params.experiment == "reconstruction":
        return Needs(
            seconds=0.1 + params.starts * 0.02 * (params.inputs * params.width) ** 0.5,
            memory=memory,
            libraries=libraries,
        )
    seconds = 1.0 + params.examples * (0.02 + 2.0 * params.exact)
    if params.experiment == "training":
        passes = {"standard": 3, "pgd": 24, "ibp": 9, "sabr": 33, "crown_ibp": 60}[params.training]
        steps = params.epochs * 20
        seconds += steps * (4e-4 * passes**0.5 + passes * params.batch * weights / 1e10)
    return Needs(seconds=seconds, memory=memory, libraries=libraries)


def run(params: Params) -> Result:
    """Raises NotApplicable for operations without a rule, InvalidInput where data and network do not fit,
    NumericalError where training diverges or a weight is not finite.
    """
    return {
        "network": _network,
        "training": _training,
        "initialisation": _initialisation,
        "reconstruction": _reconstruction,
    }[params.experiment](params)


# --- networks ---------------------------------------------------------------------------------------------------------


def _network(params: Params) -> Result:
    assert params.network is not None
    return Result(**_measured(params, networks.load(params.network)))


def recipe_of(params: Params) -> recipes.Recipe:
    """What `training` trains, as a recipe: `networks.train` gives the same network."""
    kinds: dict[str, dict[str, Any]] = {
        "standard": {"kind": "standard"},
        "pgd": {"kind": "pgd"},
        "ibp": {"kind": "ibp", "warm_up": 0.0, "kappa": 0.0},
        "sabr": {"kind": "sabr", "share": params.share},
        "crown_ibp": {"kind": "crown_ibp", "beta": params.share},
    }
    training = kinds[params.training]
    if params.training != "standard":
        training |= {"radius": params.radius, "ramp": 0.5}
    return recipes.Recipe.model_validate(
        {
            "dataset": params.dataset,
            "seed": params.seed,
            "architecture": {"kind": "mlp", "hidden": [params.width] * (params.depth - 1)},
            "training": training,
            "epochs": params.epochs,
            "batch": params.batch,
            "learning_rate": params.learning_rate,
            "weight_decay": 0.0,
        }
    )


def _training(params: Params) -> Result:
    from netassay.networks import onnx_file, training

    recipe = recipe_of(params)
    trained = training.train(recipe)
    x, _ = _inputs(params, trained.graph)
    start = training.initial(recipe, torch.Generator().manual_seed(recipe.seed))
    return Result(
        **_measured(params, trained.graph),
        network=networks.keep(onnx_file.write(trained.graph, "ibp_tightness")),
        tau_initial=float(tightness.local(start, x).tau.mean()),
        accuracy_train=trained.curves.accuracy_train[-1],
    )


def _measured(params: Params, graph: Graph) -> dict[str, Any]:
    """The fields of a result that every network has."""
    x, y = _inputs(params, graph)
    try:
        local = tightness.local(graph, x)
    except NotImplementedError as error:
        raise NotApplicable("the network is no chain of linear layers and ReLUs", str(error)) from None
    if not bool(torch.isfinite(local.tau).all()):
        raise NumericalError(
            "tau is not finite",
            "a weight, or a product of weights, is too large, or is not a number",
            "check the network's weights for NaN and infinity, or scale them down",
        )
    taus, pairs = local.tau.mean(1), tightness.pairs(graph)
    found = {
        "tau": float(taus.mean()),
        "tau_deviation": float(taus.std(correction=0)),
        "taus": taus.numpy(),
        "constant": float(local.constant.double().mean()),
        "layers": list(local.layers),
        "onward": local.onward.mean(0).tolist(),
        "pair_signs": [None if pair is None else pair.signs for pair in pairs],
        "pair_majority": [None if pair is None else pair.majority for pair in pairs],
        "pair_tau": [None if pair is None else pair.tau for pair in pairs],
    }
    if y is not None and math.prod(graph.output_shape) > 1:
        found |= _accuracies(params, graph, x, y)
    return found


def _inputs(params: Params, graph: Graph) -> tuple[Tensor, Tensor | None]:
    """Inputs (n, *input shape), float64, and labels; None for inputs that were drawn."""
    if params.dataset is None:
        generator = torch.Generator().manual_seed(params.seed)
        return torch.randn(params.examples, *graph.input_shape, generator=generator, dtype=torch.float64), None
    examples = data.load(params.dataset, params.split)
    if math.prod(examples.x.shape[1:]) != math.prod(graph.input_shape):
        raise InvalidInput(
            f"the network does not take {data.called(params.dataset)}",
            f"its input has the shape {graph.input_shape}, an example {examples.x.shape[1:]}",
            "another dataset, or a network trained on this one",
        )
    count = min(params.examples, len(examples))
    x = torch.from_numpy(np.array(examples.x[:count])).reshape(count, *graph.input_shape)
    y = torch.from_numpy(np.array(examples.y[:count]))
    classes = math.prod(graph.output_shape)
    if classes > 1 and int(y.max()) >= classes:
        raise InvalidInput(
            f"{data.called(params.dataset)} has the label {int(y.max())}, but the network has {classes} outputs",
            what_to_try="a network for this dataset, or dataset: null",
        )
    return x, y


def _accuracies(params: Params, graph: Graph, x: Tensor, y: Tensor) -> dict[str, float]:
    if params.clip and not 0.0 <= float(x.min()) <= float(x.max()) <= 1.0:
        raise InvalidInput(
            f"{data.called(str(params.dataset))} does not lie in [0, 1]",
            f"its values go from {float(x.min()):g} to {float(x.max()):g}, and the ball is cut with [0, 1]",
            "clip: false, or scale: minmax for the dataset",
        )
    low, high = (0.0, 1.0) if params.clip else (-math.inf, math.inf)
    region = Ball("inf", x, torch.full((len(x),), params.radius, dtype=torch.float64), low, high)
    with torch.no_grad():
        clean = _right(graph, x, y)
        seeds = [params.seed + place for place in range(len(x))]
        attack = attacks.pgd(graph, region, y, steps=params.steps, restarts=params.restarts, seeds=seeds)
        standing = clean & (_right(graph, attack.points, y) | ~attack.inside)
        rows = _rows(y, math.prod(graph.output_shape))
        boxes = interval.propagate(graph, region)
        by_ibp = clean & (backward.box_margins(graph, boxes, rows) > 0).all(1)
        by_crown = by_ibp.clone()
        rest = (standing & ~by_ibp).nonzero()[:, 0]
        found = {
            "accuracy_clean": _share(clean),
            "accuracy_pgd": _share(standing),
            "certified_ibp": _share(by_ibp),
        }
        bounds = backward.lower(graph, region[rest], rows[rest]) if len(rest) else None
        if bounds is not None:
            by_crown[rest] = (bounds.lower > 0).all(1)
        found["certified_crown"] = _share(by_crown)
        if params.exact:
            robust, possible = by_crown.clone(), standing.clone()
            if bounds is not None:
                _decide(params, graph, bounds, rest, rows, robust, possible)
            found |= {"exact_robust": _share(robust), "exact_possible": _share(possible)}
    return found


def _right(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
    return forward(graph, x).flatten(1).argmax(1) == y


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _rows(labels: Tensor, classes: int) -> Tensor:
    """The specification f_y - f_j, one row for each j != y: (batch, classes - 1, classes), float64."""
    one = torch.eye(classes, dtype=torch.float64)
    rows = one[labels][:, None] - one
    return rows[~one[labels].bool()].reshape(len(labels), classes - 1, classes)


#: What the solver must leave between its bound of a margin and 0, as a share of the largest output, to have the example
#: called robust: far above its feasibility tolerance of 1e-6.
_LEEWAY = 1e-4


def _decide(
    params: Params,
    graph: Graph,
    bounds: backward.Lower,
    rest: Tensor,
    rows: Tensor,
    robust: Tensor,
    possible: Tensor,
) -> None:
    """Asks the solver about each rival that CROWN leaves open; writes into `robust` and `possible`."""
    try:
        program = milp.Program(graph)
    except milp.TooLarge as error:
        raise NotApplicable("the network is too large for exact: true", str(error)) from None
    for place, example in enumerate(rest.tolist()):
        values = {
            name: interval.Interval(box.lower[place : place + 1], box.upper[place : place + 1])
            for name, box in bounds.values.items()
        }
        output = values[graph.output]
        leeway = _LEEWAY * max(1.0, float(output.magnitude().max()))
        # The most doubtful rival first: it is the likeliest to refute.
        order = [rival for rival in bounds.lower[place].argsort().tolist() if not bounds.lower[place, rival] > 0]
        proved = True
        for rival in order:
            row = rows[example, rival]
            optimum = program.minimum(values, row.numpy(), params.nodes)
            if optimum.point is not None:
                point = torch.from_numpy(optimum.point)[None]
                if float(forward(graph, point).flatten() @ row) < 0:
                    possible[example] = proved = False
                    break
            proved = proved and optimum.bound > leeway
        robust[example] |= proved


# --- drawn networks, autoencoders -------------------------------------------------------------------------------------


def _initialisation(params: Params) -> Result:
    hidden, relu = [params.width] * (params.depth - 1), params.activation == "relu"
    exact, box = tightness.gaussian([params.inputs, *hidden, OUTPUTS], params.samples, params.seed, relu)
    taus = tightness.quotient(exact, box)
    return Result(
        tau=float(taus.mean()),
        tau_deviation=float(taus.mean(1).std(correction=0)),
        constant=float((box == 0).double().mean()),
        ratio=float(exact.mean() / box.mean()) if float(box.sum()) > 0 else 1.0,
        ratio_expected=tightness.gaussian_ratio(hidden, relu),
        ratio_asymptotic=tightness.asymptotic_ratio(params.width, params.depth, relu),
    )


def _reconstruction(params: Params) -> Result:
    x = autoencoders.gaussian_data(params.inputs, params.rank, params.samples, params.seed)
    free = autoencoders.free(x, params.width)
    held = autoencoders.sign_structured(x, params.width, params.starts, params.seed)
    taus, taus_held = (
        tightness.quotient((one.second @ one.first).abs().sum(1), (one.second.abs() @ one.first.abs()).sum(1))
        for one in (free, held)
    )
    return Result(
        tau=float(taus.mean()),
        tau_deviation=float(taus.std(correction=0)),
        error_free=free.error,
        error_invariant=held.error,
        tau_invariant=float(taus_held.mean()),
    )


# --- the picture ------------------------------------------------------------------------------------------------------

#: Lines drawn in one panel; more cannot be told apart.
_DRAWN = 6


def plot(records: list[Record]) -> Figure:
    """Tightness at the start against width and depth, with its closed form; after training against width; certified
    accuracy against tightness; and what tightness 1 costs a linear autoencoder. Panels without jobs are left out.
    """
    done = [(Params.model_validate(record.params), record) for record in records if record.result is not None]
    of: defaultdict[str, list[tuple[Params, Record]]] = defaultdict(list)
    for params, record in done:
        of[params.experiment].append((params, record))
    panels = [
        _at_start(of["initialisation"], "width", "depth"),
        _at_start(of["initialisation"], "depth", "width"),
        _after_training(of["training"]),
        _scatter([*of["training"], *of["network"]]),
        _losses(of["reconstruction"]),
    ]
    missing = len(records) - len(done)
    caption = f"{len(records):,} jobs" + (f", {missing:,} of them without a result" if missing else "")
    if of["initialisation"]:
        caption += ". At initialisation: points are measured, dashed lines are the closed form"
    return Figure(
        title="Tightness of interval bounds",
        caption=f"{caption}.",
        panels=[panel for panel in panels if panel is not None] or [Panel(marks=[])],
        columns=2,
    )


_Done = Sequence[tuple[Params, "Record"]]


def _value(record: Record, field: str) -> float | None:
    """A number of a result that is there and finite: NaN is stored as itself, and no axis holds it."""
    value = (record.result or {}).get(field)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _means(pairs: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """x -> mean of the values there are, in order of x."""
    at: defaultdict[int, list[float]] = defaultdict(list)
    for x, value in pairs:
        if value is not None:
            at[x].append(value)
    return {x: sum(values) / len(values) for x, values in sorted(at.items())}


def _at_start(done: _Done, along: str, apart: str) -> Panel | None:
    series: defaultdict[tuple[int, str], list[tuple[Params, Record]]] = defaultdict(list)
    for params, record in done:
        series[getattr(params, apart), params.activation].append((params, record))
    several = len({activation for _, activation in series}) > 1
    marks: list[Any] = []
    for (value, activation), items in sorted(series.items()):
        measured = _means((getattr(params, along), _value(record, "ratio")) for params, record in items)
        expected = _means((getattr(params, along), _value(record, "ratio_expected")) for params, record in items)
        positive = {x: y for x, y in measured.items() if y > 0}
        if len(expected) < 2 or len(marks) >= 2 * _DRAWN:
            continue
        label = f"{apart} {value}" + (f", {activation}" if several else "")
        marks.append(Line(x=list(expected), y=list(expected.values()), label=label, dashed=True))
        marks.append(Points(x=list(positive), y=list(positive.values()), label=label))
    if not marks:
        return None
    return Panel(
        title=f"at initialisation, against {along}",
        x=Axis(label=along, scale="log" if along == "width" else "linear"),
        y=Axis(label="tightness", scale="log"),
        marks=marks,
    )


def _after_training(done: _Done) -> Panel | None:
    """A line for each training, of the depth and radius that have the most widths; dashed: before training."""
    widths: defaultdict[tuple[int, float], set[int]] = defaultdict(set)
    for params, _ in done:
        widths[params.depth, params.radius].add(params.width)
    depth, radius = max(widths, key=lambda key: (len(widths[key]), key), default=(0, 0.0))
    done = [(params, record) for params, record in done if (params.depth, params.radius) == (depth, radius)]
    before = _means((params.width, _value(record, "tau_initial")) for params, record in done)
    if len(before) < 2:
        return None
    marks: list[Any] = []
    for training in TRAININGS:
        taus = _means((params.width, _value(record, "tau")) for params, record in done if params.training == training)
        if taus:
            marks.append(Line(x=list(taus), y=list(taus.values()), label=training, points=True))
    marks.append(Line(x=list(before), y=list(before.values()), label="before", dashed=True))
    return Panel(
        title=f"after training, depth {depth}, radius {radius:g}",
        x=Axis(label="width", scale="log"),
        y=Axis(label="tightness", scale="log"),
        marks=marks,
    )


def _scatter(done: _Done) -> Panel | None:
    series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for params, record in done:
        tau, certified = _value(record, "tau"), _value(record, "certified_crown")
        if tau is not None and certified is not None:
            label = params.training if params.experiment == "training" else networks.short(record.name("network"))
            series[label].append((tau, certified))
    if not series:
        return None
    if len(series) > len(TRAININGS) + 2:
        given = [pair for label, pairs in series.items() if label not in TRAININGS for pair in pairs]
        series = defaultdict(list, {label: pairs for label, pairs in series.items() if label in TRAININGS})
        series["networks"] = given
    return Panel(
        title="certified accuracy against tightness",
        x=Axis(label="tightness", low=0, high=1),
        y=Axis(label="certified by IBP or CROWN", low=0, high=1, percent=True),
        marks=[
            Points(x=[tau for tau, _ in pairs], y=[certified for _, certified in pairs], label=label)
            for label, pairs in series.items()
        ],
    )


def _losses(done: _Done) -> Panel | None:
    series: defaultdict[tuple[int, int], list[tuple[Params, Record]]] = defaultdict(list)
    for params, record in done:
        series[params.inputs, params.rank].append((params, record))
    marks: list[Any] = []
    for (inputs, rank), items in sorted(series.items())[: _DRAWN // 2]:
        about = "" if len(series) == 1 else f", rank {rank} in {inputs}"
        for field, name in (("error_invariant", "tightness 1"), ("error_free", "free")):
            errors = _means((params.width, _value(record, field)) for params, record in items)
            if errors:
                line = Line(x=list(errors), y=list(errors.values()), label=name + about, points=True)
                marks.append(line.model_copy(update={"dashed": field == "error_free"}))
    if not marks:
        return None
    return Panel(
        title="linear autoencoder",
        x=Axis(label="hidden units", scale="log"),
        y=Axis(label="share of the data lost", low=0, percent=True),
        marks=marks,
    )
