"""What a job does with artifacts: read one that its params name, keep a new one; or find that the cache is gone.

A method as a user would add one, for the tests of artifacts that lie behind a URL.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from netassay.fields import AnyNetworkRef
from netassay.method import Contract, Needs
from netassay.store import artifacts

VERSION = 1
EXEMPT = {"reference": "a method for tests"}
NEEDS = Needs(seconds=0.1, libraries=(), group=8)
EXAMPLE = {"jobs": [{"method": "poison.artifact", "params": {"keep": "a text"}}]}


class Params(Contract):
    network: AnyNetworkRef | None = None
    data: str = ""
    keep: str = ""
    sweep: str = ""
    """path of a file; where there is none, it is made and the folder of artifacts removed before anything is read"""
    tag: int = 0


class Result(Contract):
    digest: str
    kept: str
    secrets: list[str]


def run(params: Params) -> Result:
    return run_many([params])[0]


def run_many(many: list[Params]) -> list[Result]:
    return [_run(params) for params in many]


def _run(params: Params) -> Result:
    here = artifacts.current()
    if params.sweep and not Path(params.sweep).exists():
        Path(params.sweep).touch()
        shutil.rmtree(here.folder)
    content = b"".join(here.read(name) for name in (params.network, params.data) if name)
    kept = f"file:{here.put(params.keep.encode())}" if params.keep else ""
    secrets = [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]
    return Result(digest=hashlib.sha256(content).hexdigest(), kept=kept, secrets=secrets)
