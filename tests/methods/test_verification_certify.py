"""Verdicts are true, the same for every grouping, and stand by independent evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

from netassay import data, networks  # noqa: E402
from netassay.job import Record  # noqa: E402
from netassay.method import Failure, InvalidInput, NotApplicable, NumericalError  # noqa: E402
from netassay.methods.verification import certify  # noqa: E402
from netassay.networks import onnx_file, recipes  # noqa: E402
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape  # noqa: E402
from netassay.store import artifacts  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    with artifacts.using(folder):
        yield folder


@pytest.fixture(scope="module")
def trained() -> str:
    """A small network trained for a few epochs on digits."""
    recipe = recipes.Recipe.parse(
        {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [24, 24]}, "epochs": 6}
    )
    return networks.resolve(recipes.reference(recipe))


def kept(graph: Graph) -> str:
    return networks.keep(onnx_file.write(graph, "test"))


def linear(weight: np.ndarray, bias: np.ndarray) -> str:
    """A network that is one linear layer on digits."""
    weight, bias = (np.asarray(array, np.float32).astype(np.float64) for array in (weight, bias))
    return kept(
        Graph(
            (Reshape("flatten", "x", "f", (64,)), Dense("dense", "f", "y", (len(bias),), weight, bias)),
            "x", "y", (1, 8, 8), (len(bias),),
        )
    )  # fmt: skip


def jobs(network: str, count: int = 40, **fixed: object) -> list[certify.Params]:
    radii = (0.0, 0.005, 0.02, 0.04, 0.1)
    return [
        certify.Params(network=network, index=index, **{"radius": radii[index % 5], **fixed})  # type: ignore[arg-type]
        for index in range(count)
    ]


def decided(results: list) -> list[tuple]:
    points = [None if result.counterexample is None else result.counterexample.tobytes() for result in results]
    return [(r.verdict, r.by, r.prediction, point) for r, point in zip(results, points, strict=True)]


def margins(results: list) -> np.ndarray:
    names = ("margin_clean", "margin_ibp", "margin_crown", "margin_attack")
    return np.array([[getattr(result, name) for name in names] for result in results], dtype=float)


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_verdicts_are_the_same_for_every_grouping(trained: str, norm: str) -> None:
    params = [p.model_copy(update={"radius": p.radius * (1 if norm == "inf" else 4)}) for p in jobs(trained, norm=norm)]
    params += jobs(trained, 5, split="train", clip=False, steps=5, restarts=2)
    together = certify.run_many(params)
    assert {result.verdict for result in together} == {"certified", "falsified", "unknown"} or norm == "2"
    alone = [certify.run(p) for p in params]
    assert decided(together) == decided(alone)
    np.testing.assert_allclose(margins(together), margins(alone), rtol=1e-9, atol=1e-11)
    order = np.random.default_rng(0).permutation(len(params)).tolist()
    for size in (7, 16):
        shuffled = [
            result for start in range(0, len(order), size)
            for result in certify.run_many([params[place] for place in order[start : start + size]])
        ]  # fmt: skip
        assert decided(shuffled) == decided([together[place] for place in order])


def test_a_bound_within_rounding_of_a_decision_is_computed_alone(monkeypatch: pytest.MonkeyPatch, trained: str) -> None:
    params = jobs(trained, 20)
    expected = decided(certify.run_many(params))
    sizes: list[int] = []
    lower = certify.backward.lower

    def counting(graph: Graph, region: certify.Ball, *rest: object, **more: object) -> object:
        sizes.append(len(region))
        return lower(graph, region, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(certify.backward, "lower", counting)
    # With a band this wide every bound is near a decision.
    monkeypatch.setattr(certify.backward, "NOISE", 1e30)
    assert decided(certify.run_many(params)) == expected
    assert sizes[0] > 1
    assert set(sizes[1:]) == {1}
    assert len(sizes) == 1 + sizes[0]


def test_counterexamples_lie_in_the_ball_and_fool_onnxruntime(trained: str) -> None:
    session = onnxruntime.InferenceSession(networks.content(trained), providers=["CPUExecutionProvider"])
    images = data.load("digits", "test")
    seen = 0
    for norm, radius in (("inf", 0.1), ("2", 0.6)):
        asked = jobs(trained, norm=norm, radius=radius)
        for params, result in zip(asked, certify.run_many(asked), strict=True):
            if result.verdict != "falsified":
                continue
            point, image = result.counterexample, images.x[params.index]
            if result.by == "clean":
                assert point is None
                point = image.astype(np.float32)
            else:
                seen += 1
                assert point.dtype == np.float32
                away = (point.astype(np.longdouble) - image).ravel()
                assert (np.abs(away).max() if norm == "inf" else np.sqrt((away**2).sum())) <= radius
                assert 0 <= point.min() <= point.max() <= 1
            given = session.get_inputs()[0]
            outputs = session.run(None, {given.name: point.reshape(1, 1, 8, 8).astype(np.float32)})[0]
            assert int(np.argmax(outputs)) != result.label
    assert seen > 10


def test_no_sampled_point_contradicts_a_certificate(trained: str) -> None:
    graph = networks.load(trained)
    generator = torch.Generator().manual_seed(0)
    certified = 0
    for params, result in zip(jobs(trained), certify.run_many(jobs(trained)), strict=True):
        assert (result.verdict == "certified") == (result.by in ("ibp", "crown"))
        if result.verdict != "certified":
            continue
        certified += 1
        x = torch.tensor(data.load("digits", "test").x[params.index])
        uniform = torch.rand(200, *x.shape, generator=generator)
        for step in (uniform, uniform.round()):
            points = (x + params.radius * (2 * step - 1).double()).clamp(0, 1)
            outputs = networks.evaluate.forward(graph, points).flatten(1)
            rivals = outputs.clone()
            rivals[:, result.label] = -torch.inf
            sampled = float((outputs[:, result.label] - rivals.amax(1)).min())
            assert sampled > 0
            assert sampled >= result.margin_ibp
            assert result.margin_crown is None or sampled >= result.margin_crown
    assert certified > 5


def test_bounds_and_attack_enclose_the_true_margin(trained: str) -> None:
    for result in certify.run_many(jobs(trained)):
        assert result.margin_ibp <= result.margin_clean
        if result.margin_attack is not None:
            assert result.margin_attack <= result.margin_clean + 1e-9
            assert result.margin_ibp <= result.margin_attack
            assert result.margin_crown is None or result.margin_crown <= result.margin_attack


def test_a_linear_network_is_decided_at_its_exact_radius() -> None:
    generator = np.random.default_rng(0)
    images = data.load("digits", "test")
    weight = generator.normal(size=(10, 64))
    network = linear(weight, np.zeros(10))
    weight = weight.astype(np.float32).astype(np.float64)
    for index in range(20):
        x, y = images.x[index].ravel(), int(images.y[index])
        rows = np.delete(weight[y] - weight, y, axis=0)
        at_zero = (rows @ x).min()
        for norm, dual in (("inf", np.abs(rows).sum(1)), ("2", np.sqrt((rows**2).sum(1)))):
            if at_zero <= 0:
                assert certify.run(certify.Params(network=network, index=index, radius=0.1, norm=norm)).by == "clean"
                continue
            exact = (rows @ x / dual).min()
            ask = {"network": network, "index": index, "norm": norm, "clip": False}
            assert certify.run(certify.Params(**ask, radius=exact * 0.999)).verdict == "certified"
            assert certify.run(certify.Params(**ask, radius=exact * 1.001)).verdict == "falsified"
            # At the exact radius the margin is 0 up to rounding: no proof may be claimed.
            assert certify.run(certify.Params(**ask, radius=exact)).verdict != "certified"


def test_equal_outputs_are_never_certified() -> None:
    network = linear(np.zeros((10, 64)), np.zeros(10))
    images = data.load("digits", "test")
    for index in range(10):
        result = certify.run(certify.Params(network=network, index=index, radius=0.1))
        # argmax takes the lowest of equals: class 0.
        assert result.prediction == 0
        assert result.verdict == ("unknown" if images.y[index] == 0 else "falsified")
        assert result.correct == (images.y[index] == 0)


def test_a_constant_winner_is_certified_at_any_radius() -> None:
    images = data.load("digits", "test")
    label = int(images.y[0])
    network = linear(np.zeros((10, 64)), np.eye(10)[label])
    result = certify.run(certify.Params(network=network, index=0, radius=1e6, clip=False))
    assert (result.verdict, result.by) == ("certified", "ibp")
    assert result.margin_ibp == pytest.approx(1, abs=1e-5)


def test_a_convolutional_network_is_certified_too() -> None:
    generator = np.random.default_rng(1)
    operations = (
        Conv("conv", "x", "c", (3, 4, 4), generator.normal(size=(3, 1, 3, 3)), np.zeros(3),
             (2, 2), (1, 1, 1, 1), (1, 1), 1),
        Relu("relu", "c", "a", (3, 4, 4)),
        Reshape("flatten", "a", "f", (48,)),
        Dense("dense", "f", "y", (10,), generator.normal(size=(10, 48)), np.zeros(10)),
    )  # fmt: skip
    network = kept(Graph(operations, "x", "y", (1, 8, 8), (10,)))
    params = jobs(network, 60, radius=0.002)
    together = certify.run_many(params)
    assert {"certified", "falsified"} <= {result.verdict for result in together}
    assert decided(together) == decided([certify.run(p) for p in params])


@pytest.mark.parametrize("split, size", [("test", 599), ("train", 1198), ("all", 1797)])
def test_an_index_outside_the_split_is_refused_with_the_range(split: str, size: int) -> None:
    reference = "onnx:" + "0" * 64
    certify.Params(network=reference, split=split, index=size - 1, radius=0)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=rf"0\.\.{size - 1}"):
        certify.Params(network=reference, split=split, index=size, radius=0)  # type: ignore[arg-type]


def test_what_does_not_fit_fails_alone_and_says_why(trained: str) -> None:
    good = certify.Params(network=trained, index=0, radius=0.01)
    outside = good.model_copy(update={"index": 10_000})
    first, second = certify.run_many([outside, good])
    assert isinstance(first, Failure)
    assert first.cause == "invalid_input"
    assert "0..598" in first.message
    assert decided([second]) == decided([certify.run(good)])
    with pytest.raises(InvalidInput, match="does not take iris"):
        certify.run(certify.Params(network=trained, dataset="iris", index=0, radius=0.1))
    with pytest.raises(NotApplicable, match="one output"):
        certify.run(certify.Params(network=linear(np.ones((1, 64)), np.zeros(1)), index=0, radius=0.1))
    of_a_nine = int(np.argmax(data.load("digits", "test").y == 9))
    with pytest.raises(InvalidInput, match="label 9, but the network has 2 outputs"):
        certify.run(certify.Params(network=linear(np.ones((2, 64)), np.zeros(2)), index=of_a_nine, radius=0.1))


def test_overflow_is_a_numerical_error_and_not_a_verdict() -> None:
    network = linear(np.full((10, 64), 1e38), np.zeros(10))
    with pytest.raises(NumericalError, match="not finite"):
        certify.run(certify.Params(network=network, index=0, radius=1e300, clip=False))


def record(ordinal: int, radius: float, state: str, **result: object) -> Record:
    return Record(
        id=ordinal, key=f"{ordinal:032x}", method="verification.certify", version=1, state=state,
        params={"network": "onnx:" + "0" * 64, "radius": radius, "norm": "inf"},
        result=dict(result) or None, names={"onnx:" + "0" * 64: "f.onnx"},
    )  # fmt: skip


def test_the_plot_shares_only_results_and_says_how_many_are_missing() -> None:
    records = [
        record(0, 0.1, "done", verdict="certified", correct=True),
        record(1, 0.1, "done", verdict="unknown", correct=True),
        record(2, 0.1, "done", verdict="falsified", correct=True),
        record(3, 0.1, "done", verdict="falsified", correct=False),
        record(4, 0.1, "failed"),
        record(5, 0.2, "pending"),
    ]
    figure = certify.plot(records)
    lines = {line.label: (line.x, line.y) for line in figure.panels[0].marks}
    assert lines == {"clean": ([0.1], [3 / 4]), "not falsified": ([0.1], [2 / 4]), "certified": ([0.1], [1 / 4])}
    band = figure.panels[0].marks[2]
    assert (band.label, band.low, band.high) == ("certified", [1 / 4], [2 / 4])
    assert [panel.title for panel in figure.panels] == ["f.onnx"]
    assert "2 of them without a result" in figure.caption
    assert certify.plot([]).panels[0].marks == []
