"""What users write for a network becomes a reference; files are copied last, and only as they were checked."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netassay import job
from netassay.fields import ReferenceTo
from netassay.networks import onnx_file, recipes
from netassay.store.artifacts import Artifacts
from producer.references import ChangedFile, Resolver

ANALYSABLE = ReferenceTo("onnx", "recipe", analysable=True)
ANY = ReferenceTo("onnx", "recipe")
RECIPE = ReferenceTo("recipe")


def model(seed: int = 0, operator: str = "Relu", width: int = 5) -> onnx.ModelProto:
    """One dense layer and an activation: (batch, 3) -> (batch, width)."""
    weight = np.random.default_rng(seed).normal(size=(3, width)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="dense"),
            helper.make_node(operator, ["h"], ["y"], name="end"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets").mkdir()
    onnx.save(model(), tmp_path / "nets" / "f.onnx")
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "artifacts")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_path_a_name_and_a_finished_reference_mean_the_same_file(folder: Path, store: Artifacts) -> None:
    resolver = Resolver(folder, {"mine": "nets/f.onnx"}, store)
    reference = f"onnx:{sha256(folder / 'nets' / 'f.onnx')}"
    assert resolver("mine", ANALYSABLE) == reference
    assert resolver("nets/f.onnx", ANALYSABLE) == resolver(str(folder / "nets" / "f.onnx"), ANY) == reference
    assert resolver(reference, ANALYSABLE) == reference
    assert resolver.names == {reference: "mine"}


def test_nothing_is_stored_before_commit_and_the_very_bytes_after(folder: Path, store: Artifacts) -> None:
    resolver = Resolver(folder, {}, store)
    file, recipe = resolver("nets/f.onnx", ANALYSABLE), resolver({"dataset": "digits"}, ANALYSABLE)
    assert not store.folder.exists()
    resolver.commit()
    assert store.read(file) == (folder / "nets" / "f.onnx").read_bytes()
    assert store.read(recipe).decode() == job.canonical(recipes.Recipe.parse({"dataset": "digits"}))
    resolver.commit()
    assert len([path for path in store.folder.rglob("*") if path.is_file()]) == 2


def test_kept_at_once_for_a_single_run(folder: Path, store: Artifacts) -> None:
    reference = Resolver(folder, {}, store, at_once=True)("nets/f.onnx", ANALYSABLE)
    assert store.has(reference)


def test_a_finished_reference_needs_its_artifact(store: Artifacts, folder: Path) -> None:
    reference = f"onnx:{sha256(folder / 'nets' / 'f.onnx')}"
    with pytest.raises(ValueError, match=r"is not among the artifacts in .*; give the file or recipe itself"):
        Resolver(folder, {}, store)(reference, ANALYSABLE)
    store.put_file(folder / "nets" / "f.onnx")
    assert Resolver(folder, {}, store)(reference, ANALYSABLE) == reference


def test_recipes_are_named_by_their_digest_and_agree_with_the_networks_package(store: Artifacts, folder: Path) -> None:
    resolver = Resolver(folder, {"trained": {"recipe": {"training": {"kind": "ibp"}}}}, store)
    reference = resolver("trained", RECIPE)
    assert reference == resolver({"dataset": "digits", "training": {"kind": "ibp"}}, ANALYSABLE)
    resolver.commit()
    from netassay.store import artifacts

    with artifacts.using(store.folder):
        assert recipes.reference(recipes.from_reference(reference)) == reference
    assert resolver.names[reference] == "trained"


def test_unnamed_recipes_are_called_after_what_they_are(store: Artifacts, folder: Path) -> None:
    resolver = Resolver(folder, {}, store)
    first = resolver({"training": {"kind": "ibp"}, "seed": 4}, ANALYSABLE)
    second = resolver({"training": {"kind": "ibp"}, "seed": 4, "epochs": 3}, ANALYSABLE)
    assert resolver.names[first] == "mlp-ibp-seed4"
    assert resolver.names[second] == f"mlp-ibp-seed4-{second.partition(':')[2][:8]}"


def test_two_files_of_one_name_are_called_by_their_paths(store: Artifacts, folder: Path) -> None:
    (folder / "other").mkdir()
    onnx.save(model(seed=1), folder / "other" / "f.onnx")
    resolver = Resolver(folder, {}, store)
    names = [resolver.names[resolver(path, ANALYSABLE)] for path in ("nets/f.onnx", "other/f.onnx")]
    assert names == ["f.onnx", "other/f.onnx"]


def test_a_file_is_read_once_for_many_rows(store: Artifacts, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    from_file = onnx_file.from_file
    monkeypatch.setattr(onnx_file, "from_file", lambda path: read.append(path) or from_file(path))
    resolver = Resolver(folder, {}, store)
    for _ in range(5):
        resolver("nets/f.onnx", ANALYSABLE)
    assert len(read) == 1


def test_a_file_that_changes_meanwhile_is_told_and_not_stored(store: Artifacts, folder: Path) -> None:
    resolver = Resolver(folder, {}, store)
    resolver("nets/f.onnx", ANALYSABLE)
    onnx.save(model(seed=1), folder / "nets" / "f.onnx")
    with pytest.raises(ChangedFile, match=r"f\.onnx changed or went away"):
        resolver.commit()
    (folder / "nets" / "f.onnx").unlink()
    with pytest.raises(ChangedFile):
        resolver.commit()
    assert not store.folder.exists()


def test_external_tensors_are_folded_into_one_file(store: Artifacts, folder: Path) -> None:
    whole = model(width=400)
    onnx.save(
        model(width=400), folder / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0
    )
    resolver = Resolver(folder, {}, store)
    reference = resolver("split.onnx", ANALYSABLE)
    resolver.commit()
    kept = onnx.load_model_from_string(store.read(reference))
    found = numpy_helper.to_array(kept.graph.initializer[0])
    assert np.array_equal(found, numpy_helper.to_array(whole.graph.initializer[0]))
    (folder / "split.data").unlink()
    with pytest.raises(ValueError, match="external tensors"):
        Resolver(folder, {}, store)("split.onnx", ANALYSABLE)


def test_an_unsupported_operator_is_refused_only_where_the_network_is_analysed(store: Artifacts, folder: Path) -> None:
    onnx.save(model(operator="Tan"), folder / "odd.onnx")
    resolver = Resolver(folder, {}, store)
    assert resolver("odd.onnx", ANY).startswith("onnx:")
    with pytest.raises(ValueError, match=r"odd\.onnx: .*Tan"):
        resolver("odd.onnx", ANALYSABLE)


def test_bad_files_are_refused_in_plain_words(store: Artifacts, folder: Path) -> None:
    (folder / "cut.onnx").write_bytes((folder / "nets" / "f.onnx").read_bytes()[:-20])
    (folder / "model.pt").write_bytes(pickle.dumps({"weights": [1.0]}))
    (folder / "empty.onnx").write_bytes(b"")
    resolver = Resolver(folder, {"mine": "nets/f.onnx"}, store)
    cases = {
        "cut.onnx": "cut.onnx: .*(truncated|not valid|contradicts)",
        "model.pt": "model.pt: .*pickle can run code",
        "empty.onnx": "empty.onnx: .*not an ONNX file",
        "nets": "is a folder",
        "nets/g.onnx": "no such file",
        "mina": "nearest: mine",
    }
    for value, expected in cases.items():
        with pytest.raises(ValueError, match=expected):
            resolver(value, ANALYSABLE)
        with pytest.raises(ValueError, match=expected):
            resolver(value, ANALYSABLE)


@pytest.mark.parametrize(
    "value, wanted, expected",
    [
        ({"dataset": "nothing"}, ANALYSABLE, "there is no dataset 'nothing'"),
        ({"datset": "digits"}, ANALYSABLE, "datset"),
        ({"recipe": 3}, ANALYSABLE, "recipe is 3, must be a mapping"),
        ({"dataset": "digits"}, ReferenceTo("onnx"), "is a recipe, but this field takes onnx"),
        ("nets/f.onnx", RECIPE, "is a file, but this field takes recipe"),
        ("onnx:" + "0" * 64, RECIPE, "is a reference of kind onnx, but this field takes recipe"),
        (None, ANALYSABLE, "is None, must be a name"),
        (["nets/f.onnx"], ANALYSABLE, r"is \[nets/f.onnx\], must be a name"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(
    value: object, wanted: ReferenceTo, expected: str, store: Artifacts, folder: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        Resolver(folder, {}, store)(value, wanted)
