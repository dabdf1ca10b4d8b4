"""The least value of c.f(x) over a box as a mixed-integer linear program: exact but for the solver's tolerances.

What lies between two ReLUs is an affine map, z = M a + b, of the values a behind the ReLUs before. A ReLU whose bounds
l < 0 < u leave its sign open gets a binary variable t:

    a >= 0,   a >= z,   a <= u t,   a <= z - l (1 - t);

t = 1 leaves a = z, t = 0 leaves a = 0. Solved by HiGHS through SciPy, up to a number of nodes of its search tree.

The solver works in floating point with tolerances of its own (1e-6), so its bound proves nothing by itself: it is a
figure to compare sound bounds with. The point it returns is a candidate; what it is worth, an evaluation tells.

Reference: Tjeng, Xiao, Tedrake. Evaluating robustness of neural networks with mixed integer programming. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netassay.heavy import np, scipy_optimize, scipy_sparse, torch
from netassay.networks.graph import Graph, Operation, Relu
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.linear import MAPS, chain, weights

if TYPE_CHECKING:
    import numpy

#: Values of a network, inputs included, up to which a program is built: far above what a search tree can decide.
_VALUES = 20_000


class TooLarge(ValueError):
    """A network with more values than a program is built for."""


@dataclass(frozen=True, eq=False)
class Optimum:
    """bound: the solver's lower bound of the least value. point: (*input), float64, in the box, of the least value it
    met; None where it met none. solved: the search came to its end, so that the two belong together.
    """

    bound: float
    point: numpy.ndarray | None
    solved: bool


@dataclass(frozen=True, eq=False)
class _Block:
    """z = matrix a + constant, the input of a ReLU, named `value`; of the last block: the output."""

    matrix: numpy.ndarray
    constant: numpy.ndarray
    value: str


class Program:
    """The programs of one network. Raises TooLarge, and NotImplementedError for an operation that is neither linear nor
    a ReLU.
    """

    def __init__(self, graph: Graph) -> None:
        size = math.prod(graph.input_shape) + sum(math.prod(operation.shape) for operation in chain(graph))
        if size > _VALUES:
            raise TooLarge(f"the network has {size:,} values; programs are built for up to {_VALUES:,}")
        self.graph, self.blocks = graph, list(_blocks(graph))

    def minimum(self, values: Mapping[str, Interval], row: numpy.ndarray, nodes: int) -> Optimum:
        """The least c.f over one box. values: bounds of all values over it, a batch of one. row: c, (outputs,)."""
        program = _Variables()
        before = program.add(*_ends(values[self.graph.input]))
        inputs = slice(before, program.count)
        *hidden, last = self.blocks
        for block in hidden:
            low, high = _ends(values[block.value])
            here = program.add(np.maximum(low, 0), np.maximum(high, 0))
            matrix, on = scipy_sparse.csr_array(block.matrix), np.flatnonzero(low >= 0)
            unit = scipy_sparse.eye_array(len(low), format="csr")
            program.row([(here, unit[on]), (before, -matrix[on])], block.constant[on], block.constant[on])
            split = np.flatnonzero((low < 0) & (high > 0))
            low, high, constant = low[split], high[split], block.constant[split]
            none, endless = np.zeros(len(split)), np.full(len(split), np.inf)
            switch = program.add(none, none + 1, whole=True)
            a, z = (here, unit[split]), (before, -matrix[split])
            program.row([a, z], constant, endless)
            program.row([a, (switch, -scipy_sparse.diags_array(high))], -endless, none)
            program.row([a, z, (switch, -scipy_sparse.diags_array(low))], -endless, constant - low)
            before = here
        cost = np.zeros(program.count)
        cost[before : before + last.matrix.shape[1]] = row @ last.matrix
        solved = program.solve(cost, nodes)
        # Without a whole variable it is a linear program, of which the solver tells no dual bound.
        linear = not any(whole.any() for _, _, whole in program.ranges)
        bound = solved.fun if linear and solved.status == 0 else solved.mip_dual_bound
        bound = -np.inf if bound is None else float(bound)
        point = None
        if solved.x is not None:
            point = np.clip(solved.x[inputs], *_ends(values[self.graph.input])).reshape(self.graph.input_shape)
        return Optimum(bound + float(row @ last.constant), point, solved.status == 0)


@dataclass
class _Variables:
    """What grows while a program is written down: ranges and kinds of variables, and the rows of its constraints."""

    count: int = 0
    ranges: list[tuple[Any, Any, Any]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    ends: list[tuple[Any, Any]] = field(default_factory=list)

    def add(self, low: numpy.ndarray, high: numpy.ndarray, whole: bool = False) -> int:
        """New variables; returns the place of the first."""
        start, self.count = self.count, self.count + len(low)
        self.ranges.append((low, high, np.full(len(low), float(whole))))
        return start

    def row(self, parts: list[tuple[int, Any]], least: numpy.ndarray, most: numpy.ndarray) -> None:
        """least <= sum of matrix x variables from start <= most, for parts (start, matrix)."""
        if len(least):
            self.rows.append([(start, scipy_sparse.coo_array(matrix)) for start, matrix in parts])
            self.ends.append((least, most))

    def solve(self, cost: numpy.ndarray, nodes: int) -> Any:
        low, high, whole = (np.concatenate(column) for column in zip(*self.ranges, strict=True))
        return scipy_optimize.milp(
            cost,
            constraints=self._constraints(),
            integrality=whole,
            bounds=scipy_optimize.Bounds(low, high),
            options={"node_limit": nodes, "mip_rel_gap": 0.0},
        )

    def _constraints(self) -> Any:
        if not self.rows:
            return ()
        numbers, down, across, height = [], [], [], 0
        for parts in self.rows:
            for start, matrix in parts:
                numbers.append(matrix.data)
                down.append(matrix.coords[0] + height)
                across.append(matrix.coords[1] + start)
            height += parts[0][1].shape[0]
        entries = np.concatenate(numbers), (np.concatenate(down), np.concatenate(across))
        least, most = (np.concatenate(column) for column in zip(*self.ends, strict=True))
        return scipy_optimize.LinearConstraint(
            scipy_sparse.csr_array(scipy_sparse.coo_array(entries, shape=(height, self.count))), least, most
        )


def _ends(box: Interval) -> tuple[numpy.ndarray, numpy.ndarray]:
    return box.lower[0].flatten().numpy(), box.upper[0].flatten().numpy()


def _blocks(graph: Graph) -> Iterator[_Block]:
    linear: list[Operation] = []
    at = graph.input
    for operation in chain(graph):
        if isinstance(operation, Relu):
            yield _block(graph, at, linear, operation.source)
            at, linear = operation.target, []
        else:
            linear.append(operation)
    yield _block(graph, at, linear, graph.output)


def _block(graph: Graph, source: str, linear: list[Operation], value: str) -> _Block:
    of_graph, shape = weights(graph, torch.float64), graph.shape_of(source)
    matrix = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    constant = torch.zeros(1, *shape, dtype=torch.float64)
    for operation in linear:
        w, apply = of_graph[operation.target], MAPS[type(operation)].apply
        matrix = apply(operation, w.weight, None, matrix)
        constant = apply(operation, w.weight, w.bias, constant)
    return _Block(matrix.flatten(1).T.contiguous().numpy(), constant.flatten().numpy(), value)
