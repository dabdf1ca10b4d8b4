"""What floating point can change, as explicit error bounds. Two questions, kept apart.

*How far is an evaluation of the network from the exact one?* `evaluation`: one operation y = W x + b in unit roundoff u
errs by at most

    local = g (|W| (H + e(x)) + |b|),   g = k u / (1 - k u),  k = n + 6,   and   e(y) = |W| e(x) + local,

n the number of products in a sum, H >= |x| over the region, e(x) the error that x already has; ReLU passes e on. It
holds, with |factor| for |W|, for a sum of two values too; of a product x y, local = g H(x) H(y) and
e = H(y) e(x) + H(x) e(y) + local. It holds for any order of summation, fused or not, and for constants rounded to u
first (n + 2; Higham, Accuracy and stability of numerical algorithms, 2002, section 3.1); four more roundings a product
are for runtimes that multiply the scale of a following normalisation into the weights. An evaluated network is thus the
exact one with every value moved by at most its `local`.

*What can rounding in a backward (CROWN) pass add to a bound?* `backward`: a pass multiplies coefficients A by W with an
error of at most g |A| |W|, which changes the bound by at most g |A| |W| H. Slopes lie in [0, 1], so
|A| <= |C| |W_L| ... |W_l+1| for specification C, and the sum of all changes, intercepts (at most H) and biases
included, is at most |C| E(output) with

    E(input) = 2 s H,  E(W x + b) = |W| (E(x) + g H) + s |b|,  E(relu x) = E(x) + 2 s H,
    E(f(x)) = S E(x) + 2 s (S H + |f|),  E(x y) = H(y) E(x) + H(x) E(y) + 6 s H(x) H(y),  then doubled,

S the largest |f'| over the box of x, and so the largest slope of a line there (0 where f' has no bound: lines are flat
then), |f| the largest |f(x)|, and g for k roundings, more than any one coefficient sees. What goes into the constant,
intercepts and biases, and the minimum over the input, is summed over all numbers of a value, more than a convolution
sums for one of its outputs: s is g of so many terms. Doubling covers products of errors, and rounding in E itself, as
long as k u is below 1 %. A coefficient that underflows changes the bound by at most
tiny sum H, however small the weights after it are, so these changes are added up apart. Both cost one more product with
|W| per operation and box, whatever the number of rows.

*Can an evaluation overflow?* Not where |W| H + |b| stays below the largest number of its dtype: `load`. Where it does
not, an evaluation may end in infinity or NaN, and no bound above says anything about it.

Not covered: elementwise functions other than ReLU (`NotCovered`: what a runtime makes of a tanh in float32 is its own
affair; bounds on exact arithmetic hold), and evaluators that do not compute sums of products (Winograd convolutions),
compute them in fewer bits (TF32, bfloat16), or take subnormal constants for zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from netassay.heavy import torch
from netassay.networks.graph import Activation, Graph, Operation, Product, Relu, Sum
from netassay.numerics.bounds import relaxations
from netassay.numerics.bounds.linear import MAPS, Weights, operations, weights

if TYPE_CHECKING:
    from torch import Tensor

    from netassay.numerics.bounds.interval import Interval


#: Roundings of a product beyond its sum's: two of its own, four where a runtime fuses a normalisation into the weights.
ROUNDINGS = 6


class TooManyTerms(ValueError):
    """A sum so long that the error bound of its evaluation says nothing."""


class NotCovered(NotImplementedError):
    """An operation whose evaluation in floating point no error bound here covers."""


def covered(operation: Operation, evaluated: torch.dtype | None) -> None:
    """Raise NotCovered where evaluations in this dtype are asked about (not None) and the operation's have no bound."""
    if evaluated is not None and isinstance(operation, Activation):
        raise NotCovered(
            f"{operation.name} is a {operation.function}, of whose evaluation in {evaluated} nothing is known"
        )


def is_covered(graph: Graph) -> bool:
    """Whether evaluations of all operations of a graph have an error bound."""
    return not any(isinstance(operation, Activation) for operation in operations(graph))


