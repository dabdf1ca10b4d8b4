"""Datasets that users draw or bring: the formulas hold, one content is one digest, bad files get plain words."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from labs import embedded

from netassay import data, job, networks
from netassay.data import files, generators
from netassay.fields import DATASET, ReferenceTo
from netassay.job import Record
from netassay.method import InvalidInput
from netassay.methods.networks import train
from netassay.methods.verification import certify
from netassay.networks import recipes
from netassay.store.artifacts import Artifacts, MissingArtifact
from producer import sweeps
from producer.references import ChangedFile, Resolver

DRAWN: list[dict[str, Any]] = [
    {"generator": "blobs", "classes": 4, "dimension": 3},
    {"generator": "checkerboard", "cells": 3},
    {"generator": "circles"},
    {"generator": "gaussian_mixture", "dimension": 5},
    {"generator": "random_labels", "classes": 3, "dimension": 7},
    {"generator": "spirals", "classes": 3},
    {"generator": "two_moons"},
]
every_generator = pytest.mark.parametrize("mapping", DRAWN, ids=[one["generator"] for one in DRAWN])


def drawn(**mapping: Any) -> tuple[np.ndarray, np.ndarray]:
    return generators.draw(generators.parse(mapping))


# --- generators -------------------------------------------------------------------------------------------------------


def test_each_kind_is_asked_the_questions_below() -> None:
    assert [one["generator"] for one in DRAWN] == list(generators.KINDS)


@every_generator
def test_the_same_seed_draws_the_same_examples_and_another_seed_others(mapping: dict[str, Any]) -> None:
    x, y = drawn(**mapping, seed=3)
    again, _ = drawn(**mapping, seed=3)
    other, same_classes = drawn(**mapping, seed=4)
    assert (x == again).all()
    assert (x != other).mean() > 0.9
    assert (y == same_classes).all()


@every_generator
def test_facts_are_those_of_what_is_drawn(mapping: dict[str, Any]) -> None:
    generator = generators.parse({**mapping, "samples": 60})
    facts, (x, y) = generator.facts(), generators.draw(generator)
    assert (len(x), x.shape[1:], len(np.unique(y))) == (facts.size, facts.shape, facts.classes)
    assert x.dtype == np.float64
    assert (x == x.astype(np.float32)).all()
    assert y.dtype == np.int64


@every_generator
def test_both_splits_hold_all_classes_equally_often(mapping: dict[str, Any], artifacts: Artifacts) -> None:
    reference = kept({**mapping, "samples": 301}, artifacts)
    for split in ("train", "test"):
        counts = np.bincount(data.load(reference, split).y, minlength=data.classes(reference))
        assert counts.max() - counts.min() <= 2, split


def test_the_first_numbers_of_a_seed_stay() -> None:
    """Should NumPy draw otherwise one day, raise `version` of the generators and write down the new numbers."""
    firsts = {one["generator"]: np.round(drawn(**one)[0][0, :2], 5).tolist() for one in DRAWN}
    assert firsts == {
        "blobs": [0.4142, -4.82306],
        "checkerboard": [-0.94578, 0.91682],
        "circles": [-0.58424, -0.75809],
        "gaussian_mixture": [-0.32148, -0.57932],
        "random_labels": [0.12573, -0.1321],
        "spirals": [-0.3882, -0.4829],
        "two_moons": [-0.28158, 0.90907],
    }


def test_moons_without_noise_are_two_half_circles() -> None:
    x, y = drawn(generator="two_moons", noise=0, samples=300)
    upper, lower = x[y == 0], x[y == 1]
    assert np.hypot(*upper.T) == pytest.approx(1.0, abs=1e-6)
    assert np.hypot(lower[:, 0] - 1.0, lower[:, 1] - 0.5) == pytest.approx(1.0, abs=1e-6)
    assert (upper[:, 1] >= 0).all()
    assert (lower[:, 1] <= 0.5).all()


def test_circles_without_noise_have_their_radii() -> None:
    x, y = drawn(generator="circles", noise=0, factor=0.25)
    assert np.hypot(*x[y == 0].T) == pytest.approx(1.0, abs=1e-6)
    assert np.hypot(*x[y == 1].T) == pytest.approx(0.25, abs=1e-6)


def test_noise_has_the_standard_deviation_asked_for() -> None:
    clean, _ = drawn(generator="circles", noise=0, samples=30_000)
    noisy, _ = drawn(generator="circles", noise=0.2, samples=30_000)
    # The sample standard deviation of n normals has relative standard deviation 1 / sqrt(2 n); five of them.
    assert (noisy - clean).std() == pytest.approx(0.2, rel=5 / math.sqrt(2 * 60_000))


def test_a_spirals_arms_turn_as_often_as_asked_and_start_evenly_spaced() -> None:
    x, y = drawn(generator="spirals", classes=3, turns=1.5, noise=0)
    t, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    expected = 2 * math.pi * (1.5 * t + y / 3)
    assert np.cos(angle - expected) == pytest.approx(1.0, abs=1e-5)
    assert 0.99 < t.max() <= 1.0


def test_blobs_lie_around_their_centres() -> None:
    about = {"generator": "blobs", "classes": 3, "dimension": 4, "samples": 9000, "extent": 5.0}
    centres, y = drawn(**about, spread=0)
    x, _ = drawn(**about, spread=2)
    assert len(np.unique(centres, axis=0)) == 3
    assert (np.abs(centres) <= 5).all()
    for one in range(3):
        centre = centres[y == one][0]
        assert x[y == one].mean(axis=0) == pytest.approx(centre, abs=5 * 2 / math.sqrt(3000))
        assert (x[y == one] - centre).std() == pytest.approx(2.0, rel=5 / math.sqrt(2 * 12_000))


def test_the_best_classifier_of_a_mixture_is_right_as_often_as_the_docstring_says() -> None:
    n, separation = 30_000, 1.5
    x, y = drawn(generator="gaussian_mixture", dimension=9, separation=separation, samples=n)
    right = ((x.sum(axis=1) > 0) == (y == 1)).mean()
    phi = 0.5 * (1 + math.erf(separation / 2 / math.sqrt(2)))
    assert right == pytest.approx(phi, abs=5 * math.sqrt(phi * (1 - phi) / n))


@pytest.mark.parametrize("cells", [2, 3, 8])
def test_a_checkerboards_colours_alternate_and_fill_every_square(cells: int) -> None:
    x, y = drawn(generator="checkerboard", cells=cells, samples=6000)
    assert (np.abs(x) <= 1).all()
    square = np.minimum(((x + 1) / 2 * cells).astype(int), cells - 1)
    assert (square.sum(axis=1) % 2 == y).mean() > 0.999  # a float32 on an edge may belong to either side
    assert len(np.unique(square, axis=0)) == cells**2


def test_two_cells_a_side_are_xor() -> None:
    x, y = drawn(generator="checkerboard", cells=2)
    assert (((x[:, 0] > 0) != (x[:, 1] > 0)) == (y == 1)).all()


def test_random_labels_say_nothing_about_the_inputs() -> None:
    x, y = drawn(generator="random_labels", classes=2, dimension=3, samples=20_000)
    assert x.mean() == pytest.approx(0.0, abs=5 / math.sqrt(60_000))
    assert x.std() == pytest.approx(1.0, rel=5 / math.sqrt(120_000))
    between = x[y == 1].mean(axis=0) - x[y == 0].mean(axis=0)
    assert between == pytest.approx(0.0, abs=5 * math.sqrt(4 / 20_000))
    on_sphere, _ = drawn(generator="random_labels", dimension=6, inputs="sphere")
    assert np.linalg.norm(on_sphere, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_scales_are_what_they_are_called() -> None:
    x, _ = drawn(generator="two_moons", scale="none")
    minmax, _ = drawn(generator="two_moons", scale="minmax")
    unit, _ = drawn(generator="two_moons", scale="unit")
    assert (minmax.min(axis=0) == 0).all()
    assert (minmax.max(axis=0) == 1).all()
    assert np.abs(unit).max() == 1
    assert unit == pytest.approx(x / np.abs(x).max(), abs=1e-6)


@pytest.mark.parametrize(
    "mapping, expected",
    [
        ({"generator": "two_moon"}, "there is no generator 'two_moon'; try one of blobs, checkerboard"),
        ({"generator": 3}, "there is no generator 3"),
        ({"generator": "two_moons", "factor": 2}, "two_moons.factor: is not known; two_moons takes noise, samples"),
        ({"generator": "two_moons", "noise": -1}, "two_moons.noise: .*greater than or equal to 0"),
        ({"generator": "two_moons", "noise": math.nan}, "two_moons.noise"),
        ({"generator": "two_moons", "samples": 0}, "two_moons.samples"),
        ({"generator": "two_moons", "version": 2}, "two_moons.version"),
        ({"generator": "circles", "factor": 1}, "circles.factor: .*less than 1"),
        ({"generator": "blobs", "classes": 200}, "500 samples are too few for 200 classes: at least 600"),
        ({"generator": "blobs", "samples": 10**7, "dimension": 100}, "more than 268,435,456 numbers"),
        ({"generator": "checkerboard", "cells": 1}, "checkerboard.cells"),
    ],
)
def test_a_wrong_generator_is_told_its_field(mapping: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        generators.parse(mapping)


def test_a_default_written_out_is_the_same_generator() -> None:
    short = generators.parse({"generator": "two_moons"})
    long = generators.parse({"generator": "two_moons", "noise": 0.1, "samples": 500, "seed": 0, "scale": "none"})
    assert generators.text(short) == generators.text(long)
    assert json.loads(generators.text(short)) == {
        "generator": "two_moons", "noise": 0.1, "samples": 500, "scale": "none", "seed": 0, "version": 1,
    }  # fmt: skip


# --- files: one content, one digest -----------------------------------------------------------------------------------

WIDTHS, HEIGHTS, SPECIES = [0.1, 2.5, 1e-3, 4.0], [-1.0, 0.0, 3.25, 1 / 3], ["setosa", "virginica", "setosa", "iris"]


def written(folder: Path) -> dict[str, Path]:
    """The same four examples in each format."""
    frame = pl.DataFrame({"width": WIDTHS, "height": HEIGHTS, "species": SPECIES})
    frame.write_csv(folder / "my.csv")
    frame.write_parquet(folder / "my.parquet")
    x, y = np.stack([WIDTHS, HEIGHTS], axis=1), np.array(SPECIES)
    np.savez(folder / "my.npz", x=x, y=y, feature_names=np.array(["width", "height"]))
    np.savez_compressed(folder / "small.npz", data=x, target=y, feature_names=np.array(["width", "height"]))
    return {name: folder / name for name in ("my.csv", "my.parquet", "my.npz", "small.npz")}


def read(path: Path, **options: Any) -> files.Table:
    return files.read(path, files.parse({"file": str(path), **options}))


def digest(path: Path, **options: Any) -> str:
    return hashlib.sha256(files.content(read(path, **options))).hexdigest()


def test_the_same_content_is_the_same_digest_in_every_format(tmp_path: Path) -> None:
    digests = {name: digest(path) for name, path in written(tmp_path).items()}
    assert len(set(digests.values())) == 1, digests
    # Committed: it changes only if the artifact's format does, and with it every key of a job on a user's file.
    assert digests["my.csv"] == "89325ec67fe29e1cebcac8105d8c37df334d0616394a9eff201aed64e95cfa0d"


def test_an_artifact_read_as_a_file_is_itself(tmp_path: Path) -> None:
    content = files.content(read(written(tmp_path)["my.csv"]))
    (tmp_path / "again.npz").write_bytes(content)
    assert files.content(read(tmp_path / "again.npz")) == content


def test_the_artifact_holds_values_classes_and_names(tmp_path: Path) -> None:
    content = files.content(read(written(tmp_path)["my.csv"]))
    loaded = files.load(content)
    assert (loaded.x == np.stack([WIDTHS, HEIGHTS], axis=1).astype(np.float32).astype(np.float64)).all()
    assert loaded.classes == ("iris", "setosa", "virginica")
    assert loaded.y.tolist() == [1, 2, 1, 0]
    assert loaded.features == ("width", "height")
    assert files.facts(content) == data.Facts(4, (2,), 3)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["classes", "features", "x", "y"]


def test_options_change_the_content_only_where_they_change_numbers_or_names(tmp_path: Path) -> None:
    path = written(tmp_path)["my.csv"]
    plain = digest(path)
    assert digest(path, label="species", separator=",", shape=[2]) == plain
    assert len({plain, digest(path, scale="minmax"), digest(path, scale="unit"), digest(path, shape=[1, 2])}) == 4


def test_spaces_blank_lines_line_ends_and_a_byte_order_mark_are_no_content(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text("a,b,c\n1,2,x\n3,4,y\n5,6,x\n")
    (tmp_path / "other.csv").write_bytes("\ufeffa, b,c\r\n1, 2.0 ,x\r\n\r\n3e0,4,y \r\n5,6,x\r\n\r\n".encode())
    assert digest(tmp_path / "plain.csv") == digest(tmp_path / "other.csv")


def test_values_are_scaled_first_and_rounded_once(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=200) * 1e3
    np.savez(tmp_path / "v.npz", x=values[:, None], y=np.arange(200) % 2)
    x = read(tmp_path / "v.npz", scale="minmax").x[:, 0]
    exact = (values - values.min()) / (values.max() - values.min())
    assert (x == x.astype(np.float32)).all()
    assert (np.abs(x - exact) <= 2.0**-25 + 1e-16).all()  # half a unit of float32 below 1
    assert (read(tmp_path / "v.npz").x[:, 0] == values.astype(np.float32)).all()


def test_a_feature_that_never_changes_becomes_0_under_minmax(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.array([[7.0, 1.0], [7.0, 3.0], [7.0, 2.0]]), y=np.array([0, 1, 1]))
    assert read(tmp_path / "v.npz", scale="minmax").x.tolist() == [[0.0, 0.0], [0.0, 1.0], [0.0, 0.5]]


def test_zero_has_no_sign(tmp_path: Path) -> None:
    for name, zero in (("plus", 0.0), ("minus", -0.0)):
        np.savez(tmp_path / f"{name}.npz", x=np.array([[zero], [1.0], [2.0]]), y=np.array([0, 1, 1]))
    assert digest(tmp_path / "plus.npz") == digest(tmp_path / "minus.npz")


def test_whole_numbers_stay_the_classes_they_are(tmp_path: Path) -> None:
    """Output j of a network means class j: 0 and 2 of three classes must not become 0 and 1."""
    x = np.arange(4.0)[:, None]
    np.savez(tmp_path / "v.npz", x=x, y=np.array([0, 2, 2, 0], dtype=np.uint8))
    with pytest.raises(files.DatasetFileError, match=r"up to 2, but none is 1.*`classes: 3`"):
        read(tmp_path / "v.npz")
    table = read(tmp_path / "v.npz", classes=3)
    assert table.y.tolist() == [0, 2, 2, 0]
    assert table.classes == ("0", "1", "2")
    np.savez(tmp_path / "named.npz", x=x, y=np.array([0, 2, 2, 0]), class_names=np.array(["a", "b", "c"]))
    assert read(tmp_path / "named.npz").classes == ("a", "b", "c")


def test_twelve_classes_stay_in_the_order_of_numbers_in_every_format(tmp_path: Path) -> None:
    """In the order of text 10 and 11 would come before 2."""
    x, y = np.arange(24.0), [number % 12 for number in range(24)]
    pl.DataFrame({"x": x, "y": y}).write_csv(tmp_path / "t.csv")
    pl.DataFrame({"x": x, "y": y}).write_parquet(tmp_path / "t.parquet")
    pl.DataFrame({"x": x, "y": list(map(str, y))}).write_parquet(tmp_path / "text.parquet")
    named = {"x": x[:, None], "feature_names": np.array(["x"])}
    np.savez(tmp_path / "t.npz", y=np.array(y), **named)
    np.savez(tmp_path / "text.npz", y=np.array(list(map(str, y))), **named)
    names = ("t.csv", "t.parquet", "text.parquet", "t.npz", "text.npz")
    assert {tuple(read(tmp_path / name).y.tolist()) for name in names} == {tuple(y)}
    assert len({digest(tmp_path / name) for name in names}) == 1


def test_a_class_that_is_not_finite_is_told_its_row(tmp_path: Path) -> None:
    for labels in ([0.0, math.inf, 1.0], [math.inf, math.inf, math.inf]):
        pl.DataFrame({"x": [1.0, 2.0, 3.0], "y": labels}).write_parquet(tmp_path / "t.parquet")
        with pytest.raises(files.DatasetFileError, match=r"row [12], column 'y': inf is not a class"):
            read(tmp_path / "t.parquet")


def test_images_keep_or_get_their_shape(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, size=(6, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(6) % 2)
    assert read(tmp_path / "images.npz").x.shape == (6, 4, 4)
    table = read(tmp_path / "images.npz", shape=[1, 4, 4], scale="unit")
    assert table.x.shape == (6, 1, 4, 4)
    assert (table.x[:, 0] == (images / images.max()).astype(np.float32)).all()


def test_columns_can_be_chosen_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("number;kind;a;b\n1;x;0.5;7\n2;y;1.5;8\n3;x;2.5;9\n")
    table = read(tmp_path / "t.csv", separator=";", label="kind", without=["number"])
    assert table.features == ("a", "b")
    assert table.x.tolist() == [[0.5, 7.0], [1.5, 8.0], [2.5, 9.0]]
    (tmp_path / "bare.csv").write_text("0.5,7,0\n1.5,8,1\n2.5,9,0\n")
    bare = read(tmp_path / "bare.csv", header=False)
    assert bare.features == ()
    assert (bare.x == table.x).all()


# --- files: what is refused -------------------------------------------------------------------------------------------

BAD_TABLES = {
    "": "the file is empty",
    "\n\n": "no rows",
    "a,b,c\n": "the table has no rows",
    "a,b,c\n1,2,x\n3,,y\n5,6,x\n": "row 2, column 'b': a value is missing",
    "a,b,c\n1,2,x\n3,4\n5,6,x\n": "row 2, column 'c': a value is missing",
    "a,b,c\n1,2,x\n,,\n5,6,x\n": "line 3 has empty cells only",
    "a,b,c\n1,2,x\n3,4,y,9\n5,6,x\n": "line 3 has 4 cells, the first line 3",
    "a,b,c\n1,2,x\n3,foo,y\n5,bar,x\n": r"row 2, column 'b': 'foo' is not a number \(and 1 more.*`without: \[b\]`",
    "a,b,c\n1,2,x\n3,nan,y\n5,6,x\n": "row 2, column 'b': 'nan' is not finite",
    "a,b,c\n1,2,x\n3,4,y\n-inf,6,x\n": "row 3, column 'a': '-inf' is not finite",
    "a,b,c\n1,2,x\n3,1e40,y\n5,6,x\n": r"1e\+40 of example 2 is too large for float32.*scale: minmax",
    "a,b,c\n1,2,x\n3,4,\n5,6,x\n": "row 2, column 'c': a value is missing",
    "a,b,c\n1,2,x\n3,4,x\n5,6,x\n": "all 3 examples are of one class \\('x'\\)",
    "a,b,c\n1,2,0\n3,4,1\n": "there are 2 examples",
    "a,b,c\n1,2,0\n3,4,1.5\n5,6,1\n": "row 2, column 'c': '1.5' is not a class",
    "a,b,c\n1,2,0\n3,4,NA\n5,6,1\n": "row 2, column 'c': 'NA' is not a class where most are numbers",
    "a,b,c\n1,2,0\n3,4,nan\n5,6,1\n": "row 2, column 'c': 'nan' is not a class where most are numbers",
    "a,b,c\n1,2,0\n3,4,inf\n5,6,1\n": "row 2, column 'c': 'inf' is not a class where most are numbers",
    "a,b,c\n1,2,x\n3,4,y\n5,6,1\n": "row 3, column 'c': '1' is not a class where most are text",
    "a,b,c\n1,2,0\n3,4,-1\n5,6,1\n": r"column 'c' holds -1 \(row 2\)",
    "a,b,c\n1,2,0\n3,4,70000\n5,6,1\n": r"column 'c' holds 70000 \(row 2\)",
    "a,b,c\n1,2,1\n3,4,2\n5,6,1\n": "numbers up to 2, but none is 0",
    "a;b;c\n1;2;x\n3;4;y\n5;6;x\n": "has 1 column to read.*separator",
    "1,2,0\n3,4,1\n5,6,0\n": "first line holds numbers.*`header: false`",
    "a,a,c\n1,2,0\n3,4,1\n5,6,0\n": "two columns are called 'a'",
    '"a,b,c\n1,2,x\n3,4,y\n5,6,x\n': "has 1 column to read.*quotes left open",
    '"a\nb",c\n1,x\n2,y\n3,x\n': "the first line has 1 cells?, the table 2 columns",
    'a,b,c\n1,"2,x\n3,4,y\n5,6,x\n': "no table.*quotes",
    "a,b,c\n1,2," + "x" * 300 + "\n3,4,y\n5,6,x\n": "a text of 300 characters: that is no column of classes",
    "a,b,c\n1,2,x\0\n3,4,x\n5,6,x\n": "NUL",
}


@pytest.mark.parametrize("text, expected", BAD_TABLES.items(), ids=[repr(text)[:40] for text in BAD_TABLES])
def test_a_bad_table_is_told_its_row_and_column(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(files.DatasetFileError, match=expected):
        read(tmp_path / "bad.csv")


def test_text_that_is_not_utf_8_is_told_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(b"a,b,c\n1,2,x\n3,4,\xe9\n5,6,x\n")
    with pytest.raises(files.DatasetFileError, match="line 3 is not text in UTF-8"):
        read(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_bytes(b"a,\xe9,c\n1,2,x\n3,4,y\n5,6,x\n")
    with pytest.raises(files.DatasetFileError, match="first line is not text in UTF-8"):
        read(tmp_path / "bad.csv")


def test_columns_of_parquet_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2, 3], "day": ["x", "y", "z"], "y": [0, 1, 0]})
    frame.with_columns(pl.lit("2026-01-01").str.to_date().alias("day")).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(files.DatasetFileError, match=r"column 'day' holds Date, not numbers.*`without: \[day\]`"):
        read(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", without=["day"]).features == ("a",)
    pl.DataFrame({"a": [1, None, 3], "y": [0, 1, 0]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(files.DatasetFileError, match="row 2, column 'a': a value is missing"):
        read(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(files.DatasetFileError, match="no Parquet file"):
        read(tmp_path / "t.parquet")


X, Y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no y": ({"x": X, "z": Y}, "no array called y or labels or target: it has 'x', 'z'"),
    "no x": ({"y": Y}, "no array called x or X or data"),
    "pickled y": ({"x": X, "y": Y.astype(object)}, "y holds pickled Python objects: unpickling can run code"),
    "pickled x": ({"x": X.astype(object), "y": Y}, "x holds pickled Python objects"),
    "lengths": ({"x": X, "y": Y[:3]}, "x has 4 examples, but y has 3"),
    "flat x": ({"x": X[:, 0], "y": Y}, r"x has the shape \(4,\).*x\[:, None\]"),
    "one-hot y": ({"x": X, "y": np.eye(2)[Y]}, r"y has the shape \(4, 2\).*y.argmax\(1\)"),
    "NaN": ({"x": np.where(X == 3, np.nan, X), "y": Y}, r"x\[1, 1\] is nan, not a finite number"),
    "complex": ({"x": X * 1j, "y": Y}, "x holds complex128, not numbers"),
    "no rows": ({"x": X[:0], "y": Y[:0]}, r"x has the shape \(0, 2\): it holds nothing"),
    "text beside numbers": ({"x": X, "y": np.array(["0", "1", "NA", "1"])}, r"holds 'NA' \(row 3\).*most are numbers"),
    "numbers beside text": ({"x": X, "y": np.array(["a", "1", "b", "a"])}, r"holds '1' \(row 2\).*most are text"),
    "fractions": ({"x": X, "y": Y + 0.5}, r"holds 0.5 \(row 1\), which is not a class"),
    "too few names": ({"x": X, "y": Y, "class_names": np.array(["a"])}, r"holds 1 \(row 2\), but there are 1 classes"),
    "feature names": ({"x": X, "y": Y, "feature_names": np.array(["a"])}, "names the 2 features"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_told_what_was_looked_for(name: str, tmp_path: Path) -> None:
    arrays, expected = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(files.DatasetFileError, match=expected):
        read(tmp_path / "bad.npz")


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path(tmp_path / "ran").touch, ())

    bombs = np.empty(3, dtype=object)
    bombs[:] = [Bomb()] * 3
    np.savez(tmp_path / "bomb.npz", x=X, y=bombs)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    for name, expected in (("bomb.npz", "never read"), ("pickle.npz", "is no .npz")):
        with pytest.raises(files.DatasetFileError, match=expected):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_header_that_promises_more_than_there_is_makes_no_room_for_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=X, y=Y)
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "huge.npz", "w") as huge:
        huge.writestr("x.npy", good.read("x.npy").replace(b"(4, 2), }         ", b"(9999999999, 2), }"))
        huge.writestr("y.npy", good.read("y.npy"))
    with pytest.raises(files.DatasetFileError, match="9,999,999,999 examples of 2 values are too many"):
        read(tmp_path / "huge.npz")


def test_damaged_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=X, y=Y)
    content = bytearray((tmp_path / "good.npz").read_bytes())
    content[content.index(b"\x93NUMPY") + 140] ^= 255
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "notes.txt").write_text("hello")
    for name, expected in (("flipped.npz", "is damaged"), ("half.npz", "is no .npz"), ("notes.txt", "from .txt")):
        with pytest.raises(files.DatasetFileError, match=expected):
            read(tmp_path / name)


def test_a_file_beyond_the_bound_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "large.csv", "wb") as file:
        file.truncate(files.LARGEST_FILE + 1)  # sparse: takes no room on disk
    with pytest.raises(files.DatasetFileError, match=r"2.0 GiB: .*at most 2 GiB"):
        read(tmp_path / "large.csv")


@pytest.mark.parametrize("name", ["my.csv", "my.parquet", "my.npz", "small.npz"])
def test_a_changed_byte_is_read_or_refused_but_never_crashes(name: str, tmp_path: Path) -> None:
    good = written(tmp_path)[name].read_bytes()
    draw = random.Random(name)
    ends = {"read": 0, "refused": 0}
    for _ in range(250):
        content = bytearray(good)
        for place in draw.choices(range(len(good)), k=draw.choice([1, 1, 3])):
            if draw.random() < 0.7:
                content[place] = draw.randrange(256)
            else:
                del content[place : place + draw.randrange(1, 9)]
        (tmp_path / name).write_bytes(content)
        try:
            files.load(files.content(read(tmp_path / name)))
            ends["read"] += 1
        except files.DatasetFileError:
            ends["refused"] += 1
    assert min(ends.values()) > 0, ends


@pytest.mark.parametrize(
    "mapping, expected",
    [
        ({"file": "a.csv", "lable": "x"}, "lable: is not known; a dataset's file takes file, label"),
        ({"file": "a.csv", "scale": "max"}, "scale: .*'none', 'minmax' or 'unit'"),
        ({"file": "a.csv", "shape": [0, 2]}, "shape.0"),
        ({"file": "a.csv", "separator": ",,"}, "separator"),
        ({"file": 3}, "file: "),
    ],
)
def test_wrong_options_are_told_their_name(mapping: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        files.parse(mapping)


# --- by reference -----------------------------------------------------------------------------------------------------


def kept(value: Any, artifacts: Artifacts, base: Path = Path()) -> str:
    """The reference of a dataset, its artifact kept."""
    return Resolver(base, store=artifacts, at_once=True)(value, DATASET)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets this process forget all datasets, as a fresh one that only has the artifacts."""

    def forget() -> None:
        monkeypatch.setattr(data, "_registered", {})
        monkeypatch.setattr(data, "_called", {})
        data._load_artifact.cache_clear()

    forget()
    return forget


