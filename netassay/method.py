"""What a method is. Whoever has read this page can write one.

A method is one module, `netassay/methods/<family>/<name>.py`; its path is its name, `<family>.<name>`. Nothing else in
the tree has to be edited to add one. The module holds:

=============  =======================================================================================================
docstring      First line: the claim. Then the formula with every symbol named, shapes and units, what it is *not*,
               cost in the size of the input, and `Reference: authors. title. year.` The command line shows this text.
`VERSION`      An int. Raise it when the same params may give another result: it is part of every job's key.
`Params`       A `Contract`: the typed question. Everything that determines the answer, the seed included, is here.
`Result`       A `Contract`: the typed answer. Arrays are fields of type `netassay.fields.Array`.
`run`          `run(params: Params) -> Result`, a pure function of its params.
`NEEDS`        `Needs(...)`: predicted seconds and memory, libraries, and how many jobs `run_many` takes at once.
`EXAMPLE`      A sweep that runs in seconds, as the mapping a YAML file would hold (see `producer.sweeps`).
`run_many`     Optional: `run_many(params: list[Params]) -> list[Result | Failure]`, for jobs that vectorise. All of
               one call share their network and dataset references. `run(p)` must equal `run_many([p])[0]`.
`needs`        Optional: `needs(params: Params) -> Needs`, where cost depends on the params.
`group`        Optional: `group(params: Params) -> str`; jobs with different answers never share a `run_many` call.
`plot`         Optional: `plot(records: list[Record]) -> netassay.figure.Figure`, from stored records of this method.
`plot_beside`  Optional, beside `plot`: `plot_beside(records, times: netassay.beside.Times) -> Figure`, the same figure
               with other tools' times on the same instances.
=============  =======================================================================================================

How a method ends:

* it returns a `Result`; NaN and infinity are allowed in it and stored as themselves;
* it raises `NotApplicable(reason)` where the question makes no sense for this input: that is an answer, not a failure;
* it raises `InvalidInput(what, why, what_to_try)` or `NumericalError(...)`: the same params will always fail so;
* any other exception is a failure of cause `error`, kept with its traceback.

Time limits, retries, provenance, storing and logging live in the worker and never appear in a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from netassay.errors import UserError
from netassay.fields import without_truths

if TYPE_CHECKING:
    from netassay.beside import Times
    from netassay.figure import Figure
    from netassay.job import Record


class Contract(BaseModel):
    """A frozen record with named, typed fields; unknown fields are refused, and so are true and false for a number."""

    # NaN must stay NaN in JSON mode: pydantic's default turns one in an untyped field into null, so that a job with NaN
    # would get the key of the job with null instead of being refused.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        without_truths(handler.resolve_ref_schema(schema))
        return schema


class MethodError(UserError):
    """An end that a method foresaw: what happened, why, and what to try."""

    cause = "error"

    def __init__(self, what: str, why: str = "", what_to_try: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.what_to_try = what, why, what_to_try

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.what_to_try:
            text += f" (try: {self.what_to_try})"
        return text


class NotApplicable(MethodError):
    """The question makes no sense for this input; the reason is the answer."""

    cause = "not_applicable"


class InvalidInput(MethodError):
    """The params are well typed but cannot be computed, e.g. an index outside the data."""

    cause = "invalid_input"


class NumericalError(MethodError):
    """The computation broke down in floating point, and would again: no convergence, a singular matrix."""

    cause = "numerical"


@dataclass(frozen=True)
class Failure:
    """How one job failed. `cause` is one of `netassay.job.CAUSES`, or `not_applicable`."""

    cause: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: MethodError) -> Failure:
        """The failure that `error` stands for, for `run_many` to return in its place."""
        return cls(error.cause, str(error))


@dataclass(frozen=True)
class Needs:
    """What one job takes, so that chunks, limits and slots can be planned.

    seconds: predicted run time of one job on one core. A first guess: measured timings replace it.
    memory: bytes one job needs beyond its imported libraries; None lets the host decide (0.8 x memory / slots).
    libraries: imported by the compute child before memory limits are set.
    group: how many jobs one `run_many` call may take; 1 runs jobs one by one.
    """

    seconds: float = 0.1
    memory: int | None = None
    libraries: tuple[str, ...] = ("numpy", "torch")
    group: int = 1


#: A job may take this many times its predicted seconds, and never less than a minute: predictions are rough.
TIME_FACTOR, TIME_FLOOR = 20.0, 60.0
#: Thirty years: predictions are computed from params, and what is stored of them must stay finite.
TIME_CEILING = 1e9


def time_limit(predicted: float) -> float:
    """Seconds a job may take that is predicted to take so many, where nobody says otherwise."""
    return min(TIME_CEILING, max(TIME_FLOOR, TIME_FACTOR * predicted))


@dataclass(frozen=True)
class Method:
    """A method's module, read once: the same names as the page above."""

    name: str
    module: ModuleType
    version: int
    Params: type[Contract]
    Result: type[Contract]
    run: Callable[[Any], Any]
    run_many: Callable[[list[Any]], list[Any]] | None
    plot: Callable[[list[Record]], Figure] | None
    plot_beside: Callable[[list[Record], Times], Figure] | None
    example: Mapping[str, Any]
    _needs: Needs | Callable[[Any], Needs]
    _group: Callable[[Any], str] | None

    @property
    def doc(self) -> str:
        return (self.module.__doc__ or "").strip()

    @property
    def claim(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]

    def needs(self, params: Contract) -> Needs:
        return self._needs(params) if callable(self._needs) else self._needs

    def drawn(self, times: Times | None = None) -> Callable[[list[Record]], Figure] | None:
        """What draws records of this method, beside other tools' times if given; None where nothing does."""
        draw = self.plot_beside
        if times is None or draw is None:
            return self.plot if times is None else None
        return lambda records: draw(records, times)

    def group(self, params: Contract) -> str:
        """Jobs whose answer differs are never given to one `run_many` call."""
        return self._group(params) if self._group else ""

    @classmethod
    def of(cls, name: str, module: ModuleType) -> Method:
        """Read a module as a method. Raises TypeError naming what is missing."""
        missing = [part for part in ("VERSION", "Params", "Result", "run", "EXAMPLE") if not hasattr(module, part)]
        if not (module.__doc__ or "").strip():
            missing.insert(0, "a docstring")
        if missing:
            raise TypeError(
                f"{name} ({module.__file__}) is not a method: it lacks {', '.join(missing)}; see netassay/method.py"
            )
        return cls(
            name=name,
            module=module,
            version=module.VERSION,
            Params=module.Params,
            Result=module.Result,
            run=module.run,
            run_many=getattr(module, "run_many", None),
            plot=getattr(module, "plot", None),
            plot_beside=getattr(module, "plot_beside", None),
            example=module.EXAMPLE,
            _needs=getattr(module, "needs", None) or getattr(module, "NEEDS", None) or Needs(),
            _group=getattr(module, "group", None),
        )
