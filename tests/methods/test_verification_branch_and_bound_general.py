"""Verdicts about smooth networks stand by attacks and samples, and heuristics are worth their parts."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

from netassay import data, networks  # noqa: E402
from netassay.method import InvalidInput, NotApplicable  # noqa: E402
from netassay.methods.verification import branch_and_bound_general as method  # noqa: E402
from netassay.networks import evaluate, onnx_file  # noqa: E402
from netassay.networks.graph import Activation, Dense, Graph, Operation  # noqa: E402
from netassay.numerics import attacks  # noqa: E402
from netassay.numerics.bounds.regions import Ball  # noqa: E402
from netassay.store import artifacts  # noqa: E402

FUNCTIONS = {"tanh": torch.tanh, "sin": torch.sin, "gelu": torch.nn.functional.gelu}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


@functools.cache
def trained(function: str) -> Graph:
    """64-20-20-10 on digits."""
    examples = data.load("digits", "train")
    x, y = torch.tensor(np.array(examples.x)).float().flatten(1), torch.tensor(np.array(examples.y)).long()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*sizes) for sizes in itertools.pairwise((64, 20, 20, 10))]
    weights = [weight for layer in layers for weight in layer.parameters()]
    optimiser = torch.optim.Adam(weights, lr=5e-3)
    for _ in range(20):
        for some in torch.randperm(len(x)).split(64):
            value = x[some]
            for layer in layers[:-1]:
                value = FUNCTIONS[function](layer(value))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(layers[-1](value), y[some]).backward()
            optimiser.step()
    steps: list[Operation] = []
    at = "x"
    for number, layer in enumerate(layers):
        weight, bias = (tensor.detach().double().numpy() for tensor in (layer.weight, layer.bias))
        steps.append(Dense(f"d{number}", at, f"z{number}", (len(bias),), weight, bias))
        at = f"z{number}"
        if number < 2:
            steps.append(Activation(f"a{number}", at, f"a{number}", (20,), function))  # type: ignore[arg-type]
            at = f"a{number}"
    return Graph(tuple(steps), "x", at, (64,), (10,))


def kept(function: str) -> str:
    return networks.keep(onnx_file.write(trained(function), "test"))


def params(function: str, **more: object) -> method.Params:
    return method.Params(network=kept(function), **{"restarts": 10, **more})  # type: ignore[arg-type]


def check(wanted: method.Params, result: method.Result) -> None:
    """What any result must hold to."""
    graph = networks.load(wanted.network)
    examples = data.load("digits", "test")
    x, label = np.array(examples.x[wanted.index], dtype=np.float64).ravel(), int(examples.y[wanted.index])
    assert result.label == label
    assert result.parts <= wanted.budget
    if result.trace is not None:
        assert bool((np.diff(result.trace[:, 1]) >= 0).all())
        assert bool((np.diff(result.trace[:, 0]) > 0).all())
    ball = Ball("inf", torch.tensor(x)[None], torch.tensor([wanted.radius], dtype=torch.float64), 0.0, 1.0)
    if result.verdict == "falsified":
        point = result.counterexample
        assert point.dtype == np.float32
        assert bool(attacks.contains(ball, torch.tensor(point.astype(np.float64))[None])[0])
        session = onnxruntime.InferenceSession(networks.content(wanted.network), providers=["CPUExecutionProvider"])
        output = session.run(None, {session.get_inputs()[0].name: point[None]})[0].ravel()
        assert np.delete(output, label).max() >= output[label]
    if result.verdict == "verified":
        assert result.lower > 0
        lower, upper = (end[0] for end in ball.box())
        draws = torch.rand(100_000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        draws[::2] = draws[::2].round()
        outputs = evaluate.forward(graph, lower + draws * (upper - lower))
        assert bool((outputs.argmax(1) == label).all())
        attack = attacks.pgd(graph, ball, torch.tensor([label]), steps=40, restarts=50, seeds=[5])
        assert int(evaluate.forward(graph, attack.points).argmax()) == label


@pytest.mark.parametrize("function", ["tanh", "sin", pytest.param("gelu", marks=pytest.mark.slow)])
def test_every_verdict_stands_by_samples_attacks_and_onnxruntime(function: str) -> None:
    seen = Counter()
    for index, radius in ((0, 0.01), (1, 0.01), (2, 0.3)):
        wanted = params(function, index=index, radius=radius, budget=100)
        result = method.run(wanted)
        check(wanted, result)
        seen[result.verdict] += 1
    assert seen["verified"] > 0
    assert seen["falsified"] > 0


def test_a_radius_of_zero_is_decided_by_the_image() -> None:
    graph = trained("tanh")
    examples = data.load("digits", "test")
    output = evaluate.forward(graph, torch.tensor(np.array(examples.x[:40], dtype=np.float64)).flatten(1)).argmax(1)
    right = (output.numpy() == examples.y[:40]).tolist()
    for index in (right.index(True), *([right.index(False)] if False in right else [])):
        result = method.run(params("tanh", index=index, radius=0.0, budget=100))
        assert result.verdict == ("verified" if right[index] else "falsified")
        assert result.by == ("root" if right[index] else "attack")


def test_networks_without_anything_to_split_and_images_of_another_size_are_refused() -> None:
    weight = np.ones((10, 64))
    affine = networks.keep(onnx_file.write(Graph((Dense("d", "x", "y", (10,), weight, weight[:, 0]),), "x", "y", (64,), (10,)), "t"))  # fmt: skip  # noqa: E501
    with pytest.raises(NotApplicable, match="affine"):
        method.run(method.Params(network=affine, index=0, radius=0.1))
    with pytest.raises(InvalidInput, match="does not take"):
        method.run(method.Params(network=kept("tanh"), dataset="iris", index=0, radius=0.1))


@pytest.mark.slow
def test_splitting_by_bbps_verifies_no_fewer_than_by_width_and_that_no_fewer_than_the_root() -> None:
    """Equal budgets of 300 parts; the root: the 9 whole boxes, with optimised lines."""
    verified: Counter[str] = Counter()
    kinds = {
        "bbps, optimised": {"budget": 300},
        "width, midpoint": {"budget": 300, "heuristic": "width", "points": "midpoint"},
        "root": {"budget": 9},
    }
    for function, index, radius in itertools.product(FUNCTIONS, range(6), (0.05, 0.07)):
        for kind, more in kinds.items():
            wanted = params(function, index=index, radius=radius, **more)
            result = method.run(wanted)
            check(wanted, result)
            verified[kind] += result.verdict == "verified"
    print(dict(verified))
    assert verified["bbps, optimised"] >= verified["width, midpoint"] >= verified["root"]
    assert verified["bbps, optimised"] > verified["root"]
