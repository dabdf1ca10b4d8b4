"""Functions that exporters write in pieces, found among the nodes of a file before anything is lowered.

    gelu        x (1 + erf(c x)) k          = 2 k / s  gelu(s x),   s = c sqrt(2)
    gelu_tanh   x (1 + tanh(a (x + b x^3))) k,   a = sqrt(2 / pi), b = 0.044715
    silu        x sigmoid(c x) k            = k / c  silu(c x)
    hard_swish  x hardsigmoid(x) k, or x clip(x + 3, 0, 6) k
    mish        x tanh(softplus(x)) k
    softmax     exp(z) / sum exp(z),   z = x or x - max x

A relaxation of the whole function is far tighter than that of its pieces. Factors may stand in any order, and constants
may multiply or divide. c and k are the file's own, except that a factor s, k or c within a unit of float32 of 1 is
taken for 1, and a, b, 1/6 within that of the exact ones for these: differences below what a float32 runtime rounds.
Only where no other node reads the inner values.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from netassay.heavy import np
from netassay.networks.graph import Function
from netassay.networks.nodes import attributes, known

if TYPE_CHECKING:
    import numpy
    from onnx import NodeProto

#: Relative; a unit in the last place of float32.
_UNIT = 2.0**-23

#: Products are followed through so many nodes; the longest form above has five.
_DEPTH = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """outside * function(inside * source), or the softmax of the source over `axes`; computed by the node `root`."""

    source: str
    function: Function | None
    inside: float = 1.0
    outside: float = 1.0
    axes: tuple[int, ...] = ()


def pieces(
    nodes: Sequence[NodeProto], constants: dict[str, numpy.ndarray], uses: Counter[str]
) -> tuple[dict[str, Piece], set[str]]:
    """Pieces by the output of their last node, and the outputs of the nodes inside them.

    nodes: in topological order. uses: how often each tensor is read.
    """
    matcher = _Matcher({node.output[0]: node for node in nodes if known(node)}, constants, uses)
    found: dict[str, Piece] = {}
    inside: set[str] = set()
    for node in reversed(nodes):  # the last node of a form before those within it
        if node.op_type not in ("Mul", "Div") or not known(node) or node.output[0] in inside:
            continue
        matcher.passed = set()
        piece = matcher.softmax(node) or matcher.product(node)
        if piece is not None:
            found[node.output[0]] = piece
            inside |= matcher.passed - {node.output[0], piece.source}
    return found, inside


@dataclasses.dataclass
class _Matcher:
    """made: nodes by output. passed: outputs of the nodes looked through for one form."""

    made: dict[str, NodeProto]
    constants: dict[str, numpy.ndarray]
    uses: Counter[str]
    passed: set[str] = dataclasses.field(default_factory=set)

    def number(self, name: str) -> float | None:
        array = self.constants.get(name)
        if array is None or array.size != 1 or array.ndim > 1 or array.dtype not in (np.float32, np.float64):
            return None
        number = float(array.reshape(()))
        return number if math.isfinite(number) else None

    def only(self, name: str, kind: str, uses: int = 1) -> NodeProto | None:
        """The node of this kind that makes a tensor, where as many nodes read it."""
        node = self.made.get(name)
        if node is None or node.op_type != kind or self.uses[name] != uses:
            return None
        self.passed.add(name)
        return node

    def factors(self, name: str, root: bool = False, depth: int = _DEPTH) -> tuple[float, list[str]]:
        """A tensor as a number times tensors."""
        number = self.number(name)
        if number is not None:
            return number, []
        node = self.made.get(name)
        if depth and node is not None and (root or self.uses[name] == 1):
            if node.op_type == "Mul":
                self.passed.add(name)
                left, right = (self.factors(part, depth=depth - 1) for part in node.input)
                return left[0] * right[0], left[1] + right[1]
            divisor = self.number(node.input[1]) if node.op_type == "Div" else None
            if divisor:
                self.passed.add(name)
                number, tensors = self.factors(node.input[0], depth=depth - 1)
                return number / divisor, tensors
        return 1.0, [name]

    def plus(self, name: str, number: float) -> str | None:
        """The tensor that this one is, plus a number."""
        node = self.only(name, "Add")
        for first, second in ((0, 1), (1, 0)) if node is not None else ():
            found = self.number(node.input[first])  # type: ignore[union-attr]
            if found is not None and _near(found, number):
                return str(node.input[second])  # type: ignore[union-attr]
        return None

    def multiple(self, name: str, x: str) -> float:
        """c where a tensor is c x, else 0."""
        number, tensors = self.factors(name)
        return number if tensors == [x] else 0.0

    def product(self, node: NodeProto) -> Piece | None:
        number, tensors = self.factors(node.output[0], root=True)
        if len(tensors) != 2 or not number:
            return None
        kept = set(self.passed)
        for x, gate in (tensors, tensors[::-1]):
            for match in (self.sigmoid, self.erf, self.tanh, self.hard, self.mish):
                self.passed = set(kept)
                piece = match(x, gate, number)
                if piece is not None:
                    return piece
        return None

    def sigmoid(self, x: str, gate: str, k: float) -> Piece | None:
        node = self.only(gate, "Sigmoid")
        c = self.multiple(node.input[0], x) if node is not None else 0.0
        return Piece(x, "silu", _one(c), _one(k / c)) if c else None

    def erf(self, x: str, gate: str, k: float) -> Piece | None:
        inner = self.plus(gate, 1.0)
        node = self.only(inner, "Erf") if inner is not None else None
        s = _one(self.multiple(node.input[0], x) * math.sqrt(2)) if node is not None else 0.0
        return Piece(x, "gelu", s, _one(2 * k / s)) if s else None

    def tanh(self, x: str, gate: str, k: float) -> Piece | None:
        inner = self.plus(gate, 1.0)
        node = self.only(inner, "Tanh") if inner is not None else None
        if node is None:
            return None
        a, tensors = self.factors(node.input[0])
        if not _near(a, math.sqrt(2 / math.pi)):
            return None
        if len(tensors) == 2 and x in tensors:  # x (1 + b x^2)
            (rest,) = [tensor for tensor in tensors if tensor != x] or [""]
            power = self.plus(rest, 1.0)
            return Piece(x, "gelu_tanh", 1.0, _one(2 * k)) if power is not None and self.cubic(power, x, 2) else None
        node = self.only(tensors[0], "Add") if len(tensors) == 1 else None
        if node is None or x not in node.input:
            return None
        (rest,) = [name for name in node.input if name != x] or [""]
        return Piece(x, "gelu_tanh", 1.0, _one(2 * k)) if self.cubic(rest, x, 3) else None

    def cubic(self, name: str, x: str, exponent: int) -> bool:
        """A tensor is 0.044715 x^exponent."""
        b, tensors = self.factors(name)
        found = 0.0
        for tensor in tensors:
            node = self.only(tensor, "Pow") if tensor != x else None
            power = self.constants.get(node.input[1]) if node is not None else np.ones(())
            if (node is not None and node.input[0] != x) or (tensor != x and node is None):
                return False
            if power is None or power.size != 1:
                return False
            found += float(power.reshape(()))
        return _near(b, 0.044715) and found == exponent

    def hard(self, x: str, gate: str, k: float) -> Piece | None:
        node = self.only(gate, "HardSigmoid")
        if node is not None and node.input[0] == x:
            of = attributes(node)
            if _near(of.get("alpha", 0.2), 1 / 6) and of.get("beta", 0.5) == 0.5:
                return Piece(x, "hard_swish", 1.0, _one(k))
        node = self.only(gate, "Clip")
        if node is None or self.plus(node.input[0], 3.0) != x:
            return None
        of = attributes(node)
        low, high = (self.number(name) for name in node.input[1:3]) if len(node.input) == 3 else (None, None)
        ends = (low, high) if len(node.input) == 3 else (of.get("min"), of.get("max"))
        return Piece(x, "hard_swish", 1.0, _one(6 * k)) if ends == (0.0, 6.0) else None

    def mish(self, x: str, gate: str, k: float) -> Piece | None:
        node = self.only(gate, "Tanh")
        node = self.only(node.input[0], "Softplus") if node is not None else None
        return Piece(x, "mish", 1.0, _one(k)) if node is not None and node.input[0] == x else None

    def softmax(self, node: NodeProto) -> Piece | None:
        for exp, total in (node.input, node.input[::-1]) if node.op_type == "Mul" else (node.input,):
            if node.op_type == "Mul":
                inverse = self.only(total, "Reciprocal")
                if inverse is None:
                    continue
                total = inverse.input[0]
            summing, e = self.only(total, "ReduceSum"), self.only(exp, "Exp", uses=2)
            if summing is None or e is None or summing.input[0] != exp:
                continue
            axes = self.axes(summing)
            if axes is None:
                continue
            z = self.only(e.input[0], "Sub")
            peak = self.only(z.input[1], "ReduceMax") if z is not None else None
            if z is not None and peak is not None and peak.input[0] == z.input[0] and self.axes(peak) == axes:
                return Piece(z.input[0], None, axes=axes)
            self.passed -= {e.input[0]} | ({z.input[1]} if z is not None else set())
            return Piece(e.input[0], None, axes=axes)
        self.passed = set()
        return None

    def axes(self, node: NodeProto) -> tuple[int, ...] | None:
        """The axes of a reduction that keeps them."""
        of = attributes(node)
        found = self.constants.get(node.input[1]) if len(node.input) > 1 else of.get("axes")
        if found is None or not of.get("keepdims", 1) or not len(found):
            return None
        return tuple(int(axis) for axis in found)


def _near(number: float, exact: float) -> bool:
    return abs(number - exact) <= _UNIT * abs(exact)


def _one(number: float) -> float:
    """The number, or 1 where it differs from 1 by rounding only: of its own and of the two that it is made of."""
    return 1.0 if abs(number - 1) <= 2 * _UNIT else number