def gamma(terms: int, dtype: torch.dtype) -> float:
    """k u / (1 - k u): the relative error of a sum of `terms` products in `dtype`.

    Raises TooManyTerms where k u is not below 1 %: float32 and sums of more than 160,000 terms.
    """
    unit = torch.finfo(dtype).eps / 2
    if terms * unit > 0.01:
        raise TooManyTerms(f"sums of {terms} terms cannot be bounded usefully in {dtype}; use float64")
    return terms * unit / (1 - terms * unit)


def smallest(dtype: torch.dtype) -> float:
    """The smallest normal number: more than what underflow can change in one operation."""
    return torch.finfo(dtype).tiny


def local_gamma(w: Weights, evaluated: torch.dtype | None) -> float:
    """g of one operation evaluated in this dtype; 0 for exact arithmetic and where nothing is computed."""
    return 0.0 if evaluated is None or w.weight is None else gamma(w.terms + ROUNDINGS, evaluated) * (1 + _GUARD)


def sum_gamma(evaluated: torch.dtype | None) -> float:
    """g of a sum or product of two values evaluated in this dtype; 0 for exact arithmetic."""
    return 0.0 if evaluated is None else gamma(2 + ROUNDINGS, evaluated) * (1 + _GUARD)


#: The bounds on errors are computed in rounded arithmetic themselves; far above what that can lose.
_GUARD = 2.0**-20


