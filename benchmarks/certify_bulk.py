"""What bulk buys: `verification.certify` on many images in one call against the same jobs one by one; and the cost of
interval and CROWN bounds on nets for which a peer's figures are known.

    python benchmarks/certify_bulk.py [--jobs 128] [--repeats 3]

One torch thread, as in a compute child. Each figure is the best of the repeats, after a warm-up; on a shared machine
differences under 20 % are noise. The verdicts of both ways are compared, so a fast wrong answer cannot pass.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from netassay import networks
from netassay.methods.verification import certify
from netassay.networks import onnx_file, recipes
from netassay.networks.graph import Dense, Graph, Operation, Relu, Reshape
from netassay.numerics.bounds import backward, interval
from netassay.numerics.bounds.regions import Ball
from netassay.store import artifacts

REFERENCE = Path(__file__).parents[1] / "../shared/reference"

#: Microseconds a box at batch 1, 64 and 512: auto_LiRPA 0.7.1 in float32, one thread of a 2-core machine.
PEER = {
    "mlp784-256x2-10": {"interval": (669, 24, 17), "crown": (5950, 4846, 6888)},
    "mlp64-128x4-10": {"interval": (1117, 21, 10), "crown": (4975, 922, 2134)},
    "acasxu1_1": {"interval": (1340, 27, 5), "crown": (7216, 447, 350)},
}

RECIPES = {
    "digits mlp 64-64-64-10": {"architecture": {"kind": "mlp", "hidden": [64, 64]}, "epochs": 20},
    "digits mlp 64-64-64-10, ibp": {
        "architecture": {"kind": "mlp", "hidden": [64, 64]}, "training": {"kind": "ibp"}, "epochs": 40,
    },
    "digits cnn": {"architecture": {"kind": "cnn"}, "epochs": 5},
}  # fmt: skip


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def in_bulk(name: str, network: str, radius: float, norm: str, jobs: int, repeats: int) -> None:
    params = [certify.Params(network=network, index=index, radius=radius, norm=norm) for index in range(jobs)]  # type: ignore[arg-type]
    few = params[: max(8, jobs // 8)]
    bulk = best(lambda: certify.run_many(params), repeats) / len(params)
    single = best(lambda: [certify.run(p) for p in few], repeats) / len(few)
    results = certify.run_many(params)
    if [r.verdict for r in results[: len(few)]] != [certify.run(p).verdict for p in few]:  # type: ignore[union-attr]
        raise SystemExit(f"{name}: bulk and one by one disagree")
    counts = Counter(f"{r.verdict} {r.by or ''}".strip() for r in results)  # type: ignore[union-attr]
    print(
        f"{name:30} l_{norm:3} {radius:<6} bulk {bulk * 1e3:7.2f} ms/job, one by one {single * 1e3:7.2f}, "
        f"ratio {single / bulk:5.1f}   {dict(counts)}"
    )


def reference_graph(path: Path) -> tuple[Graph, np.ndarray]:
    """A stored net, reading what a digits-like image would be, and its 64 stored inputs."""
    with np.load(path) as stored:
        layers = sum(name.startswith("W") for name in stored)
        arrays = [(stored[f"W{i}"].astype(np.float64), stored[f"b{i}"].astype(np.float64)) for i in range(layers)]
        inputs = stored["x"].astype(np.float64)
    operations: list[Operation] = []
    value = "x"
    for layer, (weight, bias) in enumerate(arrays):
        operations.append(Dense(f"dense{layer}", value, f"z{layer}", bias.shape, weight, bias))
        value = f"z{layer}"
        if layer < layers - 1:
            operations.append(Relu(f"relu{layer}", value, f"a{layer}", bias.shape))
            value = f"a{layer}"
    return Graph(tuple(operations), "x", value, inputs.shape[1:], operations[-1].shape), inputs


def per_box(repeats: int) -> None:
    print("\nmicroseconds a box, float64, bounds of all outputs, l_inf radius 0.02 (peer: auto_LiRPA, float32)")
    for net, peers in PEER.items():
        path = REFERENCE / f"bounds_{net}.npz"
        if not path.is_file():
            print(f"{net}: no stored net beside the checkout")
            continue
        graph, inputs = reference_graph(path)
        for name, method in (("interval", interval.bounds), ("crown", backward.bounds)):
            figures = []
            for count, peer in zip((1, 64, 512), peers[name], strict=True):
                x = torch.tensor(np.resize(inputs, (count, *inputs.shape[1:])))
                region = Ball("inf", x, torch.full((count,), 0.02, dtype=torch.float64))
                ours = best(functools.partial(method, graph, region), repeats) / count * 1e6
                figures.append(f"N={count}: {ours:7.0f} (peer {peer}, {peer / ours:.2f} x)")
            print(f"{net:16} {name:9} " + "   ".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, artifacts.using(Path(folder)):
        for name, recipe in RECIPES.items():
            network = networks.resolve(recipes.reference(recipes.Recipe.parse({"dataset": "digits", **recipe})))
            for norm, radius in (("inf", 0.01), ("inf", 0.04), ("2", 0.2)):
                in_bulk(name, network, radius, norm, arguments.jobs, arguments.repeats)
        network = networks.keep(onnx_file.write(wide(), "wide"))
        in_bulk("784-256-256-10 on digits", network, 0.002, "inf", min(arguments.jobs, 64), arguments.repeats)
        per_box(arguments.repeats)


def wide() -> Graph:
    """A 784-256-256-10 net behind a map that lays each 8 x 8 digit out over 28 x 28 pixels; random layers, the last one
    fitted by least squares, so that its answers are right and its margins real.
    """
    from netassay import data
    from netassay.networks.evaluate import forward

    generator = np.random.default_rng(0)

    def layer(out: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = generator.normal(size=(out, n)) / np.sqrt(n), generator.uniform(-1, 1, size=out) / np.sqrt(n)
        return np.float64(np.float32(weight)), np.float64(np.float32(bias))

    # Nearest pixel: row i of the large image shows row floor(i 8 / 28) of the small one.
    near = np.arange(28) * 8 // 28
    spread = np.zeros((784, 64))
    spread[np.arange(784), (near[:, None] * 8 + near).ravel()] = 1
    (w0, b0), (w1, b1) = layer(256, 784), layer(256, 256)
    body: tuple[Operation, ...] = (
        Reshape("flatten", "x", "f", (64,)),
        Dense("spread", "f", "s", (784,), spread, np.zeros(784)),
        Dense("dense0", "s", "z0", (256,), w0, b0),
        Relu("relu0", "z0", "a0", (256,)),
        Dense("dense1", "a0", "z1", (256,), w1, b1),
        Relu("relu1", "z1", "a1", (256,)),
    )
    train = data.load("digits", "train")
    features = forward(Graph(body, "x", "a1", (1, 8, 8), (256,)), torch.tensor(np.array(train.x))).numpy()
    last = np.linalg.lstsq(features.T @ features + 0.1 * np.eye(256), features.T @ np.eye(10)[train.y], rcond=None)[0].T
    head = Dense("last", "a1", "y", (10,), np.float64(np.float32(last)), np.zeros(10))
    return Graph((*body, head), "x", "y", (1, 8, 8), (10,))


if __name__ == "__main__":
    main()
