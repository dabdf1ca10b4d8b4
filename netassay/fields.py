"""Named types for the fields of `Params` and `Result`, with their bounds and units.

A reference (network, array) is a short string, `kind:digest`, in everything that is stored and in every key. What the
user wrote (a file name, a recipe) is turned into one when a sweep is read, by the resolver given as pydantic's
validation context: `Params.model_validate(row, context={"resolve": resolver})`. Without a resolver only finished
references are accepted.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core.core_schema import ValidationInfo

Seed = Annotated[int, Field(ge=0, lt=2**63, description="seed of every random draw of the job")]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Radius = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="radius of a ball, in units of the input")]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, description="seconds")]
Bytes = Annotated[int, Field(ge=0, description="bytes")]

REFERENCE = re.compile(r"^(onnx|recipe|array|file):[0-9a-f]{64}$")


class ReferenceTo:
    """Marks a field as a reference of one of these kinds; `analysable`: the network must load as a `Graph`.

    A resolver is called as `resolve(value, self)` and returns the finished reference, or raises ValueError saying what
    is wrong with the value and what to try.
    """

    def __init__(self, *kinds: str, analysable: bool = False) -> None:
        self.kinds, self.analysable = kinds, analysable


def _reference(*kinds: str, analysable: bool = False, description: str) -> Any:
    wanted = ReferenceTo(*kinds, analysable=analysable)

    def check(value: Any, info: ValidationInfo) -> str:
        resolve = (info.context or {}).get("resolve")
        if resolve is not None:
            return resolve(value, wanted)
        if isinstance(value, str) and REFERENCE.match(value) and value.partition(":")[0] in kinds:
            return value
        raise ValueError(f"not a reference ({' or '.join(f'{kind}:<sha-256>' for kind in kinds)})")

    return Annotated[str, wanted, BeforeValidator(check), Field(description=description)]


if TYPE_CHECKING:
    NetworkRef = str
    AnyNetworkRef = str
    RecipeRef = str
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

DatasetName = Annotated[
    str, Field(pattern=r"^[a-z0-9_]+$", description="a dataset bundled with scikit-learn, e.g. digits")
]


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
