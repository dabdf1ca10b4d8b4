"""Results that JSON does not know: NaN, infinities, arrays small and large, text with control characters.

A method as a user would add one, for the tests of the supervisor.
"""

from __future__ import annotations

from netassay.fields import Array, Count
from netassay.heavy import np
from netassay.method import Contract, Needs

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
NEEDS = Needs(seconds=0.1, libraries=("numpy",))
EXAMPLE = {"jobs": [{"method": "poison.values", "params": {"size": 3}}]}


class Params(Contract):
    size: Count


class Result(Contract):
    numbers: list[float]
    array: Array
    text: str


def run(params: Params) -> Result:
    numbers = [float("nan"), float("inf"), float("-inf"), -0.0]
    return Result(numbers=numbers, array=np.arange(params.size, dtype="float64") / 3, text="nul \x00 and \ud800")
