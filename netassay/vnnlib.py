"""VNN-LIB properties: which inputs and outputs of a network are unsafe, as boxes and linear constraints.

    (declare-const X_0 Real)  (declare-const Y_0 Real)  (declare-const Y_1 Real)
    (assert (>= X_0 -0.5))    (assert (<= X_0 0.5))
    (assert (or (and (<= Y_0 Y_1)) (and (>= Y_0 3))))

X_i is input i and Y_j output j of the network, flattened in row-major order. The assertions together describe the
*unsafe* set: the property is violated ("sat") where an input of the box has an output that meets them. They may be
nested with `and` and `or` over both inputs and outputs; what is read is brought into disjunctive form,

    unsafe = union over cases of  {(x, y): lower <= x <= upper,  and for some conjunction all its c.y <= b},

one case for each box, with all conjunctions over that box. Terms are linear: numbers, variables, `+`, `-`, `*` and `/`
by a number; comparisons are `<=`, `>=` and `=`. Capital and small letters are not told apart. Commands that ask a
solver for something (`check-sat`, `set-logic`, ...) are passed over.

That is version 1 of the format. A text that begins with a `vnnlib-version` is of version 2,

    (vnnlib-version <2.0>)
    (declare-network f (declare-input X float32 [1,1]) (declare-output Y float32 [1,2]))
    (assert (<= X[0,0] 0.5)) (assert (>= X[0,0] -0.5))
    (assert (or (<= Y[0,0] Y[0,1]) (>= Y[0,0] 3.0)))

whose grammar and types the package `vnnlib` checks; of one network with one input and one output of type `real` or
`float32` it describes the same sets, and becomes the same `Property`. Its equality is `==`, its numbers have no
exponent, and those compared with real or floating variables need a point (`3.0`). They are taken as written for both
types, and arithmetic between them as exact: no constant is rounded to float32 first.

All numbers are kept exactly as they are written, as fractions: a decimal such as 0.679857769 is no float. Who bounds a
network rounds the box outward (`Case.outward`), who looks for a counterexample rounds it inward (`Case.inward`), so
neither a proof nor a counterexample depends on the rounding of a decimal.

Beyond this page, and refused with a reason: a constraint between inputs, or between inputs and outputs; products of
variables; `not`, `=>`, `!=` and strict comparisons; several networks, several inputs or outputs, hidden nodes and other
types in version 2.

References:
Guidotti, Demarchi, Tacchella, Pulina. The Verification of Neural Networks Library (VNN-LIB). 2023.
Version 2: the VNN-LIB standard, https://www.vnnlib.org. 2025.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netassay import files
from netassay.heavy import np, vnnlib_2
from netassay.method import InvalidInput, NotApplicable
from netassay.store import artifacts

if TYPE_CHECKING:
    import numpy

#: Bytes of text that are read. The largest of the competition's files (inputs of 224 x 224 x 3) hold some 12 MB.
LIMIT = 32 * 2**20
#: Words held in memory at once: of one form in version 1, of the whole text in version 2, which is parsed as one.
#: An input of 224 x 224 x 3 needs 1.5 million in version 2. A word takes up to half a kilobyte.
WORDS = 2_000_000
#: Parentheses within one another.
DEPTH = 100
#: Conjunctions of the disjunctive form, and the constraints in all of them: `and` over many `or` multiplies them.
CONJUNCTIONS, CONSTRAINTS = 100_000, 2_000_000
#: Letters of one number, its decimal exponent, and the bits of what arithmetic makes of them.
_DIGITS, _EXPONENT, _BITS = 400, 300, 20_000
#: Properties kept in memory: a competition's category shares a few hundred.
_KEPT = 256

_TOKEN = re.compile(r'(?P<space>\s+|;[^\n]*)|(?P<bracket>[()])|(?P<text>"[^"]*")|(?P<word>[^\s();"|]+)|(?P<odd>.)')
_NUMBER = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)(e([+-]?\d+))?$")
_VARIABLE = re.compile(r"^([xy])_(0|[1-9]\d{0,8})$")
_PASSED_OVER = frozenset({"check-sat", "exit", "get-model", "get-value", "set-info", "set-logic", "set-option"})
_VERSION_2 = frozenset(
    {"declare-hidden", "declare-input", "declare-network", "declare-output", "vnnlib-version", "vnnlib_version"}
)
_IS_VERSION_2 = re.compile(r"(?:\s++|;[^\n]*+)*+\(\s*+vnnlib-version", re.IGNORECASE)
_TOKEN_2 = re.compile(
    r'(?P<space>[ \t\r\n\f\v]+|;[^\n]*)|(?P<bracket>[()\[\]])|(?P<comma>,)|(?P<text>"(?:[^"\\\n]|\\.)*")'
    r"|(?P<word>[A-Za-z0-9_.<>=!+*/-]+)|(?P<odd>.)",
    re.DOTALL,
)
_REAL_2 = re.compile(r"(\(declare-(?:input|hidden|output)\s++\w++\s++)Real\b")
_NUMBER_2 = re.compile(r"^-?(\d+)(\.\d+)?$")
#: What the parser of version 2 calls its nodes, in the words of version 1.
_HEADS_2 = {
    "And": "and", "Or": "or", "LessEqual": "<=", "GreaterEqual": ">=", "Equal": "=", "LessThan": "<",
    "GreaterThan": ">", "NotEqual": "!=", "Plus": "+", "Minus": "-", "Negate": "-", "Multiply": "*",
}  # fmt: skip


class PropertyError(InvalidInput, ValueError):
    """A text that is no property; says the line and column. A ValueError too, for validators."""


class UnsupportedProperty(NotApplicable):
    """A property that this reader understands but that is no union of boxes and linear output constraints."""


@dataclass(frozen=True)
class Constraint:
    """sum of c_j Y_j <= bound. coefficients: (j, c_j), c_j not 0, by rising j, at least one."""

    coefficients: tuple[tuple[int, Fraction], ...]
    bound: Fraction

    def violation(self, outputs: Sequence[float]) -> Fraction:
        """sum of c_j Y_j - bound in exact arithmetic, for finite outputs: the constraint holds where it is not
        positive.
        """
        return sum((c * Fraction(float(outputs[j])) for j, c in self.coefficients), -self.bound)


Conjunction = tuple[Constraint, ...]


@dataclass(frozen=True)
class Case:
    """A box of inputs and what must not come out of it. lower, upper: one number an input, lower <= upper.

    unsafe: an output is unsafe where all constraints of one conjunction hold; none of them is empty.
    """

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    unsafe: tuple[Conjunction, ...]

    def outward(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The smallest box with float64 ends around the box: lower, upper, (inputs,)."""
        return np.array([below(end) for end in self.lower]), np.array([above(end) for end in self.upper])

    def inward(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The float32 numbers within the box: lower, upper, (inputs,), float32; lower > upper where there is none."""
        lower, upper = (np.array([float(end) for end in side]) for side in (self.lower, self.upper))
        with np.errstate(over="ignore"):
            lower, upper = lower.astype(np.float32), upper.astype(np.float32)
        low = [Fraction(float(near)) < end if math.isfinite(near) else near < 0
               for near, end in zip(lower, self.lower, strict=True)]  # fmt: skip
        high = [Fraction(float(near)) > end if math.isfinite(near) else near > 0
                for near, end in zip(upper, self.upper, strict=True)]  # fmt: skip
        infinity = np.float32(np.inf)
        return (
            np.where(low, np.nextafter(lower, infinity), lower),
            np.where(high, np.nextafter(upper, -infinity), upper),
        )

    def contains(self, x: Sequence[float]) -> bool:
        """Whether the finite numbers x, one an input, lie in the box, in exact arithmetic."""
        return all(low <= Fraction(float(v)) <= high for low, v, high in zip(self.lower, x, self.upper, strict=True))


@dataclass(frozen=True)
class Property:
    """inputs, outputs: how many variables of each are declared. cases: at least one, no two with the same box."""

    inputs: int
    outputs: int
    cases: tuple[Case, ...]

    @property
    def conjunctions(self) -> int:
        return sum(len(case.unsafe) for case in self.cases)


def below(number: Fraction) -> float:
    """The largest float64 that is not above the number; -infinity where there is none."""
    return -above(-number)


def above(number: Fraction) -> float:
    """The smallest float64 that is not below the number; infinity where there is none."""
    try:
        near = float(number)
    except OverflowError:
        return math.inf if number > 0 else -sys.float_info.max
    return near if near >= number else math.nextafter(near, math.inf)


def load(reference: str) -> Property:
    """The property of a reference `vnnlib:<sha-256>`; one object a text.

    Raises PropertyError, UnsupportedProperty, MissingArtifact, ValueError for another kind of reference.
    """
    if not reference.startswith("vnnlib:"):
        raise ValueError(f"{reference} is not the reference of a property (vnnlib:<sha-256>)")
    return _load(reference)


@functools.lru_cache(maxsize=_KEPT)
def _load(reference: str) -> Property:
    # The digest alone names the property, whichever folder it came from.
    return parse(artifacts.current().read(reference))


def from_file(path: Path) -> bytes:
    """The text of a .vnnlib file, or of one packed with gzip, unpacked. Raises PropertyError, OSError."""
    try:
        return files.read(path, LIMIT)
    except files.Unreadable as error:
        raise PropertyError("the property cannot be read", str(error)) from None


def check(data: bytes) -> None:
    """Raise the PropertyError that reading these bytes would end in, if any.

    A property that is well written but unsupported passes: that is an answer for a job to give, not a mistake. So does
    one of version 2 where nothing is installed that parses it: who submits need not be able to compute.
    """
    try:
        parse(data)
    except (UnsupportedProperty, ModuleNotFoundError):
        return


def parse(data: bytes | str) -> Property:
    """The property of a VNN-LIB text of version 1 or 2.

    Raises PropertyError with the line, UnsupportedProperty, and ModuleNotFoundError for a text of version 2 where the
    package that parses it is not installed.
    """
    if len(data) > LIMIT:
        raise PropertyError("the property is too large", f"it holds {len(data):,} bytes, {LIMIT:,} are read")
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            why = f"byte {error.start} is not UTF-8"
            raise PropertyError("the property is not text", why, "a .vnnlib file") from None
    if _IS_VERSION_2.match(data):
        return _Reader2(data).property()
    return _Reader(data).property()


@dataclass(slots=True)
class _Node:
    """A word, or a list of nodes in parentheses. at: its place in the text."""

    at: int
    word: str = ""
    parts: list[_Node] | None = None


#: A linear term: variable -> coefficient; "" -> the constant.
_Linear = dict[str, Fraction]


@dataclass(frozen=True, slots=True)
class _Term:
    """A conjunction. bounds: (input, "lower" | "upper") -> the end and its place in the text. Never written to where
    shared: terms of one disjunction mostly have the same box.
    """

    bounds: Mapping[tuple[int, str], tuple[Fraction, int]] = field(default_factory=dict)
    constraints: Conjunction = ()

    def joined(self, other: _Term) -> _Term:
        constraints = self.constraints + other.constraints
        if not other.bounds or not self.bounds:
            return _Term(self.bounds or other.bounds, constraints)
        return _Term(_narrowed(dict(self.bounds), other.bounds), constraints)


def _narrowed(
    bounds: dict[tuple[int, str], tuple[Fraction, int]], more: Mapping[tuple[int, str], tuple[Fraction, int]]
) -> dict[tuple[int, str], tuple[Fraction, int]]:
    """`bounds`, written to, with the narrower end of each."""
    for end, (value, at) in more.items():
        known = bounds.get(end)
        if known is None or (value > known[0] if end[1] == "lower" else value < known[0]):
            bounds[end] = value, at
    return bounds


class _Reader:
    """A text of version 1."""

    version = 1

    def __init__(self, text: str) -> None:
        self.text = text
        self.declared: dict[str, int] = {}
        self.asserted: list[list[_Term]] = []
        self.made = 0

    def property(self) -> Property:
        for form in self._forms():
            self._command(form)
        if not self.declared:
            raise PropertyError(
                "the text declares no variables", "a property declares X_0, ... and Y_0, ...", "is it a .vnnlib file?"
            )
        return self._property(self._count("x", "input"), self._count("y", "output"))

    def _property(self, inputs: int, outputs: int) -> Property:
        """What is asserted, in disjunctive form."""
        cases: dict[tuple[tuple[Fraction, ...], tuple[Fraction, ...]], dict[Conjunction, None]] = {}
        ends: dict[int, tuple[tuple[Fraction, ...], tuple[Fraction, ...]] | None] = {}
        empty = ""
        terms = self._product(self.asserted)
        for term in terms:
            if id(term.bounds) not in ends:
                ends[id(term.bounds)], why = self._box(term, inputs)
                empty = empty or why
            box = ends[id(term.bounds)]
            if box is None:
                continue
            if not term.constraints:
                raise PropertyError(
                    "a case says nothing of the outputs",
                    "every input of its box would be a counterexample",
                    "(assert (<= Y_0 Y_1)) or the like",
                )
            cases.setdefault(box, {})[term.constraints] = None
        if not cases:
            raise PropertyError(
                "no input meets the assertions", empty or "they contradict each other", "check the bounds"
            )
        return Property(
            inputs, outputs, tuple(Case(*box, unsafe=tuple(conjunctions)) for box, conjunctions in cases.items())
        )

    # Text to nodes.

    def _forms(self) -> Iterator[_Node]:
        """The forms at the top level, one by one."""
        open_: list[_Node] = []
        words = 0
        for match in _TOKEN.finditer(self.text):
            kind, at, word = match.lastgroup, match.start(), match.group()
            if kind == "space":
                continue
            if kind == "odd":
                raise self._wrong(at, f"unexpected character {word!r}")
            if word == "(":
                if len(open_) == DEPTH:
                    raise self._wrong(at, f"parentheses are nested more than {DEPTH} deep", "flatten the formula")
                open_.append(_Node(at, parts=[]))
                continue
            if word == ")":
                if not open_:
                    raise self._wrong(at, "a closing parenthesis without an opening one")
                node = open_.pop()
            else:
                node = _Node(at, word.lower())
                words += 1
                if words > WORDS:
                    raise self._wrong(open_[0].at, f"the form has more than {WORDS:,} words", "split it into several")
            if open_:
                parts = open_[-1].parts
                assert parts is not None
                parts.append(node)
            elif node.parts is None:
                raise self._wrong(at, f"{_short(word)} stands outside of all parentheses", "is it a .vnnlib file?")
            else:
                yield node
                words = 0
        if open_:
            raise self._wrong(open_[0].at, "this parenthesis is never closed", "is the file complete?")

    def _place(self, at: int) -> str:
        line = self.text.count("\n", 0, at) + 1
        return f"line {line}, column {at - self.text.rfind(chr(10), 0, at)}"

    def _wrong(self, at: int, why: str, what_to_try: str = "") -> PropertyError:
        return PropertyError(f"not a VNN-LIB {self.version} property, {self._place(at)}", why, what_to_try)

    def _unsupported(self, at: int, why: str, what_to_try: str = "") -> UnsupportedProperty:
        return UnsupportedProperty(
            f"the property is no union of boxes and linear output constraints, {self._place(at)}", why, what_to_try
        )

    # Commands.

    def _command(self, form: _Node) -> None:
        head, rest = self._head(form)
        if head in _VERSION_2:
            raise self._wrong(
                form.at, f"{head} is of version 2 of the format", "(vnnlib-version <2.0>) before everything else"
            )
        if head == "declare-const":
            self._declare(form, rest)
        elif head == "assert":
            if len(rest) != 1:
                raise self._wrong(form.at, f"assert takes one formula, not {len(rest)}")
            self.asserted.append(self._formula(rest[0]))
        elif head not in _PASSED_OVER:
            raise self._wrong(form.at, f"the command {_short(head)} is not known", "declare-const and assert")

    def _head(self, form: _Node) -> tuple[str, list[_Node]]:
        if not form.parts or not form.parts[0].word:
            raise self._wrong(form.at, "expected a word after the opening parenthesis")
        return form.parts[0].word, form.parts[1:]

    def _declare(self, form: _Node, rest: list[_Node]) -> None:
        if len(rest) != 2 or not all(node.word for node in rest):
            raise self._wrong(form.at, "declare-const takes a name and a type", "(declare-const X_0 Real)")
        name, kind = rest[0].word, rest[1].word
        if not _VARIABLE.match(name):
            raise self._wrong(rest[0].at, f"{_short(name)} is neither an input X_i nor an output Y_j")
        if kind != "real":
            raise self._wrong(rest[1].at, f"{name.upper()} is of type {_short(kind)}, only Real is known")
        if name in self.declared:
            raise self._wrong(
                rest[0].at, f"{name.upper()} is declared twice, first in {self._place(self.declared[name])}"
            )
        self.declared[name] = rest[0].at

    def _count(self, letter: str, what: str) -> int:
        """How many variables of this letter are declared: from 0 on, without a gap."""
        found = sum(name[0] == letter for name in self.declared)
        if not found:
            raise PropertyError(f"the property declares no {what}", f"there is no {letter.upper()}_0")
        missing = next((i for i in range(found) if f"{letter}_{i}" not in self.declared), None)
        if missing is not None:
            raise PropertyError(
                f"{letter.upper()}_{missing} is not declared",
                f"{what}s are numbered from 0 without a gap, and {found} are declared",
            )
        return found

    # Formulas.

    def _formula(self, node: _Node) -> list[_Term]:
        """The conjunctions whose union the formula is; none where it is false."""
        if node.parts is None:
            if node.word in ("true", "false"):
                return [_Term()] if node.word == "true" else []
            raise self._wrong(node.at, f"{_short(node.word)} is not a formula", "(<= X_0 1), (and ...) or (or ...)")
        head, rest = self._head(node)
        if head == "and":
            return self._product([self._formula(part) for part in rest], node.at)
        if head == "or":
            terms: list[_Term] = []
            for part in rest:
                terms += self._formula(part)
                self._counted(len(terms), 0, node.at)
            return terms
        if head in ("<=", ">=", "="):
            if len(rest) != 2:
                raise self._wrong(node.at, f"{head} compares two terms, not {len(rest)}")
            if rest[0].word.startswith("x_") and rest[1].word and head != "=":
                plain = self._plain_bound(head, rest[0], rest[1], node.at)
                if plain is not None:
                    return plain
            left, right = self._linear(rest[0]), self._linear(rest[1])
            if head == ">=":
                left, right = right, left
            terms = self._at_most(left, right, node.at)
            return terms if head != "=" else self._product([terms, self._at_most(right, left, node.at)], node.at)
        if head in ("not", "=>", "xor", "ite", "<", ">", "!=", "distinct", "let", "forall", "exists"):
            raise self._unsupported(node.at, f"{head} is not read", "and, or, <=, >=, =")
        raise self._wrong(node.at, f"{_short(head)} is not a formula", "(<= X_0 1), (and ...) or (or ...)")

    def _plain_bound(self, head: str, name: _Node, number: _Node, at: int) -> list[_Term] | None:
        """Of (<= X_i number): what most lines of most files say, so worth a way of its own. None: it is not of that."""
        if not self._is_variable(name) or _NUMBER.match(number.word) is None:
            return None
        end = self._representable(self._number(number), at)
        return [_Term({(int(name.word[2:]), "upper" if head == "<=" else "lower"): (end, at)})]

    def _product(self, factors: list[list[_Term]], at: int = 0) -> list[_Term]:
        """The conjunction of formulas in disjunctive form."""
        bounds: dict[tuple[int, str], tuple[Fraction, int]] = {}
        constraints: list[Constraint] = []
        for terms in factors:
            if len(terms) == 1:
                _narrowed(bounds, terms[0].bounds)
                constraints += terms[0].constraints
        product = [_Term(bounds, tuple(dict.fromkeys(constraints)))]
        for terms in factors:
            if len(terms) != 1:
                size = sum(len(term.constraints) for term in product) * len(terms)
                size += sum(len(term.constraints) for term in terms) * len(product)
                # A box is copied only where both sides have one.
                if bounds and any(term.bounds for term in terms):
                    size += len(product) * sum(len(term.bounds) + len(bounds) for term in terms if term.bounds)
                self._counted(len(product) * len(terms), size, at)
                product = [first.joined(second) for first in product for second in terms]
        return product

    def _counted(self, conjunctions: int, constraints: int, at: int) -> None:
        self.made += constraints
        if conjunctions > CONJUNCTIONS or self.made > CONSTRAINTS:
            raise self._unsupported(
                at,
                f"`and` over `or` makes more than {CONJUNCTIONS:,} cases, or {CONSTRAINTS:,} constraints in them",
                "split the property into several files",
            )

    def _at_most(self, left: _Linear, right: _Linear, at: int) -> list[_Term]:
        """left <= right."""
        difference = self._sum([left, _times(right, Fraction(-1))], at)
        constant = difference.pop("", Fraction(0))
        if not difference:
            return [_Term()] if constant <= 0 else []
        letters = {name[0] for name in difference}
        if letters == {"x", "y"}:
            raise self._unsupported(at, "a constraint joins inputs and outputs", "bounds on each alone")
        numbered = sorted((int(name[2:]), c) for name, c in difference.items())
        if letters == {"y"}:
            for _, coefficient in numbered:
                self._representable(coefficient, at)
            return [_Term(constraints=(Constraint(tuple(numbered), self._representable(-constant, at)),))]
        if len(numbered) > 1:
            raise self._unsupported(at, "a constraint joins several inputs", "a bound for each input")
        ((place, coefficient),) = numbered
        end = self._representable(-constant / coefficient, at)
        return [_Term({(place, "upper" if coefficient > 0 else "lower"): (end, at)})]

    def _representable(self, number: Fraction, at: int) -> Fraction:
        """A number of a size that float64 has, scaled either way."""
        size = abs(above(number))
        if number and not 10.0**-_EXPONENT < size < 10.0**_EXPONENT:
            raise self._wrong(at, f"a number is outside 1e-{_EXPONENT} ... 1e{_EXPONENT}")
        return number

    def _box(self, term: _Term, inputs: int) -> tuple[tuple[tuple[Fraction, ...], tuple[Fraction, ...]] | None, str]:
        """(lower, upper) of a conjunction, or None and why no input is in it."""
        for place in range(inputs):
            for end in ("lower", "upper"):
                if (place, end) not in term.bounds:
                    name = self._input(place)
                    raise PropertyError(
                        f"input {name} has no {end} bound",
                        "bounds of a network need a box of inputs",
                        f"(assert ({'>=' if end == 'lower' else '<='} {name} ...))",
                    )
        for place in range(inputs):
            (low, first), (high, second) = term.bounds[place, "lower"], term.bounds[place, "upper"]
            if low > high:
                return None, (
                    f"{self._input(place)} is at least {float(low):.9g} ({self._place(first)}) "
                    f"and at most {float(high):.9g} ({self._place(second)})"
                )
        lower, upper = (tuple(term.bounds[i, end][0] for i in range(inputs)) for end in ("lower", "upper"))
        return (lower, upper), ""

    def _input(self, place: int) -> str:
        """What the text calls an input."""
        return f"X_{place}"

    # Terms.

    def _linear(self, node: _Node) -> _Linear:
        if node.parts is None:
            return {node.word: Fraction(1)} if self._is_variable(node) else {"": self._number(node)}
        head, rest = self._head(node)
        if head not in ("+", "-", "*", "/"):
            raise self._wrong(node.at, f"{_short(head)} is not a term", "numbers, variables, +, -, * and /")
        if not rest:
            raise self._wrong(node.at, f"{head} of nothing")
        # One by one: a sum may have a million terms.
        terms = (self._linear(part) for part in rest)
        if head == "+":
            return self._sum(terms, node.at)
        first = next(terms)
        if head == "-":
            minus = Fraction(-1)
            if len(rest) == 1:
                return _times(first, minus)
            return self._sum(itertools.chain([first], (_times(term, minus) for term in terms)), node.at)
        return self._scaled(head, first, terms, node.at)

    def _scaled(self, head: str, product: _Linear, terms: Iterable[_Linear], at: int) -> _Linear:
        """A product with at most one factor that is not a number, or a quotient by numbers."""
        for term in terms:
            if head == "/" or set(term) <= {""}:
                factor = term.get("", Fraction(0))
                if not set(term) <= {""}:
                    raise self._unsupported(at, "a division by a variable is not linear")
                if head == "/" and not factor:
                    raise self._wrong(at, "a division by zero")
                product = _times(product, 1 / factor if head == "/" else factor)
            elif set(product) <= {""}:
                product = _times(term, product.get("", Fraction(0)))
            else:
                raise self._unsupported(at, "a product of variables is not linear")
            self._short_enough(product, at)
        return product

    def _sum(self, terms: Iterable[_Linear], at: int) -> _Linear:
        total: _Linear = {}
        for term in terms:
            for name, value in term.items():
                total[name] = total.get(name, Fraction(0)) + value
                self._short_enough({name: total[name]}, at)
        return {name: value for name, value in total.items() if value}

    def _short_enough(self, term: _Linear, at: int) -> None:
        for value in term.values():
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
                raise self._wrong(at, "arithmetic on numbers makes one with thousands of digits", "plain numbers")

    def _is_variable(self, node: _Node) -> bool:
        if not _VARIABLE.match(node.word):
            return False
        if node.word not in self.declared:
            raise self._wrong(
                node.at, f"{node.word.upper()} is not declared before", f"(declare-const {node.word.upper()} Real)"
            )
        return True

    def _number(self, node: _Node) -> Fraction:
        match = _NUMBER.match(node.word)
        if match is None:
            kind = "not a finite number" if node.word.lstrip("+-") in ("nan", "inf", "infinity") else "no number"
            raise self._wrong(node.at, f"{_short(node.word)} is {kind}, and no variable X_i or Y_j")
        if len(node.word) > _DIGITS or abs(int(match[3] or 0)) > 2 * _EXPONENT:
            raise self._wrong(node.at, f"the number {_short(node.word)} has too many digits")
        return Fraction(node.word)


class _Reader2(_Reader):
    """A text of version 2: parsed and checked by the package, read from its tree in the words of version 1.

    The tree has lines and no columns, so places are lines here.
    """

    version = 2

    def property(self) -> Property:
        self._guard()
        query = self._parsed()
        if len(query.networks) != 1:
            raise self._beyond(f"it declares {len(query.networks)} networks", "one network")
        (network,) = query.networks
        for what, found in (("hidden node", network.hidden), ("input", network.inputs), ("output", network.outputs)):
            if len(found) != (what != "hidden node"):
                names = ", ".join(tensor.name for tensor in found[:5])
                raise self._beyond(f"it declares {len(found)} {what}s: {names}", "one input and one output")
        self.shapes: dict[str, tuple[str, list[int]]] = {}
        for letter, (tensor,) in (("x", network.inputs), ("y", network.outputs)):
            if tensor.dtype.name not in ("Real", "F32"):
                raise self._beyond(f"{tensor.name} is of another type than real and float32", "real or float32")
            self.shapes[letter] = tensor.name, tensor.shape
            if math.prod(tensor.shape) > 10**8:
                raise PropertyError(
                    f"{tensor.name} is too large", f"it is declared with {math.prod(tensor.shape):,} values"
                )
        for assertion in query.assertions:
            self.asserted.append(self._formula(self._node(assertion.expr)))
        return self._property(*(math.prod(shape) for _, shape in self.shapes.values()))

    def _beyond(self, why: str, what_to_try: str) -> UnsupportedProperty:
        return UnsupportedProperty("the property is no union of boxes and linear output constraints", why, what_to_try)

    def _guard(self) -> None:
        """Refuse what the parser does not survive, or reads as something else than is written.

        It recurses on the stack, ends the text at a NUL, and takes the whole part of a number for an index.
        """
        depth, line, words, square = 0, 1, 0, False
        for match in _TOKEN_2.finditer(self.text):
            kind, word = match.lastgroup, match.group()
            if "\0" in word or kind == "odd":
                raise self._wrong(line, f"unexpected character {word[word.find(chr(0))]!r}")
            if kind == "space":
                line += word.count("\n")
            elif word in "([":
                depth, square = depth + 1, word == "["
                if depth > DEPTH:
                    raise self._wrong(line, f"parentheses are nested more than {DEPTH} deep", "flatten the formula")
            elif word in ")]":
                depth, square = depth - 1, False
            elif kind == "word":
                words += 1
                if words > WORDS:
                    raise self._wrong(line, f"the text has more than {WORDS:,} words", "split it into several files")
                self._guard_number(word, square, line)

    def _guard_number(self, word: str, square: bool, line: int) -> None:
        match = _NUMBER_2.match(word)
        if square and (match is None or match[2] or word[0] == "-"):
            raise self._wrong(line, f"{_short(word)} is no dimension and no index", "0, 1, 2, ...")
        if match is not None and (len(word) > _DIGITS or len(match[1]) > (_EXPONENT if match[2] else 18)):
            raise self._wrong(line, f"the number {_short(word)} has too many digits")

    def _parsed(self) -> Any:
        try:
            parse_ = vnnlib_2.parse_query_string
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "properties in version 2 of VNN-LIB are read by the package vnnlib, which is not installed here; try: "
                "pip install 'vnnlib>=1.0.2', or write the property in version 1",
                name=error.name,
            ) from None
        try:
            # Beyond ASCII there are comments only, which it drops. The standard's own examples write Real for its real.
            return parse_(_REAL_2.sub(r"\1real", self.text.encode("ascii", "replace").decode()))
        except vnnlib_2.VNNLibException as error:
            raise self._told(str(error)) from None
        except (IndexError, ValueError) as error:
            why = f"a number is too large or too small ({error})"
            raise PropertyError("not a VNN-LIB 2 property", why, "numbers that float64 has") from None

    def _told(self, said: str) -> PropertyError:
        """The first of its complaints, which are a line of text or a list in JSON."""
        try:
            # Only this one is decoded: there may be one a word.
            first, _ = json.JSONDecoder().raw_decode(said, said.index("{", said.index('"errors"')))
            line, symbol = int(first["line"]), first["offendingSymbol"]
            why = f"{first['message'][:1].lower()}{first['message'][1:]}, {_short(symbol)}: {first['hint']}"
        except (ValueError, LookupError, TypeError):
            place = re.search(r"line \d+", said)  # its columns do not count alike on all lines
            why = re.sub(r" at line \d+, column \d+", "", said.removeprefix("Parse error: "))[:200]
            return PropertyError(
                f"not a VNN-LIB 2 property{f', {place[0]}' if place else ''}",
                why.replace(": ''", " at the end of the text"),
                "numbers without an exponent, such as 0.001" if re.search(r": '[eE]\d*'$", why) else "",
            )
        return self._wrong(line, why, f"{symbol}.0" if re.fullmatch(r"-?\d+", symbol) else "")

    def _node(self, tree: Any) -> _Node:
        """A tree of the package as a node of version 1: X[0,2] is the word x_2 and a number what is written."""
        kind = type(tree).__name__
        if kind == "Var":
            return _Node(tree.line, self._place_of(tree))
        if kind in ("Float", "Int", "Literal"):
            return _Node(tree.line, tree.lexeme)
        if kind not in _HEADS_2:
            raise self._beyond(f"{kind} is not read", "and, or, <=, >=, ==, +, -, *")
        parts = [self._node(part) for part in _parts(tree, kind)]
        at = parts[0].at if parts else 0
        return _Node(at, parts=[_Node(at, _HEADS_2[kind]), *parts])

    def _place_of(self, variable: Any) -> str:
        letter = "x" if variable.kind.name == "Input" else "y"
        place = 0
        for index, size in zip(variable.indices, self.shapes[letter][1], strict=True):
            if not 0 <= index < size:
                raise self._wrong(variable.line, f"an index of {variable.name} is outside of its shape")
            place = place * size + index
        return f"{letter}_{place}"

    def _is_variable(self, node: _Node) -> bool:
        return node.word.startswith(("x_", "y_"))

    def _place(self, at: int) -> str:
        return f"line {max(at, 1)}"

    def _input(self, place: int) -> str:
        name, shape = self.shapes["x"]
        indices: list[int] = []
        for size in reversed(shape):
            place, index = divmod(place, size)
            indices.insert(0, index)
        return f"{name}[{','.join(map(str, indices))}]" if shape else name


def _parts(tree: Any, kind: str) -> Iterable[Any]:
    if kind == "Negate":
        return (tree.expr,)
    if kind == "Minus":
        return (tree.head, *tree.rest)
    return tree.args if kind in ("And", "Or", "Plus", "Multiply") else (tree.lhs, tree.rhs)


def _times(term: _Linear, factor: Fraction) -> _Linear:
    return {name: value * factor for name, value in term.items()} if factor else {}


def _short(word: str) -> str:
    return repr(word if len(word) <= 40 else f"{word[:40]}...")