def test_a_process_that_has_only_the_artifact_knows_as_much(
    artifacts: Artifacts, tmp_path: Path, forgetful: Callable[[], None]
) -> None:
    for value in (str(written(tmp_path)["my.npz"]), {"generator": "spirals", "classes": 3, "samples": 90}):
        reference = kept(value, artifacts)
        facts = data.facts(reference)
        whole = data.load(reference)
        forgetful()
        assert not data.is_known(reference)
        assert data.facts(reference) == facts
        assert data.is_known(reference)
        forgetful()
        assert (data.load(reference).x == whole.x).all()
        assert data.size(reference, "test") == len(data.load(reference, "test")) == len(whole.x[2::3])
        assert (data.load(reference, "test").y == whole.y[2::3]).all()


def test_an_artifact_that_is_not_here_is_missing_and_not_invalid(artifacts: Artifacts) -> None:
    for kind in ("data", "generator"):
        with pytest.raises(MissingArtifact):
            data.load(f"{kind}:{'0' * 64}")


def test_an_artifact_of_another_kind_is_refused(artifacts: Artifacts) -> None:
    digest = artifacts.put(b"no dataset at all")
    for kind, expected in (("data", "is no dataset"), ("generator", "cannot be read")):
        with pytest.raises(InvalidInput, match=expected):
            data.load(f"{kind}:{digest}")


