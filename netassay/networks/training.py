"""Train a recipe: build its graph with random weights, then move the weights of its dense and conv operations.

The network under training is the same `Graph` that is exported: `evaluate.forward` reads the current weights in place
of the graph's own. All draws come from one generator seeded with the recipe's seed, in the order weights (layer by
layer), then one permutation of the examples an epoch; no global state is read or written. Two runs on one machine with
one thread agree bit for bit. Across machines and versions of PyTorch they agree in distribution only.

Weights start from He's uniform distribution, W ~ U(-sqrt(6 / n), sqrt(6 / n)) with n inputs to a unit, and biases at 0.
Optimiser: AdamW, the learning rate falling to 0 along half a cosine. Training that attacks draws the starts of its
attack from the same generator, batch by batch.

References:
He, Zhang, Ren, Sun. Delving deep into rectifiers. 2015 (equation 10: variance 2 / n).
Gowal, Dvijotham, Stanforth, et al. On the effectiveness of interval bound propagation for training verifiably robust
models. 2018 (equations 6 to 12, sections 3 and 4).
Sedghi, Gupta, Long. The singular values of convolutional layers. 2019 (theorem 6, for `conv_norm_bound`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netassay import data
from netassay.heavy import np, torch
from netassay.method import InvalidInput, NumericalError
from netassay.networks import evaluate, worst_cases
from netassay.networks.graph import Conv, Dense, Graph, Operation, Relu, Reshape
from netassay.networks.recipes import Cnn, CrownIbp, Ibp, Pgd, Recipe, Sabr, Spectral

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[Operation, tuple[Tensor, Tensor]]

#: A projected norm is put this share below its ceiling, so that rounding to float32 cannot lift it above.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Curves:
    """One number an epoch. loss: mean training loss over the epoch's steps, as minimised (for ibp at its current kappa
    and radius); accuracies: of the weights at the end of the epoch, as fractions."""

    loss: list[float]
    accuracy_train: list[float]
    accuracy_test: list[float]


@dataclass(frozen=True)
class Trained:
    graph: Graph
    curves: Curves


def parameters(graph: Graph) -> int:
    """Number of trainable parameters: weights and biases of dense and conv operations."""
    return sum(op.weight.size + op.bias.size for op in graph.operations if isinstance(op, Dense | Conv))


def steps(recipe: Recipe) -> int:
    """Optimiser steps of a recipe: epochs x batches of the training split (the last of an epoch may be smaller)."""
    return recipe.epochs * math.ceil(data.size(recipe.dataset, "train") / recipe.batch)


def train(recipe: Recipe) -> Trained:
    """The trained network of a recipe and its curves.

    Raises NumericalError where the loss stops being finite, InvalidInput where a cnn is given no images.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    graph = initial(recipe, generator)
    x, y = _tensors(recipe.dataset, "train")
    x_test, y_test = _tensors(recipe.dataset, "test")
    weights: Weights = {
        op: tuple(torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in (op.weight, op.bias))  # type: ignore[misc]
        for op in graph.operations
        if isinstance(op, Dense | Conv)
    }
    _project(recipe, graph, weights)
    optimiser = torch.optim.AdamW(
        [
            {"params": [weight for weight, _ in weights.values()], "weight_decay": recipe.weight_decay},
            {"params": [bias for _, bias in weights.values()], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        foreach=True,
    )
    total, step = steps(recipe), 0
    curves = Curves([], [], [])
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(y), generator=generator)
        losses = []
        for chosen in order.split(recipe.batch):
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / total))
            optimiser.zero_grad()
            loss = _loss(recipe, graph, weights, x[chosen], y[chosen], step / total, generator)
            loss.backward()
            optimiser.step()
            _project(recipe, graph, weights)
            losses.append(loss.detach())
            step += 1
        curves.loss.append(float(torch.stack(losses).mean()))
        if not math.isfinite(curves.loss[-1]):
            raise NumericalError(
                f"the loss was {curves.loss[-1]} in epoch {epoch}", "training diverged", "a smaller learning_rate"
            )
        with torch.no_grad():
            curves.accuracy_train.append(_accuracy(graph, weights, x, y))
            curves.accuracy_test.append(_accuracy(graph, weights, x_test, y_test))
    return Trained(_baked(graph, weights), curves)


