"""A job that takes memory and touches all of it.

    resident memory of the job ~ b        b: bytes; without end where `endless`

Every page is written, so the memory is resident and not only promised. An endless job takes blocks of 16 MiB until a
limit ends it: with a MemoryError, or by a killed process. Only try it in a lab whose memory limits you trust.
Cost: about 1.5 s a GiB (measured on a crowded machine), b bytes.
"""

from __future__ import annotations

import mmap
import time

from netassay.fields import Bytes, Seconds
from netassay.method import Contract, Needs
from netassay.methods.diagnostics import _side_log
from netassay.methods.diagnostics._side_log import SideLog, Tag

VERSION = 1
EXEMPT = {"reference": "a diagnostic of the lab: it claims nothing from the literature"}
EXAMPLE = {"jobs": [{"method": "diagnostics.allocate", "grid": {"bytes": [0, 1_000_000, 16_000_000]}}]}

_BLOCK = 16 * 2**20
# What a Python process may need beside the blocks themselves: allocator slack, well above what was ever measured.
_SLACK = 32 * 2**20


class Params(Contract):
    bytes: Bytes = 2**20
    endless: bool = False
    """Take memory without end; `bytes` is then not used."""
    hold: Seconds = 0.0
    """How long to keep the memory before ending."""
    log: SideLog = ""
    tag: Tag = 0


class Result(Contract):
    bytes: int
    """Bytes taken and touched."""


def needs(params: Params) -> Needs:
    return Needs(
        seconds=0.001 + 1.5 * params.bytes / 2**30 + params.hold,
        memory=None if params.endless else params.bytes + _SLACK,
        libraries=(),
    )


def run(params: Params) -> Result:
    with _side_log.witnessed(params.log, name(params)):
        kept = []
        left = params.bytes
        while params.endless or left > 0:
            size = _BLOCK if params.endless else min(left, _BLOCK)
            kept.append(_touched(size))
            left -= size
        time.sleep(params.hold)
    return Result(bytes=sum(map(len, kept)))


def name(params: Params) -> str:
    """How the side log calls this job."""
    return f"allocate {'endless' if params.endless else params.bytes} {params.tag}"


def _touched(size: int) -> bytearray:
    # bytearray(size) comes from calloc, whose pages take no memory until one byte of each is written.
    block = bytearray(size)
    block[:: mmap.PAGESIZE] = b"\x01" * len(range(0, size, mmap.PAGESIZE))
    return block
