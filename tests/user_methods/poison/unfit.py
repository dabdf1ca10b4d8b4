"""A job whose library is not installed.

A method as a user would add one, for the tests of the supervisor.
"""

from __future__ import annotations

from netassay.method import Contract, Needs

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
NEEDS = Needs(seconds=0.1, libraries=("no_such_library",))
EXAMPLE = {"jobs": [{"method": "poison.unfit"}]}


class Params(Contract):
    tag: int = 0


class Result(Contract):
    tag: int


def run(params: Params) -> Result:
    return Result(tag=params.tag)