def test_indices_are_told_by_the_users_name(artifacts: Artifacts, tmp_path: Path, forgetful: Callable) -> None:
    reference = kept(str(written(tmp_path)["my.csv"]), artifacts)
    assert data.check_index(reference, "train", 2) == 2
    with pytest.raises(ValueError, match=r"index 3 is outside my\.csv \(train\), which has 3 examples: 0\.\.2"):
        data.check_index(reference, "train", 3)
    forgetful()
    with pytest.raises(ValueError, match=rf"outside {reference[:13]} \(test\), which has 1 examples"):
        data.check_index(reference, "test", 1)


def test_facts_of_references_need_no_numeric_library(artifacts: Artifacts, tmp_path: Path) -> None:
    references = [kept(str(written(tmp_path)["my.csv"]), artifacts), kept({"generator": "two_moons"}, artifacts)]
    script = (
        "import sys\n"
        "for name in ('numpy', 'polars', 'torch', 'sklearn.datasets'): sys.modules[name] = None\n"
        "from netassay import data\n"
        "from netassay.store import artifacts\n"
        f"with artifacts.using({str(artifacts.folder)!r}):\n"
        f"    print([(data.size(one), data.shape(one), data.classes(one)) for one in {references!r}])\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[(4, (2,), 3), (500, (2,), 2)]"


def prepared(text: str, folder: Path, **more: Any) -> tuple[sweeps.Prepared, Resolver]:
    document = sweeps.parse(text, base=folder)
    resolver = Resolver(folder, document.networks, Artifacts(folder / "artifacts"), datasets=document.datasets)
    return sweeps.prepare(document, resolver, **more), resolver


MOONS = """
datasets:
  moons: {generator: two_moons, samples: 60, scale: minmax}
  flowers: {file: my.csv, scale: minmax}
networks:
  on_moons: {dataset: moons, architecture: {kind: mlp, hidden: [8]}, epochs: 2}
  on_flowers: {dataset: flowers, architecture: {kind: mlp, hidden: [8]}, epochs: 2}
"""


def test_a_sweep_names_datasets_as_it_names_networks(tmp_path: Path) -> None:
    written(tmp_path)
    entry = """
jobs:
  - method: verification.certify
    params: {network: on_moons, radius: 0.01, split: all}
    grid: {dataset: [moons, flowers, iris], index: [0, 1]}
"""
    found, resolver = prepared(MOONS + entry, tmp_path)
    jobs = [segment for segment in found.segments if segment.method == "verification.certify"]
    datasets = [json.loads(segment.params[0])["dataset"] for segment in jobs]
    assert [name.partition(":")[0] for name in datasets] == ["generator", "data", "iris"]
    assert [found.names.get(name) for name in datasets] == ["moons", "flowers", None]
    assert [segment.group for segment in jobs] == ["on_moons, moons", "on_moons, flowers", "on_moons"]
    assert [len(segment.keys) for segment in jobs] == [2, 2, 2]
    assert not (tmp_path / "artifacts").exists()
    resolver.commit()
    for name in datasets[:2]:
        assert resolver.store.has(name)


def test_a_recipe_keeps_the_reference_of_its_dataset_as_text(tmp_path: Path) -> None:
    written(tmp_path)
    found, resolver = prepared(
        MOONS + "jobs: {method: networks.describe, grid: {network: [on_moons, on_flowers]}}", tmp_path
    )
    resolver.commit()
    recipes_kept = [reference for segment in found.segments for reference in segment.recipes]
    named = [json.loads(resolver.store.read(reference))["dataset"] for reference in dict.fromkeys(recipes_kept)]
    assert [name.partition(":")[0] for name in named] == ["generator", "data"]
    assert all(resolver.store.has(name) for name in named)
    assert {resolver.names[name] for name in named} == {"moons", "flowers"}


def test_indices_outside_a_users_dataset_are_told_before_anything_is_stored(tmp_path: Path) -> None:
    written(tmp_path)
    entry = """
jobs:
  - {method: verification.certify, params: {network: on_moons, dataset: moons, index: 20, radius: 0.1}}
  - {method: verification.certify, params: {network: on_moons, dataset: flowers, index: 1, radius: 0.1}}
"""
    with pytest.raises(sweeps.BadSweep) as caught:
        prepared(MOONS + entry, tmp_path)
    assert [error.message for error in caught.value.errors] == [
        "index 20 is outside moons (test), which has 20 examples: 0..19",
        "index 1 is outside flowers (test), which has 1 examples: 0..0",
    ]
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("datasets: [moons]\njobs: {method: networks.describe, params: {network: {}}}", "must be a mapping from names"),
        ("datasets: {1: iris}\njobs: {method: networks.describe, params: {network: {}}}", "is a name, so must be text"),
        (
            "datasets: {iris: my.csv}\njobs: {method: networks.describe, params: {network: {dataset: iris}}}",
            "'iris' under `datasets` is the name of a bundled dataset; choose another name",
        ),
        (
            "jobs: {method: networks.describe, params: {network: {dataset: moons.csv}}}",
            r"recipe\.dataset: there is no dataset 'moons\.csv'; try one of breast_cancer.*no such file",
        ),
        (
            "jobs: {method: networks.describe, params: {network: {dataset: {generator: moon}}}}",
            r"recipe\.dataset: there is no generator 'moon'; try one of",
        ),
        (
            "jobs: {method: networks.describe, params: {network: {dataset: {seed: 1}}}}",
            r"recipe\.dataset: is \{seed: 1\}, must be the name of a dataset",
        ),
        (
            "jobs: {method: networks.describe, params: {network: {dataset: bad.csv}}}",
            r"recipe\.dataset: bad\.csv: row 1, column 'a': 'one' is not a number",
        ),
        (
            "jobs: {method: networks.describe, params: {network: {dataset: my.csv, architecture: {kind: cnn}}}}",
            r"a cnn reads images, but my\.csv has shape \(2,\); try kind: mlp, or give a file's shape",
        ),
    ],
)
def test_what_is_wrong_with_a_dataset_is_told_with_the_sweep(text: str, expected: str, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "bad.csv").write_text("a,b\none,x\ntwo,y\nthree,x\n")
    with pytest.raises(sweeps.BadSweep) as caught:
        prepared(text, tmp_path)
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_epochs_follow_from_the_size_of_a_users_dataset(artifacts: Artifacts, forgetful: Callable) -> None:
    small, large = ({"generator": "two_moons", "samples": n} for n in (96, 960))
    resolver = Resolver(Path(), store=artifacts, at_once=True)
    epochs = [recipes.Recipe.parse({"dataset": one}, resolve=resolver).epochs for one in (small, large)]
    assert epochs == [760, 76]  # 1 and 10 steps an epoch of batch 64
    reference = kept(small, artifacts)
    forgetful()
    assert recipes.Recipe.parse({"dataset": reference}).epochs == 760
    with pytest.raises(ValueError, match="epochs are not given"):
        recipes.Recipe.parse({"dataset": f"data:{'0' * 64}"})


