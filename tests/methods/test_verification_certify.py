"""Verdicts are true, the same for every grouping, and stand by independent evaluation."""

from __future__ import annotations

import itertools
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
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape, Scale  # noqa: E402
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


def dense(*layers: tuple[np.ndarray, np.ndarray], between: tuple = ()) -> str:
    """Flatten, dense layers with ReLU between them; constants of float32."""
    operations: list = [*between] or [Reshape("flatten", "x", "f", (64,))]
    for place, (weight, bias) in enumerate(layers):
        weight, bias = (np.asarray(array, np.float32).astype(np.float64) for array in (weight, bias))
        if place:
            operations.append(Relu(f"relu{place}", operations[-1].target, f"a{place}", operations[-1].shape))
        operations.append(Dense(f"d{place}", operations[-1].target, f"z{place}", (len(bias),), weight, bias))
    return kept(Graph(tuple(operations), "x", operations[-1].target, (1, 8, 8), operations[-1].shape))


def replayed(network: str, points: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(networks.content(network), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    outputs = [session.run(None, {given.name: p.reshape(1, 1, 8, 8).astype(np.float32)})[0].ravel() for p in points]
    return np.stack(outputs)


def test_a_sum_that_may_overflow_in_float32_is_never_certified() -> None:
    images = data.load("digits", "test")
    x, label = images.x[0].ravel(), int(images.y[0])
    first = np.zeros((1, 64))
    # 3e38 + 3e38 - 3e38 over three pixels that are 1: finite in exact arithmetic, infinite in float32 after two terms.
    first[0, np.flatnonzero(x == 1)[:3]] = [3e38, 3e38, -3e38]
    network = dense((first, np.zeros(1)), (np.eye(10)[:, [label]] * 1e-38, np.zeros(10)))
    assert not np.isfinite(replayed(network, images.x[:1])).all()
    with pytest.raises(NumericalError, match="may overflow"):
        certify.run(certify.Params(network=network, index=0, radius=0.001))


def test_an_upper_end_of_minus_infinity_is_not_taken_to_zero_by_relu() -> None:
    label = int(data.load("digits", "test").y[0])
    big = np.full((1, 1), -3e38)
    layers = [(np.full((1, 64), 3e38), np.zeros(1))] + [(-big, np.zeros(1))] * 8 + [(big, np.zeros(1))]
    network = dense(*layers, (np.eye(10)[:, [0]], np.eye(10)[label]))
    with pytest.raises(NumericalError, match="not finite"):
        certify.run(certify.Params(network=network, index=0, radius=0.001))


def test_a_misclassified_image_is_falsified_whatever_its_bounds_and_a_radius_at_fault_is_named() -> None:
    label = int(data.load("digits", "test").y[0])
    wrong, right = (linear(np.ones((10, 64)), np.eye(10)[best]) for best in ((label + 1) % 10, label))
    ask = {"index": 0, "radius": 1.7e308, "clip": False}
    result = certify.run(certify.Params(network=wrong, **ask))
    assert (result.verdict, result.by, result.margin_ibp) == ("falsified", "clean", -np.inf)
    with pytest.raises(NumericalError, match=r"radius 1\.7e\+308.*a smaller radius"):
        certify.run(certify.Params(network=right, **ask))


def test_a_layer_too_wide_for_float32_bounds_fails_alone_with_advice() -> None:
    widths = [64, 1, 200_000, 1, 10]
    network = dense(*((np.zeros((out, n)), np.zeros(out)) for n, out in itertools.pairwise(widths)))
    first, second = certify.run_many([certify.Params(network=network, index=i, radius=0.01) for i in (0, 1)])
    for outcome in (first, second):
        assert isinstance(outcome, Failure)
        assert outcome.cause == "not_applicable"
        assert "fewer than 160,000" in outcome.message


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_float32_rounding_inside_a_network_is_part_of_the_certificate(norm: str) -> None:
    """Adding and subtracting 1e8 leaves nothing of a pixel in float32, while in exact arithmetic nothing happens."""
    images = data.load("digits", "test")
    label, brightest = int(images.y[0]), int(images.x[0].ravel().argmax())
    shift = np.array([1e8])
    before = (
        Scale("add", "x", "s", (1, 8, 8), np.ones((1, 1, 1)), shift.reshape(1, 1, 1)),
        Reshape("flatten", "s", "f", (64,)),
        Scale("subtract", "f", "t", (64,), np.ones(64), np.full(64, -1e8)),
    )
    other = np.full(10, -1.0)
    other[label], other[(label + 1) % 10] = 0.0, np.float32(0.9999)
    network = dense((np.eye(64)[[brightest]], np.zeros(1)), (np.eye(10)[:, [label]], other), between=before)
    # From just below 1 the pixel falls to 0 behind the two shifts, and the other class wins.
    points = np.repeat(images.x[:1].reshape(1, 64), 2, 0).astype(np.float32)
    points[:, brightest] = [1 - 2.0**-24, 1 - 2.0**-20]
    assert (replayed(network, points).argmax(1) != label).any()
    assert certify.run(certify.Params(network=network, index=0, radius=1e-5, norm=norm)).verdict != "certified"


def edge(network: list, label: int, region: certify.Ball, evaluated: torch.dtype | None) -> float:
    """The least margin that CROWN proves."""
    graph = networks.load(dense(*network))
    rows = certify._rows(torch.tensor([label]), 10)
    return float(certify.backward.lower(graph, region, rows, evaluated=evaluated).lower.amin())


def test_certificates_at_the_edge_stand_in_onnxruntime_and_leave_room_for_float32() -> None:
    """The label's bias is tuned so that the exact margin over the ball is positive by less than float32 can err."""
    images, verdicts = data.load("digits", "test"), []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        x, label = images.x[seed], int(images.y[seed])
        layers = [
            (generator.normal(size=(20, 64)), generator.normal(size=20)),
            (generator.normal(size=(20, 20)), generator.normal(size=20)),
            (generator.normal(size=(10, 20)), np.zeros(10)),
        ]
        region = certify.Ball("inf", torch.tensor(np.array(x))[None], torch.tensor([1e-4], dtype=torch.float64), 0, 1)
        exact, float32 = (edge(layers, label, region, evaluated) for evaluated in (None, torch.float32))
        assert float32 < exact
        for target, certified in ((-exact + (exact - float32) / 2, False), (-float32 + (exact - float32) / 2, True)):
            layers[-1][1][label] = target
            network = dense(*layers)
            result = certify.run(certify.Params(network=network, index=seed, radius=1e-4, steps=3, restarts=1))
            verdicts.append(result.verdict)
            assert (result.verdict == "certified") == certified
            if certified:
                steps = generator.choice([-1, 1], size=(20, 64))
                points = np.clip(x.ravel() + 0.999e-4 * steps, 0, 1).astype(np.float32)
                assert (replayed(network, points).argmax(1) == label).all()
    assert verdicts.count("certified") == 12


def test_a_counterexample_counts_only_if_onnxruntime_on_the_file_agrees(
    monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    asked = jobs(trained, 20, radius=0.1)
    before = certify.run_many(asked)
    assert {("falsified", "attack"), ("falsified", "clean")} <= {(result.verdict, result.by) for result in before}
    labels = [result.label for result in before]
    run = certify.replay.outputs
    for spoilt in ("label", "nan"):

        def outputs(reference: str, x: np.ndarray, spoilt: str = spoilt) -> np.ndarray:
            y = run(reference, x).copy()
            y[:] = np.nan if spoilt == "nan" else 0
            return y

        with monkeypatch.context() as patch:
            patch.setattr(certify.replay, "outputs", outputs)
            for result, label in zip(certify.run_many(asked), labels, strict=True):
                # All outputs 0: the class is 0, a misclassification of every other label.
                assert result.verdict != "falsified" or (spoilt == "label" and label != 0)


@pytest.mark.parametrize("judge", ["contains", "float32"])
def test_every_judge_of_a_counterexample_is_asked(monkeypatch: pytest.MonkeyPatch, trained: str, judge: str) -> None:
    asked = jobs(trained, 20, radius=0.1)
    assert any(result.by == "attack" for result in certify.run_many(asked))
    if judge == "contains":
        none = lambda region, points: torch.zeros(len(points), dtype=torch.bool)  # noqa: E731
        monkeypatch.setattr(certify.attacks, "contains", none)
        results = certify.run_many(asked)
        assert all(result.by != "attack" and result.margin_attack is None for result in results)
        return
    forward = certify.forward

    def righted(graph: Graph, x: torch.Tensor) -> torch.Tensor:
        outputs = forward(graph, x)
        return outputs if x.dtype == torch.float64 else torch.full_like(outputs, torch.nan)

    monkeypatch.setattr(certify, "forward", righted)
    assert all(result.verdict != "falsified" for result in certify.run_many(asked))


def test_the_replay_takes_one_input_of_any_declared_shape_and_says_why_a_file_cannot_run(trained: str) -> None:
    x = data.load("digits", "test").x[0]
    ours = networks.evaluate.forward(networks.load(trained), torch.tensor(np.array(x))[None].float())
    for shape in ((1, 8, 8), (64,)):
        theirs = certify.replay.outputs(trained, x.reshape(shape))
        np.testing.assert_allclose(theirs, ours.flatten().numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInput, match="onnxruntime cannot run"):
        certify.replay.outputs(networks.keep(b"no network"), x)


def test_what_an_attack_needs_grows_with_its_steps_and_starts_and_both_are_limited(trained: str) -> None:
    ask = {"network": trained, "index": 0, "radius": 0.1}
    usual = certify.needs(certify.Params(**ask))
    longer = certify.needs(certify.Params(**ask, steps=1000, restarts=100))
    assert usual == certify.NEEDS
    assert longer.seconds > 100 * usual.seconds
    for more in ({"steps": 10_001}, {"restarts": 1_001}):
        with pytest.raises(ValidationError):
            certify.Params(**ask, **more)


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
