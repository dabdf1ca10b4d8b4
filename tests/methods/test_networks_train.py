"""networks.train and the training below it: schedules, bounds, projections, and what comes out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netassay import data, networks
from netassay.job import Record
from netassay.method import NumericalError
from netassay.methods.networks import train
from netassay.networks import evaluate, onnx_file, recipes, training
from netassay.networks.graph import Conv, Dense, Graph, Relu, Reshape
from netassay.store import artifacts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[artifacts.Artifacts]:
    with artifacts.using(tmp_path / "artifacts") as kept:
        yield kept


def result_of(**mapping: object) -> train.Result:
    return train.run(train.Params(recipe=recipes.reference(recipes.Recipe.parse(mapping))))


@pytest.fixture(scope="module")
def robust() -> training.Trained:
    """What the defaults of `ibp` give on digits."""
    return training.train(recipes.Recipe.parse({"dataset": "digits", "training": {"kind": "ibp"}}))


def weights_of(graph: Graph) -> dict:
    return {
        op: (torch.tensor(op.weight), torch.tensor(op.bias)) for op in graph.operations if isinstance(op, Dense | Conv)
    }


def certified(graph: Graph, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Which examples interval bounds certify in the whole box."""
    worst = training._margins(graph, weights_of(graph), x, y, radius)[1]
    return worst.scatter(1, y[:, None], -math.inf).max(1).values < 0


# -- The method --------------------------------------------------------------------------------------------------------


def test_the_result_is_what_the_kept_network_does_in_another_runtime() -> None:
    result = result_of(dataset="digits", epochs=5)
    session = onnxruntime.InferenceSession(networks.content(result.network), providers=["CPUExecutionProvider"])
    for split, claimed in (("train", result.accuracy_train), ("test", result.accuracy_test)):
        examples = data.load("digits", split)
        (logits,) = session.run(None, {"input": examples.x.astype(np.float32)})
        assert float((logits.argmax(1) == examples.y).mean()) == pytest.approx(claimed, abs=1.5 / len(examples))
    assert len(result.loss) == len(result.curve_train) == len(result.curve_test) == result.epochs == 5
    assert (result.accuracy_train, result.accuracy_test) == (result.curve_train[-1], result.curve_test[-1])
    assert result.parameters == (64 * 64 + 64) + (64 * 64 + 64) + (64 * 10 + 10)


def test_standard_training_learns_digits() -> None:
    assert result_of(dataset="digits").accuracy_test > 0.95


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others() -> None:
    first, again = (result_of(dataset="iris", epochs=3, training={"kind": "ibp"}) for _ in range(2))
    assert first == again
    assert result_of(dataset="iris", epochs=3, training={"kind": "ibp"}, seed=1).network != first.network


def test_global_random_state_is_neither_read_nor_written() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = result_of(dataset="iris", epochs=2)
    assert (torch.get_rng_state() == before).all()
    torch.manual_seed(2)
    assert result_of(dataset="iris", epochs=2) == first


def test_the_largest_seed_is_a_seed() -> None:
    assert result_of(dataset="iris", epochs=1, seed=2**63 - 1).epochs == 1


def test_training_that_diverges_says_so() -> None:
    with pytest.raises(NumericalError, match=r"diverged.*smaller learning_rate"):
        result_of(dataset="iris", epochs=3, learning_rate=1e30)


def test_predicted_cost_grows_with_epochs_width_and_kind() -> None:
    def seconds(**mapping: object) -> float:
        return train.needs(train.Params(recipe=recipes.reference(recipes.Recipe.parse(mapping)))).seconds

    base = seconds(epochs=10)
    assert seconds(epochs=20) > base
    assert seconds(epochs=10, architecture={"kind": "mlp", "hidden": [640, 640]}) > base
    assert seconds(epochs=10, training={"kind": "ibp"}) > base
    assert train.needs(train.Params(recipe=f"recipe:{'0' * 64}")).seconds > 0


@pytest.mark.parametrize(
    "architecture", [{"kind": "mlp", "hidden": [5, 7]}, {"kind": "cnn", "channels": [2, 3, 4], "hidden": 6}]
)
def test_predicted_size_is_that_of_the_network(architecture: dict) -> None:
    recipe = recipes.Recipe.parse({"architecture": architecture})
    graph = training.initial(recipe, torch.Generator().manual_seed(0))
    shapes, multiply_adds = train._size(recipe)
    linear = [op for op in graph.operations if isinstance(op, Dense | Conv)]
    assert shapes == [(len(op.weight), op.weight[0].size) for op in linear]
    # Each output of a layer is one sum over one row of its weight.
    assert multiply_adds == sum(math.prod(op.shape) * op.weight[0].size for op in linear)