def test_stored_params_are_read_where_no_artifact_is(artifacts: Artifacts, forgetful: Callable) -> None:
    """Reading processes hold the store, not the artifacts; what an index means is checked where the job runs."""
    params = {"network": f"onnx:{'0' * 64}", "dataset": f"data:{'0' * 64}", "index": 7, "radius": 0.1}
    assert certify.Params.model_validate_json(json.dumps(params)).index == 7
    recipe = {"dataset": f"data:{'0' * 64}", "epochs": 3, "architecture": {"kind": "cnn"}}
    assert recipes.Recipe.parse(recipe).epochs == 3


def test_the_sweep_in_the_documentation_prepares_and_names_every_generator(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "flowers.csv").write_text("width,species\n1,a\n2,b\n3,a\n4,b\n5,a\n6,b\n")
    found, resolver = prepared(example, tmp_path)
    assert sum(len(segment.keys) for segment in found.segments) == 20 + 2 + 2  # and two trainings
    assert {"moons", "flowers"} <= set(resolver.names.values())
    assert all(f"`{kind}`" in page for kind in generators.KINDS)


def test_equal_mappings_of_many_rows_read_their_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    opened: list[Path] = []
    original = files.read
    monkeypatch.setattr(files, "read", lambda path, options: opened.append(path) or original(path, options))
    resolver = Resolver(tmp_path, store=Artifacts(tmp_path / "artifacts"))
    references = {resolver({"file": "my.csv", "scale": "unit"}, DATASET) for _ in range(5)}
    assert len(references) == len(opened) == 1
    resolver.commit()
    resolver.commit()
    assert len(opened) == 2  # once more when it is kept


