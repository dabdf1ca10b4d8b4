"""Datasets: the table agrees with scikit-learn, splits partition, scaling is what the docstring says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets

from netassay import data
from netassay.method import InvalidInput


@pytest.mark.parametrize("name", data.names())
def test_the_table_agrees_with_scikit_learn(name: str) -> None:
    raw = getattr(sklearn.datasets, f"load_{name}")()
    loaded = data.load(name)
    assert data.size(name) == len(loaded) == len(raw.target)
    assert data.classes(name) == loaded.classes == len(raw.target_names)
    assert loaded.x.shape == (len(raw.target), *data.shape(name))
    assert (loaded.y == raw.target).all()
    assert loaded.x.dtype == np.float64
    assert loaded.y.dtype == np.int64


@pytest.mark.parametrize("name", data.names())
def test_train_and_test_partition_the_set_by_every_third(name: str) -> None:
    whole, train, test = (data.load(name, split) for split in ("all", "train", "test"))
    assert [data.size(name, split) for split in ("all", "train", "test")] == [len(whole), len(train), len(test)]
    assert (test.x == whole.x[2::3]).all()
    assert (test.y == whole.y[2::3]).all()
    assert (train.x[0::2] == whole.x[0::3]).all()
    assert (train.x[1::2] == whole.x[1::3]).all()
    assert len(train) + len(test) == len(whole)


@pytest.mark.parametrize("name", data.names())
def test_values_lie_in_0_to_1_and_reach_both_ends(name: str) -> None:
    x = data.load(name).x
    assert x.min() == 0.0
    assert x.max() == 1.0


@pytest.mark.parametrize("name", data.names())
def test_values_are_float32_numbers(name: str) -> None:
    x = data.load(name).x
    assert (x == x.astype(np.float32).astype(np.float64)).all()
    raw = getattr(sklearn.datasets, f"load_{name}")().data
    low, high = (0, 16) if name == "digits" else (raw.min(axis=0), raw.max(axis=0))
    assert (np.abs(x.reshape(raw.shape) - (raw - low) / (high - low)) <= 2.0**-25).all()  # half a unit below 1


def test_digits_are_sixteenths_and_others_min_max_by_feature() -> None:
    digits, iris = data.load("digits").x, data.load("iris").x
    assert (digits * 16 == np.round(digits * 16)).all()
    assert (digits[0, 0] * 16 == sklearn.datasets.load_digits().images[0]).all()
    assert (iris.min(axis=0) == 0).all()
    assert (iris.max(axis=0) == 1).all()


def test_a_loaded_split_is_shared_and_cannot_be_written() -> None:
    loaded = data.load("iris", "train")
    assert data.load("iris", "train") is loaded
    with pytest.raises(ValueError, match="read-only"):
        loaded.x[0] = 1.0


def test_an_unknown_dataset_is_told_the_names_that_exist() -> None:
    with pytest.raises(InvalidInput, match="breast_cancer, digits, iris, wine"):
        data.load("mnist")
    with pytest.raises(InvalidInput, match="all, train, test"):
        data.size("iris", "validation")


def test_an_index_counts_within_its_split() -> None:
    assert data.check_index("iris", "test", 49) == 49
    with pytest.raises(ValueError, match=r"50 examples: 0\.\.49"):
        data.check_index("iris", "test", 50)
    with pytest.raises(ValueError, match="outside"):
        data.check_index("iris", "all", -1)
    with pytest.raises(ValueError, match="there is no dataset"):
        data.check_index("mnist", "all", 0)


def test_sizes_and_indices_need_no_numeric_library() -> None:
    script = (
        "import sys\n"
        "for name in ('numpy', 'torch', 'sklearn', 'sklearn.datasets'): sys.modules[name] = None\n"
        "from netassay import data\n"
        "print(data.size('digits', 'test'), data.classes('wine'), data.shape('digits'))\n"
        "data.check_index('wine', 'all', 3)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["599", "3", "(1,", "8,", "8)"]