def test_plot_draws_one_line_a_recipe() -> None:
    result = result_of(dataset="iris", epochs=4).model_dump()
    record = Record(1, "k", "networks.train", 1, {"recipe": f"recipe:{'a' * 64}"}, "done", result)
    failed = Record(2, "l", "networks.train", 1, {"recipe": f"recipe:{'b' * 64}"}, "failed")
    accuracy, loss = train.plot([record, failed]).panels
    assert [line.label for line in accuracy.marks] == ["recipe:aaaaaaaa"]
    assert accuracy.marks[0].y == result["curve_test"]
    assert loss.marks[0].x == [1, 2, 3, 4]


# -- The networks of a recipe ------------------------------------------------------------------------------------------


def test_initial_weights_have_the_variance_of_he() -> None:
    recipe = recipes.Recipe.parse({"architecture": {"kind": "mlp", "hidden": [400, 300]}})
    graph = training.initial(recipe, torch.Generator().manual_seed(0))
    for op in graph.operations:
        if isinstance(op, Dense):
            n = op.weight.size
            variance = 2 / op.weight.shape[1]
            # The sample variance of U(-a, a) has relative standard deviation sqrt(0.8 / n); five of them.
            assert op.weight.var() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / n))
            assert not op.bias.any()


def test_a_cnn_halves_the_image_from_its_second_convolution_on() -> None:
    recipe = recipes.Recipe.parse({"architecture": {"kind": "cnn", "channels": [3, 4, 5], "hidden": 6}})
    graph = training.initial(recipe, torch.Generator().manual_seed(0))
    shapes = [op.shape for op in graph.operations if not isinstance(op, Relu)]
    assert shapes == [(3, 8, 8), (4, 4, 4), (5, 2, 2), (20,), (6,), (10,)]
    assert [type(op) for op in graph.operations if not isinstance(op, Relu)] == [
        Conv,
        Conv,
        Conv,
        Reshape,
        Dense,
        Dense,
    ]
    assert evaluate.forward(graph, torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# -- Interval bound propagation ----------------------------------------------------------------------------------------


def test_radius_and_kappa_rise_and_fall_linearly_between_warm_up_and_end_of_ramp() -> None:
    ibp = recipes.Ibp(radius=0.08, warm_up=0.25, ramp=0.5, kappa=0.5)
    assert [training.schedule(ibp, p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [
        (0.0, 1.0), (0.0, 1.0), (0.04, 0.75), (0.08, 0.5), (0.08, 0.5),
    ]  # fmt: skip
    sudden = recipes.Ibp(radius=1.0, warm_up=0.5, ramp=0.0, kappa=0.25)
    assert [training.schedule(sudden, p) for p in (0.49, 0.5)] == [(0.0, 1.0), (1.0, 0.25)]


def test_worst_margins_are_exact_for_one_layer() -> None:
    """max of z_j - z_y over the box is its value at the centre plus radius x ||w_j - w_y||_1."""
    dense = Dense(
        "d", "x", "y", (3,), weight=np.array([[1.0, 2.0], [0.0, -1.0], [4.0, 0.5]]), bias=np.array([0.0, 1.0, 2.0])
    )
    graph = Graph((dense,), "x", "y", (2,), (3,))
    x, y = torch.tensor([[0.5, 0.25]], dtype=torch.float64), torch.tensor([1])
    nominal, worst = training._margins(graph, weights_of(graph), x, y, 0.1)
    # z = (1, 0.75, 4.125); |w_0 - w_1| = (1, 3), |w_2 - w_1| = (4, 1.5).
    torch.testing.assert_close(nominal, torch.tensor([[0.25, 0.0, 3.375]], dtype=torch.float64))
    torch.testing.assert_close(worst, torch.tensor([[0.25 + 0.4, 0.0, 3.375 + 0.55]], dtype=torch.float64))


@given(st.integers(0, 2**31), st.sampled_from(["mlp", "cnn"]), st.floats(0.001, 0.5))
@settings(max_examples=20, deadline=None)
def test_no_point_of_the_box_exceeds_the_worst_margins(seed: int, kind: str, radius: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    graph = training.initial(recipes.Recipe.parse({"architecture": {"kind": kind}}), generator)
    x = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 4, 9])
    nominal, worst = training._margins(graph, weights_of(graph), x, y, radius)
    logits = evaluate.forward(graph, x)
    torch.testing.assert_close(nominal, logits - logits.gather(1, y[:, None]))
    for _ in range(20):
        # Corners and inner points alike.
        move = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        move = move.sign() if seed % 2 else move
        z = evaluate.forward(graph, x + radius * move)
        assert (z - z.gather(1, y[:, None]) <= worst + 1e-9).all()


def test_default_ibp_training_certifies_digits(robust: training.Trained) -> None:
    x, y = (torch.tensor(part) for part in (data.load("digits", "test").x, data.load("digits", "test").y))
    proven = certified(robust.graph, x, y, 0.05)
    assert robust.curves.accuracy_test[-1] > 0.95
    assert float(proven.double().mean()) > 0.7
    correct = evaluate.forward(robust.graph, x).argmax(1) == y
    assert bool((correct | ~proven).all())


def test_standard_training_certifies_nothing_that_ibp_does() -> None:
    graph = training.train(recipes.Recipe.parse({"dataset": "digits", "epochs": 15})).graph
    x, y = (torch.tensor(part) for part in (data.load("digits", "test").x, data.load("digits", "test").y))
    assert float(certified(graph, x, y, 0.05).double().mean()) < 0.1


# -- Spectral norms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", [{"kind": "mlp", "hidden": [20]}, {"kind": "cnn", "channels": [3, 4], "hidden": 10}]
)
def test_spectral_training_keeps_every_layer_under_the_ceiling(architecture: dict) -> None:
    recipe = recipes.Recipe.parse(
        {"epochs": 2, "architecture": architecture, "training": {"kind": "spectral", "ceiling": 0.9}}
    )
    graph = onnx_file.read(onnx_file.write(training.train(recipe).graph, "n"))
    norms = [norm_by_jacobian(graph, op) for op in graph.operations if isinstance(op, Dense | Conv)]
    assert max(norms) <= 0.9
    # The ceiling binds: dense layers are projected onto it exactly.
    assert max(norms) > 0.9 * (1 - 1e-4)


def norm_by_jacobian(graph: Graph, op: Dense | Conv) -> float:
    """The largest singular value of the operation as a matrix, column by column."""
    shape = graph.shape_of(op.source)
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    columns = evaluate.linear(op, basis, torch.tensor(op.weight), None)
    return float(torch.linalg.matrix_norm(columns.reshape(len(basis), -1), ord=2))


@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(3, 7), st.integers(3, 7)
)
@settings(max_examples=25, deadline=None)
def test_the_bound_of_a_convolutions_norm_holds(seed: int, ins: int, outs: int, stride: int, h: int, w: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, 3, 3, generator=generator, dtype=torch.float64)
    shape = (outs, (h - 1) // stride + 1, (w - 1) // stride + 1)
    conv = Conv(
        "c", "x", "y", shape, weight=weight.numpy(), bias=np.zeros(outs), stride=(stride, stride), padding=(1, 1, 1, 1),
        dilation=(1, 1), groups=1,
    )  # fmt: skip
    norm = norm_by_jacobian(Graph((conv,), "x", "y", (ins, h, w), shape), conv)
    assert norm <= training.conv_norm_bound(weight, (h, w)) * (1 + 1e-9)


def test_the_bound_of_a_convolutions_norm_is_exact_for_one_by_one_kernels() -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert training.conv_norm_bound(weight[:, :, None, None], (4, 5)) == pytest.approx(5.0)


def test_projection_is_the_nearest_matrix_under_the_ceiling() -> None:
    """Singular values 3, 1, 0.5 become 2, 1, 0.5; directions stay."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))[0] for n in (5, 4))
    before = left @ torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)) @ right.T
    after = left @ torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)) @ right.T
    dense = Dense("d", "x", "y", (5,), weight=before.numpy(), bias=np.zeros(5))
    graph = Graph((dense,), "x", "y", (4,), (5,))
    weights = {dense: (before.clone(), torch.zeros(5, dtype=torch.float64))}
    training._project(recipes.Recipe.parse({"training": {"kind": "spectral", "ceiling": 2.0}}), graph, weights)
    torch.testing.assert_close(weights[dense][0], after, rtol=1e-5, atol=1e-5)