def test_a_dataset_that_changes_meanwhile_is_told_and_not_stored(tmp_path: Path) -> None:
    written(tmp_path)
    resolver = Resolver(tmp_path, store=Artifacts(tmp_path / "artifacts"))
    resolver("my.csv", DATASET)
    (tmp_path / "my.csv").write_text((tmp_path / "my.csv").read_text().replace("2.5", "2.75"))
    with pytest.raises(ChangedFile, match=r"my\.csv changed or went away"):
        resolver.commit()
    assert not (tmp_path / "artifacts").exists()


def test_a_finished_reference_needs_its_artifact_and_then_tells_its_facts(
    artifacts: Artifacts, tmp_path: Path, forgetful: Callable[[], None]
) -> None:
    content = files.content(read(written(tmp_path)["my.csv"]))
    reference = f"data:{hashlib.sha256(content).hexdigest()}"
    with pytest.raises(ValueError, match="is not among the artifacts"):
        kept(reference, artifacts)
    artifacts.put(content)
    assert kept(reference, artifacts) == reference
    assert data.is_known(reference)
    wrong = f"data:{artifacts.put(b'no dataset')}"
    with pytest.raises(ValueError, match="is no dataset"):
        kept(wrong, artifacts)
    with pytest.raises(ValueError, match="kind onnx, but this field takes data or generator"):
        kept(f"onnx:{'0' * 64}", artifacts)