def initial(recipe: Recipe, generator: torch.Generator) -> Graph:
    """The network of a recipe before training, with weights drawn from the generator (float32 values in float64)."""
    shape = data.shape(recipe.dataset)
    if isinstance(recipe.architecture, Cnn) and len(shape) != 3:
        raise InvalidInput(
            f"a cnn reads images, but {data.called(recipe.dataset)} has shape {shape}",
            "an image has channels, height and width",
            "kind: mlp, or a file's shape, e.g. [1, 28, 28]",
        )
    build = _Builder(shape, generator)
    architecture = recipe.architecture
    if isinstance(architecture, Cnn):
        for place, channels in enumerate(architecture.channels):
            build.conv(channels, stride=1 if place == 0 else 2)
            build.relu()
        widths = [architecture.hidden]
    else:
        widths = list(architecture.hidden)
    build.flatten()
    for width in widths:
        build.dense(width)
        build.relu()
    build.dense(data.classes(recipe.dataset))
    return Graph(tuple(build.operations), "input", build.last, shape, build.shape)


class _Builder:
    def __init__(self, shape: tuple[int, ...], generator: torch.Generator) -> None:
        self.operations: list[Operation] = []
        self.shape, self.last, self.generator = shape, "input", generator

    def _add(self, kind: type[Operation], shape: tuple[int, ...], **constants: object) -> None:
        name = f"{kind.__name__.lower()}{1 + sum(isinstance(op, kind) for op in self.operations)}"
        self.operations.append(kind(name=name, source=self.last, target=name, shape=shape, **constants))
        self.last, self.shape = name, shape

    def _he(self, *shape: int) -> object:
        bound = math.sqrt(6.0 / math.prod(shape[1:]))
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float32) * (2 * bound) - bound
        return drawn.double().numpy()

    def dense(self, width: int) -> None:
        self._add(Dense, (width,), weight=self._he(width, self.shape[0]), bias=np.zeros(width))

    def conv(self, channels: int, stride: int) -> None:
        inputs, height, width = self.shape
        shape = (channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
        self._add(
            Conv,
            shape,
            weight=self._he(channels, inputs, 3, 3),
            bias=np.zeros(channels),
            stride=(stride, stride),
            padding=(1, 1, 1, 1),
            dilation=(1, 1),
            groups=1,
        )

    def relu(self) -> None:
        self._add(Relu, self.shape)

    def flatten(self) -> None:
        if len(self.shape) > 1:
            self._add(Reshape, (math.prod(self.shape),))


def _tensors(dataset: str, split: str) -> tuple[Tensor, Tensor]:
    examples = data.load(dataset, split)
    return torch.tensor(examples.x, dtype=torch.float32), torch.tensor(examples.y)


def _accuracy(graph: Graph, weights: Weights, x: Tensor, y: Tensor) -> float:
    return float((evaluate.forward(graph, x, weights).argmax(1) == y).double().mean())


def _baked(graph: Graph, weights: Weights) -> Graph:
    """The graph with these weights as its constants."""

    def with_weights(op: Operation) -> Operation:
        if not isinstance(op, Dense | Conv):
            return op
        weight, bias = (tensor.detach().double().numpy() for tensor in weights[op])
        return replace(op, weight=weight, bias=bias)

    return replace(graph, operations=tuple(with_weights(op) for op in graph.operations))


def _loss(
    recipe: Recipe,
    graph: Graph,
    weights: Weights,
    x: Tensor,
    y: Tensor,
    progress: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean loss of a batch at this share of all steps."""
    cross_entropy, training = torch.nn.functional.cross_entropy, recipe.training
    radius, kappa = 0.0, 1.0
    if isinstance(training, Ibp):
        radius, kappa = schedule(training, progress)
    elif isinstance(training, Pgd | Sabr | CrownIbp):
        radius = ramped(training, progress)
        kappa = 1.0 - radius / training.radius
    if radius == 0.0:
        return cross_entropy(evaluate.forward(graph, x, weights), y)
    if isinstance(training, Pgd):
        attacked = worst_cases.attacked(graph, weights, x, y, radius, training.steps, generator)
        return cross_entropy(evaluate.forward(graph, attacked, weights), y)
    nominal, worst = _margins(graph, weights, x, y, radius)
    if isinstance(training, Sabr):
        attacked = worst_cases.attacked(graph, weights, x, y, radius, training.steps, generator)
        room = (1.0 - training.share) * radius
        middle = torch.minimum(torch.maximum(attacked, x - room), x + room)
        worst = _margins(graph, weights, middle, y, training.share * radius)[1]
    if isinstance(training, CrownIbp):
        beta = 1.0 - (1.0 - training.beta) * radius / training.radius
        # A mean of two upper bounds is one.
        worst = beta * worst_cases.linear_margins(graph, weights, x, y, radius) + (1.0 - beta) * worst
    # Cross-entropy of margins: the entry of the true class is 0 in both, as in equations 9 and 11.
    return kappa * cross_entropy(nominal, y) + (1.0 - kappa) * cross_entropy(worst, y)


def ramped(training: Pgd | Sabr | CrownIbp, progress: float) -> float:
    """The radius at a share of all steps in 0..1."""
    return training.radius * (min(progress / training.ramp, 1.0) if training.ramp > 0 else 1.0)


def schedule(training: Ibp, progress: float) -> tuple[float, float]:
    """(radius, kappa) at a share of all steps in 0..1."""
    if training.ramp > 0:
        grown = min(max((progress - training.warm_up) / training.ramp, 0.0), 1.0)
    else:
        grown = float(progress >= training.warm_up)
    return training.radius * grown, 1.0 - (1.0 - training.kappa) * grown


def _margins(graph: Graph, weights: Weights, x: Tensor, y: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """(z_j - z_y at x, upper bound of z_j - z_y over the box): both (n, classes), zero at j = y.

    Boxes go through the network as centre and radius (equation 6). The last layer is merged with the differences
    (section 3, "elision"): its bound is |w_j - w_y| times the radius rather than a difference of two bounds. The
    nominal value is that of the input itself, carried beside the box, which is not its centre after a ReLU.
    """
    *body, last = graph.operations
    if not isinstance(last, Dense):
        raise TypeError("interval bound propagation expects a dense last operation")
    value, centre, spread = x, x, torch.full_like(x, radius)
    for op in body:
        if isinstance(op, Dense | Conv):
            weight, bias = weights[op]
            # One product for both: a batch of twice the size is cheaper than two.
            both = evaluate.linear(op, torch.cat([value, centre]), weight, bias)
            value, centre = both[: len(x)], both[len(x) :]
            spread = evaluate.linear(op, spread, weight.abs(), None)
        elif isinstance(op, Relu):
            lower, upper = torch.relu(centre - spread), torch.relu(centre + spread)
            value, centre, spread = torch.relu(value), (upper + lower) / 2, (upper - lower) / 2
        else:
            value, centre, spread = (evaluate.apply(op, part) for part in (value, centre, spread))
    weight, bias = weights[last]
    nominal = torch.nn.functional.linear(value, weight, bias)
    logits = torch.nn.functional.linear(centre, weight, bias)
    # (classes, classes, inputs) first, then picked by label: 10 x 10 differences for any batch.
    between = (weight[None, :, :] - weight[:, None, :]).abs()
    spreads = torch.einsum("ni,cji->ncj", spread, between)[torch.arange(len(y)), y]
    true = y[:, None]
    return nominal - nominal.gather(1, true), logits - logits.gather(1, true) + spreads


def _project(recipe: Recipe, graph: Graph, weights: Weights) -> None:
    """For spectral training, put every weight back under the ceiling; in place, outside of the gradient.

    A matrix loses the part of its singular values above the ceiling: the nearest matrix (in Frobenius norm) whose norm
    obeys it. A kernel is scaled down by `conv_norm_bound`, an upper bound, so a convolution may stay below the ceiling.
    """
    if not isinstance(recipe.training, Spectral):
        return
    ceiling = recipe.training.ceiling * (1.0 - _MARGIN)
    with torch.no_grad():
        for op, (weight, _) in weights.items():
            if isinstance(op, Conv):
                bound = conv_norm_bound(weight, graph.shape_of(op.source)[1:])
                weight *= min(1.0, ceiling / max(bound, ceiling))
            elif float(torch.linalg.matrix_norm(weight)) > ceiling:  # Frobenius first: it bounds the spectral norm
                left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
                if float(values[0]) > ceiling:
                    weight.copy_((left * values.clamp(max=ceiling)) @ right)


def conv_norm_bound(weight: Tensor, size: tuple[int, ...]) -> float:
    """Upper bound of the spectral norm of a zero-padded convolution, of any stride and of padding up to kernel - 1.

    weight: (out, in, kh, kw), undilated, one group; size: (height, width) of its input. On a torus of
    (height + kh - 1) x (width + kw - 1) points the circular convolution does not wrap onto the image, so the padded
    one is that convolution between an embedding and a selection of outputs, neither of which lengthens a vector. The
    norm of the circular one is exact: the largest over all frequencies of the out x in matrix of transforms.
    """
    torus = [length + kernel - 1 for length, kernel in zip(size, weight.shape[2:], strict=True)]
    transfer = torch.fft.rfft2(weight.double(), s=torus).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(transfer, ord=2).max())
