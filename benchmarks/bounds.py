"""Interval and CROWN bounds against auto_LiRPA's: the same network, boxes and thread, in turn in one run.

    PYTHONPATH=checkout_of_auto_LiRPA python benchmarks/bounds.py [--nets ...] [--boxes 1,64,512] [--seconds 6]

Networks and the first 64 boxes (l_inf, radius 0.02) are those stored beside the checkout; more boxes repeat them.
auto_LiRPA computes in float32, ours in both. Each call is timed in processor time of its thread, peer and ours in turn;
cells are the least and the median of the repeats, ratios peer / ours of both. Without auto_LiRPA its stored seconds
stand for it, of another run on a like machine.

floor: the matrix products of one of our calls (mm, addmm, bmm and matrix times vector, by torch's profiler), as a share
of its time.

difference: the largest |ours - peer's| over outputs and boxes, in units of max(|lower|, |upper|, width), 64 boxes. Ours
in float64, for the error bound that is taken off in float32 is part of no peer's bound; without cutting with boxes, as
the peer does not: every neuron of every hidden layer is bounded backward anew. "as they are": of the bounds one gets.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from certify_bulk import PEER, REFERENCE, reference_graph

from netassay.networks.graph import Dense, Graph
from netassay.numerics.bounds import backward, interval
from netassay.numerics.bounds.backward import Block
from netassay.numerics.bounds.interval import Interval
from netassay.numerics.bounds.regions import Ball

RADIUS = 0.02
METHODS = {"IBP": interval.bounds, "CROWN": backward.bounds}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::addmv_"}
#: Ratios that are to be reached, float32, by network and number of boxes.
TARGETS = {
    "acasxu1_1": {1: 6.0, 64: 1.5, 512: 1.5},
    "mlp64-128x4-10": {1: 3.0, 64: 1.3, 512: 1.7},
    "mlp784-256x2-10": {1: 1.4, 64: 1.4, 512: 1.4},
}

Bounds = tuple[torch.Tensor, torch.Tensor]


def peer_of(graph: Graph, x: torch.Tensor) -> Callable[[str], Bounds] | None:
    """auto_LiRPA's bounds of a method by its name, None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    except ImportError:
        return None
    layers: list[torch.nn.Module] = []
    for operation in graph.operations:
        layers.append(torch.nn.ReLU())
        if isinstance(operation, Dense):
            layers[-1] = linear = torch.nn.Linear(*operation.weight.shape[::-1])
            linear.weight.data = torch.tensor(operation.weight, dtype=x.dtype)
            linear.bias.data = torch.tensor(operation.bias, dtype=x.dtype)
    module: Any = BoundedModule(torch.nn.Sequential(*layers), torch.zeros_like(x[:1]), verbose=False)
    boxes = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=RADIUS))

    def bounds(method: str) -> Bounds:
        with torch.no_grad():
            return module.compute_bounds(x=(boxes,), method=method)

    return bounds


def region_of(x: torch.Tensor) -> Ball:
    return Ball("inf", x, torch.full((len(x),), RADIUS, dtype=x.dtype))