def evaluation(
    operation: Operation,
    w: Weights,
    values: Mapping[str, Interval],
    errors: Mapping[str, Tensor],
    evaluated: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """local and e of an operation's target, from boxes of the values before it as evaluated, and their e, by name.

    local is None where the operation computes nothing that rounds. Both (batch, *shape). Raises NotCovered.
    """
    covered(operation, evaluated)
    x, error = values[operation.source], errors[operation.source]
    if isinstance(operation, Relu):
        return None, error * (x.upper > 0)  # a neuron that stays off passes nothing on
    if isinstance(operation, Sum | Product):
        g, underflow = sum_gamma(evaluated), 8 * smallest(evaluated)
        y, other = values[operation.other], errors[operation.other]
        first, second = _factors(operation, x, y)
        size = first * x.magnitude() + (second * y.magnitude() if isinstance(operation, Sum) else 0.0)
        local = g * size + underflow
        return local, local + (first * error + second * other) * (1 + _GUARD)
    apply = MAPS[type(operation)].apply
    if w.bias is None:
        return None, apply(operation, None, None, error)
    g = local_gamma(w, evaluated)
    local = apply(operation, w.absolute, g * w.bias.abs(), g * x.magnitude()) + 4 * w.terms * smallest(evaluated)
    return local, local + apply(operation, w.absolute, None, error) * (1 + _GUARD)


def _factors(operation: Sum | Product, x: Interval, y: Interval) -> tuple[Tensor | float, Tensor | float]:
    """By how much at most an operation on two values multiplies a change of the first, and of the second."""
    if isinstance(operation, Sum):
        return abs(operation.factors[0]), abs(operation.factors[1])
    return y.magnitude(), x.magnitude()


def load(graph: Graph, values: dict[str, Interval], evaluated: torch.dtype) -> Tensor:
    """(batch,): the largest |W| H + |b| of an operation, in units of the largest number of `evaluated`.

    Below 1, no evaluation in this dtype overflows, nor does a partial sum of one. NaN or infinite where H is.
    Exact to 2 % upward: partial sums are rounded too. values: of `interval.propagate`, for the same `evaluated`.
    """
    limit = torch.finfo(evaluated).max
    of_graph = weights(graph, values[graph.input].lower.dtype)
    worst = torch.zeros(len(values[graph.input].lower), dtype=values[graph.input].lower.dtype)
    for operation in operations(graph):
        w, x = of_graph[operation.target], values[operation.source].magnitude()
        if isinstance(operation, Sum | Product):
            y = values[operation.other].magnitude()
            sums = (
                abs(operation.factors[0]) * x + abs(operation.factors[1]) * y if isinstance(operation, Sum) else x * y
            )
            sums = sums.flatten(1).amax(1)
        elif w.absolute is None or w.bias is None or w.constant is None:
            continue
        else:
            # Of every operation the cheap bound terms max |W| max H + max |b|; the sums only where that fails.
            sums = w.terms * w.absolute.amax() * x.flatten(1).amax(1) + w.constant.abs().amax()
            if not bool((_SUMMED * sums < limit).all()):
                exact = MAPS[type(operation)].apply(operation, w.absolute, w.bias.abs(), x).flatten(1).amax(1)
                sums = torch.where(_SUMMED * sums < limit, sums, exact)
        worst = torch.maximum(worst, _SUMMED * sums / limit)
    return worst


#: 1 + the largest g that `gamma` allows, twice: a partial sum in floating point is at most so much above the exact one.
_SUMMED = 1.02


def backward(graph: Graph, values: dict[str, Interval]) -> dict[str, Tensor]:
    """E of each value, (batch, *shape), for a pass in the dtype of `values`; for rows C whose largest |entry| is >= 1.

    values: valid boxes of all values, e.g. by `interval.propagate`.
    """
    dtype = values[graph.input].lower.dtype
    of_graph = weights(graph, dtype)
    steps = operations(graph)
    # 8 roundings an operation beyond its sums: slopes, intercepts, accumulation of the constant term.
    terms = max((w.terms for w in of_graph.values()), default=1)
    widest = max(math.prod(graph.input_shape), *(math.prod(operation.shape) for operation in steps), terms)
    g, s = (gamma(count + 8 * len(steps) + 16, dtype) for count in (terms, widest))
    found = {graph.input: 2 * s * values[graph.input].magnitude()}
    lost = {graph.input: torch.zeros(len(values[graph.input].lower), dtype=dtype)}
    for operation in steps:
        w, underflow = of_graph[operation.target], 4 * of_graph[operation.target].terms * smallest(dtype)
        error = _passed(operation, w, values, found, g, s)
        found[operation.target] = error + underflow
        # Each coefficient of a source may have lost this much, and meets |x| <= H.
        lost[operation.target] = sum(
            (lost[of] + underflow * values[of].magnitude().flatten(1).sum(1) for of in operation.sources),
            torch.zeros_like(lost[graph.input]),
        )
    return {value: 2 * (error + lost[value].reshape(-1, *[1] * (error.dim() - 1))) for value, error in found.items()}


def steepness(operation: Activation, x: Interval) -> Tensor:
    """The largest |f'| over a box: infinite where there is none."""
    ends = relaxations.derivative(operation.function, operation.parameters, x.lower, x.upper)
    return torch.maximum(ends[0].abs(), ends[1].abs())


def _passed(
    operation: Operation, w: Weights, values: Mapping[str, Interval], found: Mapping[str, Tensor], g: float, s: float
) -> Tensor:
    """E of an operation's target from those of its sources, but for underflow."""
    x, error = values[operation.source], found[operation.source]
    size = x.magnitude()
    if isinstance(operation, Relu):
        return error + 2 * s * size
    if isinstance(operation, Sum | Product):
        y = values[operation.other]
        first, second = _factors(operation, x, y)
        added = (
            g * (first * size + second * y.magnitude()) if isinstance(operation, Sum) else 6 * s * size * y.magnitude()
        )
        return first * error + second * found[operation.other] + added
    if isinstance(operation, Activation):
        steepest = steepness(operation, x)
        # Where there is no steepest slope, lines are flat (`backward.relaxation`).
        steepest = torch.where(torch.isfinite(steepest), steepest, 0.0)
        largest = values[operation.target].magnitude()
        return steepest * error + 2 * s * (steepest * size + largest)
    bias = None if w.bias is None else s * w.bias.abs()
    return MAPS[type(operation)].apply(operation, w.absolute, bias, error + g * size)
