"""Records as tidy tables: a row a job, params and results as columns, typed as their models say or the data show."""

from __future__ import annotations

import csv
import datetime
import enum
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow.parquet as parquet
import pytest
import services
from pydantic import Field
from services import STORES
from store_by_hand import sign_on, submit

from netassay import catalogue
from netassay.fields import AnyNetworkRef, Array, Count, DatasetRef, Seed
from netassay.job import Record, Segment, canonical, key_of
from netassay.method import Contract
from netassay.store import dispatching, reading, running, storable, submission
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database
from netassay.store.reading import Query
from netassay.store.running import Outcome
from producer import frames

NETWORK = "onnx:" + "a" * 64
ABOUT = ["job", "batches", "method", "version", "state", "cause", "message", "seconds", "finished", "attempts"]


class Inner(Contract):
    kind: Literal["sgd", "ibp"] = "sgd"
    rate: float = 0.1


class Colour(enum.Enum):
    RED = "red"


class Params(Contract):
    network: AnyNetworkRef = NETWORK
    several: list[AnyNetworkRef] = Field(default=[NETWORK, "onnx:" + "b" * 64])
    dataset: DatasetRef = "digits"
    seed: Seed = 2**63 - 1
    training: Inner = Inner()
    widths: list[int] = Field(default=[8, 8])
    pair: tuple[float, float] = (0.0, 1.0)
    colour: Colour = Colour.RED
    seconds: float = 9.5
    maybe: Count | None = None
    either: int | str = 3


class Result(Contract):
    bound: float
    exact: bool
    widths: list[list[float]]
    steps: int
    curve: Array
    scalar: Array | None = None
    words: dict[str, int] = Field(default={})
    fits: list[Inner] = Field(default=[])
    anything: Any = None