def test_two_files_of_one_name_and_two_seeds_are_called_apart(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "my.csv").write_text("a,b\n1,x\n2,y\n3,x\n")
    resolver = Resolver(tmp_path, store=Artifacts(tmp_path / "artifacts"))
    moons: list[Any] = [{"generator": "two_moons", "seed": seed} for seed in (0, 1)]
    names = [resolver.names[resolver(one, DATASET)] for one in ("my.csv", "other/my.csv", *moons)]
    assert names == ["my.csv", "other/my.csv", "two_moons", "two_moons-seed1"]
    recipe = ReferenceTo("recipe")
    labels = [resolver.names[resolver({"dataset": one}, recipe)] for one in ("digits", "iris", moons[1])]
    assert labels == ["mlp-standard-seed0", "mlp-standard-seed0-iris", "mlp-standard-seed0-two_moons-seed1"]


def test_memory_is_predicted_for_what_is_loaded_as_a_whole(artifacts: Artifacts) -> None:
    params = {"network": f"onnx:{'0' * 64}", "index": 0, "radius": 0.1}
    usual = certify.needs(certify.Params(**params)).memory
    large = kept({"generator": "blobs", "samples": 100_000, "dimension": 20}, artifacts)
    assert usual == 512 << 20
    more = certify.needs(certify.Params(**params, dataset=large)).memory
    data._load_artifact.cache_clear()
    tracemalloc.start()
    data.load(large, "all")
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert more is not None
    assert used <= more - usual <= 2 * used