def in_turn(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, all of them again and again for so long, three times at least."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            began = time.process_time()
            call()
            times[name].append((time.process_time() - began) * 1e3)
    return times


def share_of_products(call: Callable[[], object], seconds: float) -> float:
    """Of the time of a call, what its matrix products take; the median of some calls."""
    shares, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(shares) < 3:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            began = time.perf_counter()
            call()
            whole = (time.perf_counter() - began) * 1e6
        shares.append(sum(e.self_cpu_time_total for e in profile.key_averages() if e.key in PRODUCTS) / whole)
    return statistics.median(shares)


def uncut(graph: Graph, region: Ball) -> Bounds:
    """CROWN where no bound is cut with a box: every hidden neuron is bounded backward by the lines before it."""
    size = math.prod(graph.output_shape)

    def anew(at: str, x: Interval, block: Block, slack: torch.Tensor) -> Interval:
        rows = torch.eye(x.lower[0].numel(), dtype=x.lower.dtype)
        row = backward.walk(graph, torch.cat([rows, -rows])[None], at, block.lines)
        low, high = (row.d + region.minimum(row.a.flatten(2))).chunk(2, dim=1)
        return Interval(low, -high)

    block = backward.relaxed(graph, region, refine=anew)
    rows = torch.eye(size, dtype=region.centre.dtype)
    row = backward.walk(graph, torch.cat([rows, -rows])[None], graph.output, block.lines)
    low, high = (row.d + region.minimum(row.a.flatten(2))).chunk(2, dim=1)
    return low, -high


def difference(ours: Bounds, peers: Bounds) -> float:
    low, high = (side.double() for side in peers)
    unit = torch.maximum(torch.maximum(low.abs(), high.abs()), high - low)
    return max(float(((mine - side).abs() / unit).max()) for mine, side in zip(ours, (low, high), strict=True))


def row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--nets", default=",".join(PEER))
    options.add_argument("--boxes", default="1,64,512")
    options.add_argument("--seconds", type=float, default=6.0, help="for each network and number of boxes")
    wanted = options.parse_args()
    torch.set_num_threads(1)
    speed, differences = [], []
    for net in wanted.nets.split(","):
        graph, inputs = reference_graph(REFERENCE / f"bounds_{net}.npz")
        with np.load(REFERENCE / f"bounds_{net}.npz") as stored:
            kept = {m: (torch.tensor(stored[f"{m}_lb"]), torch.tensor(stored[f"{m}_ub"])) for m in METHODS}
        for count in map(int, wanted.boxes.split(",")):
            x = torch.tensor(np.resize(inputs, (count, *inputs.shape[1:])), dtype=torch.float32)
            peer = peer_of(graph, x)
            calls: dict[str, Callable[[], object]] = {} if peer is None else {"peer": lambda p=peer: p("CROWN")}  # type: ignore[misc]
            for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
                calls[name] = functools.partial(backward.bounds, graph, region_of(x.to(dtype)))
            times = in_turn(calls, wanted.seconds)
            place = {1: 0, 64: 1, 512: 2}.get(count)
            if peer is None and place is not None:
                times["peer"] = [PEER[net]["crown"][place] * count / 1e3]
            cells = [net, count, len(times["float64"])]
            for name in ("peer", "float32", "float64"):
                of = times.get(name, [math.nan])
                cells.append(f"{min(of):.2f} ({statistics.median(of):.2f})")
            for name in ("float32", "float64"):
                least, median = (f(times.get("peer", [math.nan])) / f(times[name]) for f in (min, statistics.median))
                cells.append(f"{least:.2f} ({median:.2f})")
                cells.append(f"{share_of_products(calls[name], wanted.seconds / 6):.0%}")
            speed.append(row([*cells, TARGETS[net].get(count, "")]))
            print(speed[-1], flush=True)
        x = torch.tensor(inputs, dtype=torch.float32)
        peer, region = peer_of(graph, x), region_of(x.double())
        for method, bounds in METHODS.items():
            peers = kept[method] if peer is None else peer(method)
            same = bounds(graph, region) if method == "IBP" else uncut(graph, region)
            as_they_are = (difference(bounds(graph, region_of(x.to(d))), peers) for d in (torch.float64, torch.float32))
            differences.append(row([net, method, *(f"{d:.1e}" for d in (difference(same, peers), *as_they_are))]))
    print("\nCROWN, bounds of all outputs, ms a call")
    print(row(["net", "boxes", "runs", "auto_LiRPA", "float32", "float64", "peer / float32", "products",
               "peer / float64", "products", "target, float32"]))  # fmt: skip
    print(row(["---"] * 11), *speed, sep="\n")
    print("\ndifference from auto_LiRPA, float32")
    print(row(["net", "method", "the same rule", "as they are, float64", "as they are, float32"]))
    print(row(["---"] * 5), *differences, sep="\n")


if __name__ == "__main__":
    main()