class Module:
    """Just like one."""

    __doc__ = "A method of these tests."
    VERSION, Params, Result, EXAMPLE = 1, Params, Result, {"jobs": []}
    run = staticmethod(lambda params: None)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows the method `tests.typed` in version 1."""
    from netassay.method import Method

    get = catalogue.get
    typed = Method.of("tests.typed", Module)  # type: ignore[arg-type]
    monkeypatch.setattr(catalogue, "get", lambda name: typed if name == "tests.typed" else get(name))


@pytest.fixture(params=STORES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with services.new_store(request.param, tmp_path) as found:
        yield found


def segment(method: str, params: Sequence[str], version: int = 1) -> Segment:
    keys = [key_of(method, version, one) for one in params]
    return Segment(method, version, "", 0.1, None, None, None, 1000, (), (), list(params), keys)


def fill(
    database: Database, name: str, rows: Sequence[tuple[str, dict[str, Any], Any]], names: dict[str, str] | None = None
) -> None:
    """A batch of done jobs: (method, params, result)."""
    groups: dict[str, list[str]] = {}
    results: dict[str, Any] = {}
    for method, params, result in rows:
        text = json.dumps(params)
        groups.setdefault(method, []).append(text)
        results[method + text] = result
    submission.submit(database, name, [segment(method, texts) for method, texts in groups.items()], names or {})
    worker = sign_on(database)
    while True:
        with database.write() as connection:
            batches = dispatching.open_batches(connection)
            message = dispatching.publish_next(connection, batches[0], 1) if batches else None
        if message is None:
            return
        claim = running.claim(database, worker, message.chunk_id)
        assert claim is not None
        ends = [
            Outcome(task.id, "done", result=storable.dump(results[claim.method + task.params]), seconds=0.5)
            for task in claim.tasks
        ]
        running.finish(database, worker, claim, ends)


def typed(number: float, **more: Any) -> Result:
    return Result(bound=number, exact=True, widths=[[1.0, number]], steps=3, curve=np.arange(6.0).reshape(2, 3), **more)


def example(artifacts: Artifacts) -> list[tuple[str, dict[str, Any], Any]]:
    params = [json.loads(canonical(Params(maybe=maybe))) for maybe in (None, 7)]
    return [
        ("tests.typed", params[0], typed(math.nan, scalar=np.zeros(40_000), words={"a": 1}, fits=[Inner()])),
        ("tests.typed", params[1], typed(math.inf, scalar=np.float32(0.5), anything=[1])),
    ]


TYPED = {
    "network": pl.String, "network.reference": pl.String, "several": pl.List(pl.String),
    "several.reference": pl.List(pl.String), "dataset": pl.String, "dataset.reference": pl.String, "seed": pl.Int64,
    "training.kind": pl.String, "training.rate": pl.Float64, "widths": pl.List(pl.Int64),
    "pair": pl.List(pl.Float64), "colour": pl.String, "params.seconds": pl.Float64, "maybe": pl.Int64,
    "either": pl.Int64, "bound": pl.Float64, "exact": pl.Boolean, "result.widths": pl.List(pl.List(pl.Float64)),
    "steps": pl.Int64,
}  # fmt: skip


def test_columns_are_typed_as_the_models_say(database: Database, artifacts: Artifacts) -> None:
    fill(database, "a", example(artifacts), {NETWORK: "f.onnx"})
    found = frames.frame(database, Query(batch="a"))
    assert found.columns[:10] == ABOUT
    assert found.columns[10 : 10 + len(TYPED)] == list(TYPED)
    assert {name: found.schema[name] for name in TYPED} == TYPED
    first, second = found.to_dicts()
    assert first["network"] == "f.onnx"
    assert first["network.reference"] == NETWORK
    assert first["several"] == ["f.onnx", "onnx:" + "b" * 64]
    assert first["several.reference"] == [NETWORK, "onnx:" + "b" * 64]
    assert (first["dataset"], first["dataset.reference"]) == ("digits", None)
    assert (first["seed"], first["training.kind"], first["colour"]) == (2**63 - 1, "sgd", "red")
    assert (first["seconds"], first["params.seconds"], first["maybe"], second["maybe"]) == (0.5, 9.5, None, 7)
    assert math.isnan(first["bound"])
    assert second["bound"] == math.inf
    assert second["result.widths"] == [[1.0, math.inf]]
    assert (first["words"], json.loads(first["fits"])) == ('{"a": 1}', [{"kind": "sgd", "rate": 0.1}])
    assert first["batches"] == ["a"]
    assert abs(datetime.datetime.now(datetime.UTC) - first["finished"]) < datetime.timedelta(minutes=5)
    assert second["anything"] == [1]


def test_arrays_are_told_about_or_given_as_lists(database: Database, artifacts: Artifacts) -> None:
    fill(database, "a", example(artifacts))
    first, second = frames.frame(database, Query(batch="a")).to_dicts()
    assert first["curve"] == {"dtype": "<f8", "shape": [2, 3], "reference": None}
    assert first["scalar"]["shape"] == [40_000]
    assert artifacts.has(first["scalar"]["reference"])
    found = frames.frame(database, Query(batch="a"), arrays=True)
    assert found.schema["curve"] == pl.List(pl.Float64)
    first, second = found.to_dicts()
    assert (first["curve"], first["curve.shape"]) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [2, 3])
    assert (first["scalar"], first["scalar.shape"]) == (None, [40_000])
    assert artifacts.has(first["scalar.reference"])
    assert (second["scalar"], second["scalar.shape"], second["scalar.reference"]) == ([0.5], [], None)


CONFLICTS = {
    "whole numbers and fractions": ([1, 2.5], pl.Float64, [1.0, 2.5]),
    "beyond 64 bits": ([1, 2**70], pl.Float64, [1.0, 2.0**70]),
    "numbers and text": ([1, "a", 2.5], pl.String, ["1", "a", "2.5"]),
    "truth and numbers": ([True, 1], pl.String, ["true", "1"]),
    "lists": ([[1], [2.5, None]], pl.List(pl.Float64), [[1.0], [2.5, None]]),
    "lists and numbers": ([[1, math.nan], 2], pl.String, ['[1, {"float": "nan"}]', "2"]),
    "nothing": ([None, None], pl.String, [None, None]),
    "NaN alone": ([math.nan, 1.0], pl.Float64, None),
    "lone surrogates": (["\ud800", "a"], pl.String, ["\\ud800", "a"]),
}


@pytest.mark.parametrize("values, dtype, shown", CONFLICTS.values(), ids=CONFLICTS)
@pytest.mark.parametrize("apart", [False, True], ids=["one method", "a method each"])
def test_types_that_no_model_gives_are_read_off_the_data(
    values: list[Any], dtype: Any, shown: list[Any] | None, apart: bool
) -> None:
    records = [
        Record(n, f"{n:032}", f"unknown.method{n if apart else ''}", 1, {"n": n}, "done", {"x": value}, finished=1.0)
        for n, value in enumerate(values)
    ]
    found = frames.frame_of(records)
    assert found.schema["x"] == dtype
    assert found.schema["n"] == pl.Int64
    if shown is not None:
        assert found["x"].to_list() == shown


def test_unknown_methods_and_versions_are_flattened_by_their_data() -> None:
    many = {f"key{n}": n for n in range(500)}
    records = [
        Record(0, "0", "unknown.method", 1, {"network": NETWORK, "a": {"b": 1}}, "done", {"many": many, "n": {}},
               finished=1.0, names={NETWORK: "f.onnx"}),
        Record(1, "1", "unknown.method", 1, {"network": None, "a": 5}, "done", {"many": many}, finished=1.0),
        Record(2, "2", "tests.typed", 99, {"new": True}, "pending"),
    ]  # fmt: skip
    rows = frames.frame_of(records).to_dicts()
    assert (rows[0]["network"], rows[0]["network.reference"]) == ("f.onnx", NETWORK)
    assert [(row["a"], row["a.b"]) for row in rows] == [(None, 1), (5, None), (None, None)]
    assert json.loads(rows[0]["many"]) == many
    assert "many.key0" not in rows[0]
    assert [row["new"] for row in rows] == [None, None, True]
    assert (rows[2]["seconds"], rows[2]["finished"]) == (None, None)


def test_several_methods_share_a_table_in_the_order_of_their_jobs(database: Database, artifacts: Artifacts) -> None:
    echo = [("diagnostics.echo", {"log": "", "tag": n, "value": n}, {"value": n, "square": n * n}) for n in range(3)]
    other = [("unknown.method", {"tag": n}, {"value": f"v{n}"}) for n in range(3)]
    fill(database, "a", [*echo, *example(artifacts), *other])
    found = frames.frame(database, Query())
    assert found["method"].to_list() == ["diagnostics.echo"] * 3 + ["tests.typed"] * 2 + ["unknown.method"] * 3
    assert found["tag"].to_list() == [0, 1, 2, None, None, 0, 1, 2]
    assert found["value"].to_list() == ["0", "1", "2", None, None, "v0", "v1", "v2"]
    assert found["result.value"].to_list() == [0, 1, 2, None, None, None, None, None]
    only = frames.frame(database, Query(method="diagnostics.*"), columns=("value", "square", "value"))
    assert only.to_dicts() == [{"value": n, "square": float(n * n)} for n in range(3)]
    with pytest.raises(frames.NoSuchColumn, match=r"valeu.*columns are: job, .*square"):
        frames.frame(database, Query(), columns=("valeu",))


def test_a_flat_row_calls_its_columns_as_the_frame_does() -> None:
    params = {"seconds": 1.0, "cause": "none", "version": 3, "x": [NETWORK]}
    record = Record(0, "0" * 32, "unknown.method", 1, params, "done", {"seconds": 2.0, "x": 4, "method": 5},
                    seconds=0.5, finished=1.0, names={NETWORK: "f.onnx"})  # fmt: skip
    row = frames.flat(record)
    assert row == {
        "job": "0" * 12, "method": "unknown.method", "state": "done", "params.seconds": 1.0, "params.cause": "none",
        "params.version": 3, "x": ["f.onnx"], "result.seconds": 2.0, "result.x": 4, "result.method": 5,
        "seconds": 0.5, "cause": "", "message": "",
    }  # fmt: skip
    assert row.keys() <= set(frames.frame_of([record]).columns)


def test_flat_rows_have_any_column_of_the_frame_that_is_asked_for(database: Database, artifacts: Artifacts) -> None:
    fill(database, "a", example(artifacts), {NETWORK: "f.onnx"})
    wanted = ["job", "training.kind", "network.reference", "curve", "finished", "batches", "attempts"]
    row, _ = frames.flat_rows(database, Query(), wanted)
    assert row["training"] == {"kind": "sgd", "rate": 0.1}
    assert (row["training.kind"], row["network.reference"], row["curve"]) == ("sgd", NETWORK, "array 2x3")
    assert (row["finished"][-1], row["batches"], row["attempts"]) == ("Z", ["a"], 0)
    assert "version" not in row
    with pytest.raises(frames.NoSuchColumn, match="training;"):
        next(frames.flat_rows(database, Query(state="failed"), ["training"]))


def test_an_empty_table_has_its_columns(database: Database) -> None:
    submit(database, "a", segment("tests.typed", [canonical(Params())]))
    found = frames.frame(database, Query(state="failed"))
    assert (found.height, found.columns) == (0, ABOUT)
    found = frames.frame(database, Query(batch="a"))
    assert (found.height, found["state"].to_list()) == (1, ["pending"])
    assert found.schema["bound"] == pl.Float64


def test_parquet_says_the_same_as_the_frame_in_row_groups(
    database: Database, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = [("diagnostics.echo", {"log": "", "tag": n, "value": n}, {"value": n, "square": n * n}) for n in range(50)]
    fill(database, "a", [*echo, *example(artifacts)], {NETWORK: "f.onnx"})
    whole = frames.frame(database, Query())
    monkeypatch.setattr(frames, "_GROUP", 7)
    monkeypatch.setattr(frames, "_ROW_GROUP", 20)
    seen: list[int] = []
    assert frames.write(database, Query(), tmp_path / "out.parquet", progress=seen.append) == 52
    assert pl.read_parquet(tmp_path / "out.parquet").equals(whole)
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3
    assert seen == [7, 14, 21, 28, 35, 42, 49, 52]
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.parquet"]


def test_csv_is_plain_and_complete(database: Database, artifacts: Artifacts, tmp_path: Path) -> None:
    fill(database, "a", example(artifacts), {NETWORK: 'f,"1".onnx'})
    stream = io.StringIO()
    assert frames.write_csv(database, Query(batch="a"), stream) == 2
    assert frames.write(database, Query(batch="a"), tmp_path / "out.csv", "csv") == 2
    assert (tmp_path / "out.csv").read_text() == stream.getvalue()
    first, second = csv.DictReader(io.StringIO(stream.getvalue()))
    assert list(first)[:10] == ABOUT
    assert (first["network"], first["exact"], first["bound"], second["bound"]) == ('f,"1".onnx', "true", "nan", "inf")
    assert json.loads(first["widths"]) == [8, 8]
    assert json.loads(second["result.widths"]) == [[1.0, {"float": "inf"}]]
    assert (first["maybe"], second["maybe"]) == ("", "7")
    assert datetime.datetime.fromisoformat(first["finished"]).tzinfo == datetime.UTC


def test_a_file_appears_whole_or_not_at_all(database: Database, artifacts: Artifacts, tmp_path: Path) -> None:
    fill(database, "a", example(artifacts))
    (tmp_path / "out.parquet").write_text("of yesterday")

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frames.write(database, Query(), tmp_path / "out.parquet", progress=interrupt)
    assert (tmp_path / "out.parquet").read_text() == "of yesterday"
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.parquet"]


def test_jobs_that_end_between_the_look_and_the_reading_find_their_place(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database, "a", [("unknown.method", {"n": n}, {"x": n}) for n in range(3)])
    find = reading.find

    def late(*arguments: Any) -> Iterator[Record]:
        if not [seen for seen in reading.batches(database) if seen.name == "b"]:
            fill(database, "b", [("unknown.method", {"n": 3}, {"x": "text"}), ("other.method", {"m": 1}, {"x": 1})])
        yield from find(*arguments)

    monkeypatch.setattr(reading, "find", late)
    frames.write(database, Query(), tmp_path / "out.parquet")
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert found["x"].to_list() == ["0", "1", "2", "text", "1"]
    assert found["m"].to_list() == [None, None, None, None, 1]