# --- to the end -------------------------------------------------------------------------------------------------------


def trained(dataset: Any, artifacts: Artifacts, base: Path = Path(), **recipe: Any) -> tuple[str, train.Result]:
    """(reference of the recipe, result of training it)."""
    resolver = Resolver(base, store=artifacts, at_once=True)
    params = train.Params.model_validate({"recipe": {"dataset": dataset, **recipe}}, context={"resolve": resolver})
    return params.recipe, train.run(params)


def test_two_moons_are_learnt_to_the_end_and_certified(artifacts: Artifacts) -> None:
    moons = {"generator": "two_moons", "samples": 600, "noise": 0.05, "scale": "minmax"}
    recipe, result = trained(moons, artifacts, architecture={"kind": "mlp", "hidden": [32, 32]}, learning_rate=0.02)
    assert result.accuracy_test > 0.97
    dataset = kept(moons, artifacts)
    with networks.given({recipe: result.network}):
        jobs = [
            certify.Params(network=recipe, dataset=dataset, index=index, radius=radius)
            for index in range(20)
            for radius in (0.001, 0.5)
        ]
        results = certify.run_many(jobs)
    near, far = ([one.verdict for one in results[start::2]] for start in (0, 1))  # type: ignore[union-attr]
    assert near.count("certified") >= 18
    assert far == ["falsified"] * 20
    assert [one.label for one in results[::2]] == data.load(dataset, "test").y[:20].tolist()  # type: ignore[union-attr]


