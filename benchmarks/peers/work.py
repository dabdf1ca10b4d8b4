"""The jobs that all systems run: nothing, or so much CPU time. No torch is imported by any of them."""

from __future__ import annotations

from netassay.methods.diagnostics import burn


def square(value: int) -> int:
    """The job that does nothing: what `diagnostics.echo` computes, without its Params and Result."""
    return value * value


def spend(seconds: float, tag: int) -> float:
    """So many seconds of CPU time, by the very function of `diagnostics.burn`. tag: makes jobs distinct."""
    return burn.run(burn.Params(seconds=seconds, tag=tag)).seconds


def square_of(value: int) -> float:
    """`square`, for `Pool.imap`."""
    return square(value)


def spend_of(job: tuple[float, int]) -> float:
    """`spend`, for `Pool.imap`, which takes functions of one argument."""
    return spend(*job)
