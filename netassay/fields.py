"""Named types for the fields of `Params` and `Result`, with their bounds and units.

A reference (network, dataset, array) is a short string, `kind:digest`, in everything that is stored and in every key.
What the user wrote (a file name, a recipe) is turned into one when a sweep is read, by the resolver given as pydantic's
validation context: `Params.model_validate(row, context={"resolve": resolver})`. Without a resolver only finished
references are accepted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo, no_info_before_validator_function

Seed = Annotated[int, Field(ge=0, lt=2**63, description="seed of every random draw of the job")]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Radius = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="radius of a ball, in units of the input")]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="seconds")]
Bytes = Annotated[int, Field(ge=0, description="bytes")]

KINDS = ("onnx", "recipe", "array", "file", "vnnlib", "data", "generator")
REFERENCE = re.compile(rf"^({'|'.join(KINDS)}):[0-9a-f]{{64}}$")


class ReferenceTo:
    """Marks a field as a reference of one of these kinds; `analysable`: the network must load as a `Graph`.

    shared: all jobs of one `run_many` call have the same reference here.

    A resolver is called as `resolve(value, self)` and returns the finished reference, or raises ValueError saying what
    is wrong with the value and what to try.
    """

    def __init__(self, *kinds: str, analysable: bool = False, shared: bool = True) -> None:
        self.kinds, self.analysable, self.shared = kinds, analysable, shared


DATASET = ReferenceTo("data", "generator")
"""The mark of `DatasetRef`, for those that resolve one before its field is reached."""


def _reference(*kinds: str, analysable: bool = False, shared: bool = True, description: str) -> Any:
    return _field(ReferenceTo(*kinds, analysable=analysable, shared=shared), description)


def _field(wanted: ReferenceTo, description: str, plain: str = "") -> Any:
    """The type of a field so marked. plain: pattern of values that are no references and stand for themselves."""

    def check(value: Any, info: ValidationInfo) -> str:
        resolve = (info.context or {}).get("resolve")
        if resolve is not None:
            return resolve(value, wanted)
        if isinstance(value, str) and REFERENCE.match(value) and value.partition(":")[0] in wanted.kinds:
            return value
        if plain and isinstance(value, str) and re.fullmatch(plain, value):
            return value
        named = "neither a plain name nor" if plain else "not"
        raise ValueError(f"{named} a reference ({' or '.join(f'{kind}:<sha-256>' for kind in wanted.kinds)})")

    return Annotated[str, wanted, BeforeValidator(check), Field(description=description)]


if TYPE_CHECKING:
    NetworkRef = str
    AnyNetworkRef = str
    RecipeRef = str
    PropertyRef = str
    DatasetRef = str
else:
    NetworkRef = _reference(
        "onnx",
        "recipe",
        analysable=True,
        description="a network: path of an ONNX file, a recipe, or a name from the sweep's `networks`",
    )
    """`onnx:<sha-256 of the file>` or `recipe:<sha-256 of the recipe's canonical JSON>`; loads as a `Graph`."""

    AnyNetworkRef = _reference("onnx", "recipe", description="as NetworkRef; operators no bound rule knows are allowed")

    RecipeRef = _reference("recipe", description="a recipe: how to build and train a network")

    PropertyRef = _reference(
        "vnnlib",
        shared=False,
        description="a property: path of a .vnnlib file (also .vnnlib.gz), or {vnnlib: its text}",
    )
    """`vnnlib:<sha-256 of the text, unpacked>`; read by `netassay.vnnlib.load`. One network is asked for many."""

    DatasetRef = _field(
        DATASET,
        plain="[a-z0-9_]+",
        description="a dataset: one bundled with scikit-learn, e.g. digits; a generator, e.g. {generator: two_moons}; "
        "the path of an .npz, .csv or .parquet file, or {file: path, ...}; or a name from the sweep's `datasets`",
    )
    """A bundled name as it is, `generator:<sha-256 of its canonical JSON>` or `data:<sha-256 of the artifact>`."""


def _to_array(value: Any) -> Any:
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not imported here
        value = value.detach().cpu().numpy()
    return value


Array = Annotated[
    Any,
    BeforeValidator(_to_array),
    PlainSerializer(lambda value: value, return_type=Any),
    WithJsonSchema({"type": "array", "description": "numeric array; above 64 KiB kept as an artifact"}),
]
"""A numpy array (or torch tensor) in a `Result`. Read it back from a record with `record.array(field)`."""


# --- true and false are no numbers ------------------------------------------------------------------------------------

#: Where a pydantic schema holds others: what a type consists of, but no defaults, which are a user's own values.
_INSIDE = (
    "schema", "fields", "choices", "steps", "items_schema", "keys_schema", "values_schema", "lax_schema",
    "strict_schema", "json_schema", "python_schema", "definitions",
)  # fmt: skip


def without_truths(schema: Any) -> Any:
    """A pydantic core schema whose numbers, at any depth, refuse true and false: Python takes these for 1 and 0.

    A field that may also be a bool still may. Classes within it stay as they are: contracts have done this themselves.
    Changed in place, but for a schema that is a number itself.
    """
    if isinstance(schema, list):
        return [without_truths(part) for part in schema]
    if isinstance(schema, tuple):  # of a union: a type and its label
        return (without_truths(schema[0]), *schema[1:])
    kind = schema.get("type")
    if kind == "function-before" and schema["function"]["function"] is _no_truth:
        return schema  # a contract within a contract
    if kind in ("int", "float", "decimal", "complex") or (kind == "literal" and _numbers_only(schema["expected"])):
        return no_info_before_validator_function(_no_truth, schema)
    for name in _INSIDE:
        part = schema.get(name)
        if isinstance(part, dict) and name in ("fields", "choices"):
            schema[name] = {key: without_truths(one) for key, one in part.items()}
        elif isinstance(part, dict | list):
            schema[name] = without_truths(part)
    return schema


def _numbers_only(expected: list[Any]) -> bool:
    """Whether these values of a `Literal` hold a number but no bool."""
    kinds = set(map(type, expected))
    return int in kinds and bool not in kinds


def _no_truth(value: Any) -> Any:
    # Called for every number of every row: the usual types first.
    kind = type(value)
    if kind is int or kind is float or kind is str:
        return value
    # Also the bool of NumPy and of torch, which are not imported here.
    if kind is bool or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise PydanticCustomError("no_truth", "is {value}, must be a number", {"value": str(bool(value)).lower()})
    return value
