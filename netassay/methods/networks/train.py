"""Train a network from a recipe, and report its accuracy and its learning curves.

    accuracy = (examples x with argmax_k f_k(x) = label of x) / (examples of the split)

f_k(x) is logit k of the trained network f. Train and test are the splits of `netassay.data` (every third example is a
test example). The curves hold one number an epoch: `loss`, the mean training loss as minimised (for ibp at the kappa
and radius of that moment, so it may rise while they ramp up), and the two accuracies as fractions. The network is kept
as an ONNX file (float32, weights as they stand after the last step): `network` is its reference.

Kinds of training: `standard` cross-entropy; `ibp`, interval bound propagation; `pgd`, at attacked points; `sabr`,
interval bounds in small boxes around these; `crown_ibp`, linear and interval bounds mixed; `spectral`, every layer's
spectral norm at or below a ceiling. It is no tuning: no validation split, no early stopping, no data augmentation. Same
recipe, same machine, one thread: the same bytes.

Cost: epochs x examples x multiply-adds of the network, x 3 for forward and backward, x 3 more for ibp; each step of an
attack costs as much as a step of standard training, and crown_ibp as much for each class. spectral adds a singular
value decomposition of every weight a step, which dominates above a width of some hundreds. There is no `run_many`:
recipes differ in what they draw and in length, and one small network already fills a core.

Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018.
"""

from __future__ import annotations

import math

from netassay import data, figure, networks
from netassay.fields import Probability, RecipeRef
from netassay.job import Record
from netassay.method import Contract, Needs
from netassay.networks import onnx_file, recipes, training
from netassay.store.artifacts import MissingArtifact

VERSION = 1
#: Training magnifies the last bit of a processor's arithmetic.
GOLDEN_TOLERANCE = 0.05

#: Curves drawn in one plot; more cannot be told apart.
_DRAWN = 7


class Params(Contract):
    recipe: RecipeRef


class Result(Contract):
    network: str
    """`onnx:<sha-256>`: the trained network among the artifacts."""
    accuracy_train: Probability
    accuracy_test: Probability
    parameters: int
    """Weights and biases, counted."""
    epochs: int
    loss: list[float]
    """Mean training loss of each epoch."""
    curve_train: list[float]
    """Accuracy on the training split after each epoch."""
    curve_test: list[float]
    """Accuracy on the test split after each epoch."""


EXAMPLE = {
    "jobs": [
        {
            "method": "networks.train",
            "grid": {
                "recipe": [
                    {"dataset": "iris", "seed": 0, "architecture": {"kind": "mlp", "hidden": [16]}, "epochs": 20},
                    {"dataset": "iris", "seed": 1, "architecture": {"kind": "mlp", "hidden": [16]}, "epochs": 20},
                    {"dataset": "digits", "training": {"kind": "ibp", "radius": 0.05}, "epochs": 10},
                ]
            },
        }
    ]
}


def needs(params: Params) -> Needs:
    """From the recipe's size; measured on one core: 1.5 ms a step, and about 4e9 multiply-adds a second."""
    try:
        recipe = recipes.from_reference(params.recipe)
        weights, multiply_adds = _size(recipe)
    except MissingArtifact:  # asked about a recipe or dataset that is kept elsewhere: a small one is the best guess
        return Needs(seconds=5.0, libraries=("numpy", "torch", "sklearn.datasets"))
    passes, overhead = 3, 1.5e-3
    if recipe.training.kind in ("ibp", "sabr"):
        passes = 9
    elif recipe.training.kind == "crown_ibp":
        passes, overhead = 9 + 3 * data.classes(recipe.dataset), 4e-3
    if isinstance(recipe.training, recipes.Pgd | recipes.Sabr):
        passes, overhead = passes + 3 * recipe.training.steps, overhead + 3e-4 * recipe.training.steps
    seconds_a_step = overhead + passes * recipe.batch * multiply_adds / 4e9
    if recipe.training.kind == "spectral":
        # 20 n^3: the textbook count for a full decomposition (Golub, Van Loan. Matrix computations, table 8.6.1).
        seconds_a_step += sum(20 * min(shape) ** 2 * max(shape) for shape in weights) / 4e9
    return Needs(
        seconds=1.0 + training.steps(recipe) * seconds_a_step, libraries=("numpy", "torch", "sklearn.datasets")
    )


def _size(recipe: recipes.Recipe) -> tuple[list[tuple[int, int]], int]:
    """Shapes of the weights, kernels as matrices, and multiply-adds of one example."""
    shape, shapes, multiply_adds = data.shape(recipe.dataset), [], 0
    widths = (
        recipe.architecture.hidden if isinstance(recipe.architecture, recipes.Mlp) else (recipe.architecture.hidden,)
    )
    if isinstance(recipe.architecture, recipes.Cnn):
        channels, height, width = shape
        for place, outputs in enumerate(recipe.architecture.channels):
            height, width = (height, width) if place == 0 else ((height + 1) // 2, (width + 1) // 2)
            shapes.append((outputs, 9 * channels))
            multiply_adds += outputs * 9 * channels * height * width
            channels = outputs
        shape = (channels, height, width)
    inputs = math.prod(shape)
    for outputs in (*widths, data.classes(recipe.dataset)):
        shapes.append((outputs, inputs))
        multiply_adds += outputs * inputs
        inputs = outputs
    return shapes, multiply_adds


def run(params: Params) -> Result:
    recipe = recipes.from_reference(params.recipe)
    trained = training.train(recipe)
    curves = trained.curves
    return Result(
        network=networks.keep(onnx_file.write(trained.graph, params.recipe)),
        accuracy_train=curves.accuracy_train[-1],
        accuracy_test=curves.accuracy_test[-1],
        parameters=training.parameters(trained.graph),
        epochs=recipe.epochs,
        loss=curves.loss,
        curve_train=curves.accuracy_train,
        curve_test=curves.accuracy_test,
    )


def plot(records: list[Record]) -> figure.Figure:
    drawn = [(record.name("recipe"), record.result) for record in records if record.result is not None]
    shown = drawn[:_DRAWN]

    def panel(title: str, field: str, axis: figure.Axis) -> figure.Panel:
        marks = [
            figure.Line(x=list(range(1, len(result[field]) + 1)), y=list(result[field]), label=networks.short(name))
            for name, result in shown
        ]
        return figure.Panel(title=title, x=figure.Axis(label="epoch"), y=axis, marks=list(marks))

    left_out = f" The first {len(shown)} of {len(drawn)} are drawn." if len(shown) < len(drawn) else ""
    return figure.Figure(
        title="Training",
        caption=f"One line a recipe; accuracy on examples that were not trained on.{left_out}",
        panels=[
            panel("test accuracy", "curve_test", figure.Axis(label="accuracy", percent=True)),
            panel("training loss", "loss", figure.Axis(label="loss", scale="log")),
        ],
    )