def test_a_users_table_is_learnt_to_the_end(artifacts: Artifacts, tmp_path: Path) -> None:
    iris = data.load("iris")
    kinds = np.array(["setosa", "versicolor", "virginica"])[iris.y]
    pl.DataFrame({**{f"f{i}": iris.x[:, i] for i in range(4)}, "kind": kinds}).write_csv(tmp_path / "flowers.csv")
    recipe = {"architecture": {"kind": "mlp", "hidden": [16]}, "epochs": 60, "learning_rate": 0.02}
    _, own = trained("flowers.csv", artifacts, tmp_path, **recipe)
    _, bundled = trained("iris", artifacts, **recipe)
    # The same numbers in the same order train the same network, whoever brought them.
    assert own.model_dump(exclude={"network"}) == bundled.model_dump(exclude={"network"})
    assert own.accuracy_test > 0.8


def test_a_cnn_is_trained_on_a_users_images(artifacts: Artifacts, tmp_path: Path) -> None:
    digits = data.load("digits")
    np.savez(tmp_path / "images.npz", x=digits.x[:300, 0], y=digits.y[:300])
    cnn = {"kind": "cnn", "channels": [2], "hidden": 8}
    images = {"file": "images.npz", "shape": [1, 8, 8]}
    _, result = trained(images, artifacts, tmp_path, architecture=cnn, epochs=1)
    assert result.parameters == 2 * 9 + 2 + 128 * 8 + 8 + 8 * 10 + 10
    with pytest.raises(ValueError, match="a cnn reads images"):
        trained("images.npz", artifacts, tmp_path, architecture=cnn, epochs=1)


def test_where_facts_were_not_known_the_job_itself_ends_as_invalid(
    artifacts: Artifacts, forgetful: Callable[[], None]
) -> None:
    moons = {"generator": "two_moons", "samples": 60}
    recipe, result = trained(moons, artifacts, architecture={"kind": "mlp", "hidden": [4]}, epochs=1)
    dataset = kept(moons, artifacts)
    forgetful()
    with networks.given({recipe: result.network}):
        with pytest.raises(InvalidInput, match=r"the image does not exist.*20 examples"):
            certify.run(certify.Params(network=recipe, dataset=dataset, index=20, radius=0.1))
        outside = next(i for i, x in enumerate(data.load(dataset, "test").x) if not ((x >= 0) & (x <= 1)).all())
        with pytest.raises(InvalidInput, match=r"does not lie in \[0, 1\].*clip: false, or scale: minmax"):
            certify.run(certify.Params(network=recipe, dataset=dataset, index=outside, radius=0.1))
        open_ball = certify.Params(network=recipe, dataset=dataset, index=outside, radius=0.0, clip=False)
        assert certify.run(open_ball).verdict in ("certified", "falsified")
    forgetful()
    cnn = recipes.Recipe.parse({"dataset": dataset, "epochs": 1, "architecture": {"kind": "cnn"}})
    reference = f"recipe:{artifacts.put(job.canonical(cnn).encode())}"
    with pytest.raises(InvalidInput, match=r"a cnn reads images, but generator:[0-9a-f]{8} has shape \(2,\)"):
        train.run(train.Params(recipe=reference))


def test_a_plot_tells_datasets_apart_by_the_users_names(artifacts: Artifacts) -> None:
    recipe, result = trained({"generator": "two_moons", "samples": 60, "scale": "minmax"}, artifacts, epochs=1)
    kinds = ({"generator": "two_moons", "samples": 60, "scale": "minmax"}, {"generator": "circles", "scale": "minmax"})
    names = dict(zip((kept(kind, artifacts) for kind in kinds), ("moons", "rings"), strict=True))
    made = []
    with networks.given({recipe: result.network}):
        for number, dataset in enumerate(names, 1):
            params = certify.Params(network=recipe, dataset=dataset, index=0, radius=0.1)
            stored = json.loads(job.canonical(params))
            end = certify.run(params).model_dump()
            made.append(Record(number, str(number), "verification.certify", 1, stored, "done", end, names=names))
    assert [panel.title.rpartition(", ")[2] for panel in certify.plot(made).panels] == ["moons", "rings"]


def test_workers_of_a_lab_find_what_users_bring() -> None:
    """Two trainings and their certificates: the files are read at submission, the children have the artifacts only."""
    with embedded() as lab:
        written(lab.home)
        entries = [
            {
                "method": "verification.certify",
                "params": {"network": f"on_{name}", "dataset": name, "radius": 0.01, "split": "all"},
                "grid": {"index": [0, 1]},
            }
            for name in ("moons", "flowers")
        ]
        recipe = {"architecture": {"kind": "mlp", "hidden": [8]}, "epochs": 2}
        lab.submit(
            "brought",
            *entries,
            datasets={
                "moons": {"generator": "two_moons", "samples": 60, "scale": "minmax"},
                "flowers": {"file": "my.csv", "scale": "minmax"},
            },
            networks={f"on_{name}": {"dataset": name, **recipe} for name in ("moons", "flowers")},
        )
        for path in lab.home.glob("my.*"):
            path.unlink()
        lab.wait("brought")
        records = lab.records("brought")
        ended = sorted((record.method, record.name("dataset"), record.state) for record in records)
        assert ended == [
            *[("networks.train", "", "done")] * 2,
            *[("verification.certify", "flowers", "done")] * 2,
            *[("verification.certify", "moons", "done")] * 2,
        ], [record.message for record in records]
        labels = {record.params["index"]: record.result for record in records if record.name("dataset") == "flowers"}
        assert [labels[index]["label"] for index in (0, 1)] == [1, 2]  # type: ignore[index]
