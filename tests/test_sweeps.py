"""From a document to jobs: what is expanded, in which order, with which keys, and what is refused in which words."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netassay import catalogue, job
from netassay.method import time_limit
from netassay.store.artifacts import Artifacts
from producer import axes, documents, sweeps
from producer.references import Resolver
from producer.sweeps import BadSweep, Prepared


def prepare(text: str, folder: Path = Path(), skip_invalid: bool = False) -> Prepared:
    document = sweeps.parse(text, base=folder)
    return sweeps.prepare(document, Resolver(folder, document.networks, Artifacts(folder / "artifacts")), skip_invalid)


def refusal(text: str, folder: Path = Path()) -> str:
    with pytest.raises(BadSweep) as caught:
        prepare(text, folder)
    return str(caught.value)


def values(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(text) for segment in prepared.segments for text in segment.params]


# --- expansion ------------------------------------------------------------------------------------------------------


def test_grid_is_the_product_whose_last_axis_varies_fastest() -> None:
    prepared = prepare("jobs: {method: diagnostics.echo, grid: {value: [5, a], tag: {range: [0, 3]}}}")
    assert [(one["value"], one["tag"]) for one in values(prepared)] == list(itertools.product([5, "a"], range(3)))
    assert prepared.count == 6


def test_range_has_a_step_and_may_fall() -> None:
    assert [
        one["value"] for one in values(prepare("jobs: {method: diagnostics.echo, grid: {value: {range: [5, 0, -2]}}}"))
    ] == [5, 3, 1]


def test_an_entry_without_grid_is_one_job() -> None:
    assert values(prepare("jobs: [{method: diagnostics.echo, params: {value: 1}}]")) == [
        {"log": "", "tag": 0, "value": 1}
    ]


def test_numbers_like_1e_3_are_numbers() -> None:
    assert [
        one["value"] for one in values(prepare("jobs: {method: diagnostics.echo, grid: {value: [1e-3, 1E3, 2.5e+1]}}"))
    ] == [1e-3, 1e3, 25.0]


@given(
    st.lists(
        st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        min_size=1,
        max_size=20,
    )
)
def test_keys_and_params_are_those_of_job_key(given_values: list[Any]) -> None:
    method = catalogue.get("diagnostics.echo")
    document = sweeps.document({"jobs": {"method": method.name, "grid": {"value": given_values}}}, base=Path())
    prepared = sweeps.prepare(document, Resolver(Path(), store=Artifacts(Path("none"))))
    expected = {}
    for value in given_values:
        params = method.Params(value=value)
        expected.setdefault(job.key(method, params), job.canonical(params))
    found = {
        key.hex(): text for segment in prepared.segments for key, text in zip(segment.keys, segment.params, strict=True)
    }
    assert list(found.items()) == list(expected.items())
    assert prepared.duplicates == len(given_values) - len(expected)


@pytest.mark.parametrize("value", [-0.0, 0.0, -0.05, -0.5, 1e300, 5e-324, "-0.0", "é\u2028", '"\\'])
def test_keys_agree_where_text_is_delicate(value: Any) -> None:
    method = catalogue.get("diagnostics.echo")
    document = sweeps.document({"jobs": {"method": method.name, "params": {"value": value}}}, base=Path())
    (segment,) = sweeps.prepare(document, Resolver(Path(), store=Artifacts(Path("none")))).segments
    assert segment.keys[0].hex() == job.key(method, method.Params(value=value))


def test_a_job_given_twice_is_kept_once_also_across_entries() -> None:
    prepared = prepare(
        """
        jobs:
          - {method: diagnostics.echo, grid: {value: [1, 2, 1]}}
          - {method: diagnostics.echo, grid: {value: [2, 3]}, limits: {seconds: 5}}
        """
    )
    assert [one["value"] for one in values(prepared)] == [1, 2, 3]
    assert prepared.duplicates == 2


def test_segments_keep_methods_and_limits_apart_and_entries_together() -> None:
    prepared = prepare(
        """
        jobs:
          - {method: diagnostics.echo, grid: {value: [1, 2]}}
          - {method: diagnostics.sleep, params: {seconds: 0.5}}
          - {method: diagnostics.echo, grid: {value: [3]}}
          - {method: diagnostics.echo, grid: {value: [4]}, limits: {seconds: 2, memory: 1.5 GiB}}
        """
    )
    found = [(part.method, len(part.keys), part.time_limit, part.memory_limit) for part in prepared.segments]
    assert found == [
        ("diagnostics.echo", 3, None, None),
        ("diagnostics.sleep", 1, None, None),
        ("diagnostics.echo", 1, 2.0, 3 * 2**29),
    ]
    echo, sleep, _ = prepared.segments
    assert (echo.version, echo.group_size, echo.seconds, echo.libraries) == (1, 1000, 2e-5, ())
    assert (sleep.group_size, sleep.seconds) == (1, 0.5)


def test_a_methods_group_answer_keeps_jobs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "parity.py").write_text(
        '"""Parity."""\nfrom netassay.fields import DatasetRef\nfrom netassay.method import Contract\n'
        "VERSION = 1\nEXAMPLE = {}\n"
        "class Params(Contract):\n    x: int = 0\n    dataset: DatasetRef = 'iris'\n"
        "class Result(Contract):\n    x: int\n"
        "def run(params): return Result(x=params.x)\ndef group(params): return str(params.x % 2)\n"
    )
    monkeypatch.setenv("NETASSAY_METHODS", str(tmp_path))
    prepared = prepare("jobs: {method: mine.parity, grid: {x: {range: [0, 4]}, dataset: [iris, wine]}}")
    catalogue._sources.cache_clear()
    assert [
        [(json.loads(text)["x"], json.loads(text)["dataset"]) for text in part.params] for part in prepared.segments
    ] == [
        [(0, "iris"), (2, "iris")],
        [(0, "wine"), (2, "wine")],
        [(1, "iris"), (3, "iris")],
        [(1, "wine"), (3, "wine")],
    ]
    assert [part.group for part in prepared.segments] == ["iris", "wine", "iris", "wine"]


@pytest.mark.parametrize(
    "text, expected", [("500MB", 500 * 10**6), ("2 GiB", 2**31), ("1.5kb", 1500), (4096, 4096), ("1T", 10**12)]
)
def test_sizes(text: Any, expected: int) -> None:
    assert sweeps.size(text) == expected


# --- axes -----------------------------------------------------------------------------------------------------------


def axis_values(text: str, folder: Path = Path()) -> list[Any]:
    return [
        one["value"] for one in values(prepare(f"jobs: {{method: diagnostics.echo, grid: {{value: {text}}}}}", folder))
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{linspace: [0, 1, 11]}", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("{linspace: [3, -1, 3]}", [3.0, 1.0, -1.0]),
        ("{geomspace: [1e-4, 1e-1, 4]}", [1e-4, 1e-3, 1e-2, 1e-1]),
        ("{geomspace: [-8, -1, 4]}", [-8.0, -4.0, -2.0, -1.0]),
    ],
)
def test_spaced_axes_have_both_ends_and_the_values_one_would_write(text: str, expected: list[float]) -> None:
    assert axis_values(text) == expected


def test_a_glob_gives_the_sorted_files_below_the_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "nets" / "deep").mkdir(parents=True)
    for name in ("nets/b.onnx", "nets/a.onnx", "nets/deep/c.onnx", "nets/a.txt"):
        (tmp_path / name).touch()
    assert axis_values("{glob: 'nets/*.onnx'}", tmp_path) == ["nets/a.onnx", "nets/b.onnx"]
    assert axis_values("{glob: '**/*.onnx'}", tmp_path) == ["nets/a.onnx", "nets/b.onnx", "nets/deep/c.onnx"]
    assert f"grid value glob 'nets/*.pt' matches no file in {tmp_path}" in refusal(
        "jobs: {method: diagnostics.echo, grid: {value: {glob: 'nets/*.pt'}}}", tmp_path
    )


def test_zipped_axes_go_in_step() -> None:
    found = values(prepare("jobs: {method: diagnostics.echo, zip: {value: [a, b, c], tag: {range: [7, 10]}}}"))
    assert [(one["value"], one["tag"]) for one in found] == [("a", 7), ("b", 8), ("c", 9)]


def test_rows_grid_zip_and_random_make_a_product_whose_last_part_varies_fastest(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("hold_lock\ntrue\nfalse\n")
    document = sweeps.parse(
        """
        jobs:
          method: diagnostics.sleep
          rows: rows.csv
          grid: {tag: [1, 2]}
          zip: {log: [a, b, c]}
          random: {count: 2, seed: 3, draw: {seconds: {uniform: [0, 1]}}}
        """,
        base=tmp_path,
    )
    assert document.jobs[0].rows == 2 * 2 * 3 * 2
    found = values(sweeps.prepare(document, Resolver(tmp_path, store=Artifacts(tmp_path / "artifacts"))))
    drawn = list(document.jobs[0].random["seconds"])
    assert [(one["hold_lock"], one["tag"], one["log"], one["seconds"]) for one in found] == list(
        itertools.product([True, False], [1, 2], "abc", drawn)
    )


def test_the_size_of_a_sweep_is_known_without_making_its_rows() -> None:
    draw = {"count": 1000, "draw": {"value": {"normal": [0, 1]}}}
    entry = {"method": "diagnostics.echo", "grid": {"tag": {"range": [0, 10_000]}}, "random": draw}
    assert sweeps.document({"jobs": entry}, Path()).jobs[0].rows == 10**7
    entry["grid"]["tag"] = {"range": [0, 10_001]}  # type: ignore[index]
    with pytest.raises(BadSweep, match="makes 10,001,000 rows, at most 10,000,000 are possible"):
        sweeps.document({"jobs": entry}, Path())


# --- random draws ---------------------------------------------------------------------------------------------------

DRAW = {
    "lr": {"log_uniform": [1e-4, 1e-1]},
    "width": {"integers": [1, 9]},
    "act": {"choice": ["relu", "tanh"]},
    "x": {"uniform": [0, 1]},
    "z": {"normal": [0, 1]},
}


def drawn(count: int, seed: int, *names: str) -> dict[str, list[Any]]:
    found = axes.draws({"count": count, "seed": seed, "draw": {name: DRAW[name] for name in names or DRAW}})
    return {name: list(values) for name, values in found.items()}


def test_draws_are_the_same_on_every_platform_and_version() -> None:
    # Golden: these values are in the keys of jobs. They change only if all random sweeps are to be computed anew.
    assert drawn(4, 7) == {
        "lr": [0.0024130973361868725, 0.048721991156568084, 0.0002911937933636682, 0.0013624478553706644],
        "width": [5, 9, 8, 9],
        "act": ["relu", "relu", "tanh", "relu"],
        "x": [0.7167162474999359, 0.43613692717613395, 0.293341194958439, 0.009305663615201243],
        "z": [-0.3855743187353844, 0.057634793312826206, 1.5250932225108573, 0.968895910169577],
    }


@given(st.integers(), st.integers(1, 50), st.integers(1, 50))
def test_fewer_draws_are_the_first_of_more_and_axes_do_not_touch_each_other(seed: int, few: int, many: int) -> None:
    few, many = sorted((few, many))
    assert drawn(few, seed) == {name: values[:few] for name, values in drawn(many, seed).items()}
    assert drawn(few, seed, "z")["z"] == drawn(few, seed)["z"]


def test_another_seed_draws_other_values() -> None:
    assert not set(drawn(100, 1)["x"]) & set(drawn(100, 2)["x"])


def test_draws_are_spread_as_they_are_named() -> None:
    count = 4000
    found = drawn(count, 1)
    # Bounds at four standard errors of the mean: a right generator fails one seed in 16,000; this one is fixed.
    share = [math.log10(value / 1e-4) / 3 for value in found["lr"]]
    for values in (share, found["x"]):
        assert abs(statistics.mean(values) - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
        assert 0 <= min(values) < 0.01 < 0.99 < max(values) <= 1
    assert abs(statistics.mean(found["z"])) < 4 / math.sqrt(count)
    assert abs(statistics.variance(found["z"]) - 1) < 4 * math.sqrt(2 / count)
    for value in range(1, 10):
        assert abs(found["width"].count(value) / count - 1 / 9) < 4 * math.sqrt(8 / 81 / count)


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("zip: {value: [1, 2], tag: [1, 2, 3]}", "zip goes in step, so all its axes must have the same length: value"),
        ("grid: {value: [1]}, zip: {value: [2]}", "value is given under both grid and zip; keep one"),
        ("grid: {value: {linspac: [0, 1, 3]}}", "`linspac` is not known here; nearest: linspace, geomspace"),
        ("grid: {value: {linspace: [0, 1]}}", "linspace is [0, 1], must be [first, last, n]"),
        ("grid: {value: {linspace: [0, .inf, 3]}}", "linspace is [0, inf, 3], must be [first, last, n]: two finite"),
        ("grid: {value: {linspace: [0, 1, 1]}}", "how many values, 2 or more"),
        ("grid: {value: {geomspace: [0, 1, 3]}}", "must have ends of the same sign, neither of them 0"),
        ("grid: {value: {range: [0, 1000000000000000000000]}}", "range has more than 1,000,000,000 values"),
        ("grid: {value: {glob: 3}}", "glob is 3, must be a pattern"),
        ("random: {cont: 3}", "random `cont` is not known here; nearest: count"),
        ("random: {draw: {value: {uniform: [0, 1]}}}", "random count is missing"),
        ("random: {count: 0, draw: {value: {uniform: [0, 1]}}}", "random count is 0, must be a whole number from 1"),
        ("random: {count: 3, seed: x, draw: {value: {uniform: [0, 1]}}}", "random seed is 'x', must be a whole number"),
        ("random: {count: 3}", "random draw is None, must be a mapping from names of parameters"),
        ("random: {count: 3, draw: {value: {unifrom: [0, 1]}}}", "value `unifrom` is not known here; nearest: uniform"),
        ("random: {count: 3, draw: {value: {uniform: [1, 0]}}}", "value uniform is [1.0, 0.0], must have the smaller"),
        ("random: {count: 3, draw: {value: {integers: [0.5, 2]}}}", "must be [lowest, highest], two whole numbers"),
        ("random: {count: 3, draw: {value: {log_uniform: [0, 1]}}}", "must have ends above 0"),
        ("random: {count: 3, draw: {value: {normal: [0, -1]}}}", "normal has the deviation -1.0, must be at least 0"),
        ("random: {count: 3, draw: {value: {choice: []}}}", "choice is [], must be a list of at least one value"),
        ("rows: nowhere.csv", "rows nowhere.csv: cannot be read: No such file"),
        ("rows: 3", "rows is 3, must be the path of a file of rows, or a list of them"),
        ("grid: {value: [1]}, rows: [{value: 2}]", "rows row 1: value is given in the row and in the entry; keep one"),
    ],
)  # fmt: skip
def test_bad_axes_are_refused(entry: str, expected: str) -> None:
    assert expected in refusal(f"jobs: [{{method: diagnostics.echo, {entry}}}]")


# --- networks -------------------------------------------------------------------------------------------------------

ON_NETWORKS = """
networks:
  first: {recipe: {dataset: digits, seed: 1, architecture: {kind: mlp, hidden: [4]}, epochs: 1}}
  second: {dataset: digits, seed: 2, architecture: {kind: mlp, hidden: [4]}, epochs: 1}
jobs:
  - method: networks.describe
    grid: {spectra: [true, false], network: [first, second]}
"""


def test_jobs_on_one_network_lie_side_by_side_behind_its_training(tmp_path: Path) -> None:
    prepared = prepare(ON_NETWORKS, tmp_path)
    assert [(part.method, part.group, len(part.keys)) for part in prepared.segments] == [
        ("networks.train", "first", 1),
        ("networks.train", "second", 1),
        ("networks.describe", "first", 2),
        ("networks.describe", "second", 2),
    ]
    assert sorted(prepared.names.values()) == ["first", "second"]
    for train, describe in zip(prepared.segments[:2], prepared.segments[2:], strict=True):
        recipe = json.loads(train.params[0])["recipe"]
        assert describe.recipes == (recipe,)
        assert train.recipes == ()
        assert {json.loads(text)["network"] for text in describe.params} == {recipe}
        assert train.keys[0].hex() == job.key(
            catalogue.get("networks.train"), catalogue.get("networks.train").Params(recipe=recipe)
        )


def test_a_training_among_the_jobs_is_not_added_again(tmp_path: Path) -> None:
    prepared = prepare(ON_NETWORKS + "  - {method: networks.train, params: {recipe: first}}\n", tmp_path)
    trained = [part.group for part in prepared.segments if part.method == "networks.train"]
    assert sorted(trained) == ["first", "second"]
    assert prepared.duplicates == 0


def test_preparing_stores_nothing(tmp_path: Path) -> None:
    prepare(ON_NETWORKS, tmp_path)
    assert not (tmp_path / "artifacts").exists()


def test_two_spellings_of_one_recipe_are_one_network(tmp_path: Path) -> None:
    prepared = prepare(
        """
        jobs:
          - method: networks.describe
            grid: {network: [{dataset: digits, seed: 3}, {seed: 3}]}
        """,
        tmp_path,
    )
    assert [part.method for part in prepared.segments] == ["networks.train", "networks.describe"]
    assert prepared.duplicates == 1
    assert list(prepared.names.values()) == ["mlp-standard-seed3"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- 1", "the document: is [1], must be a mapping with `jobs`"),
        ("", "the document: is None, must be a mapping"),
        ("job: []", "`job` is not known here; nearest: jobs"),
        ("jobs: []", "jobs must be a list of at least one entry"),
        ("name: 3\njobs: [{method: diagnostics.echo, params: {value: 1}}]", "name is 3, must be text"),
        ("jobs: [{method: diagnostics.echo, grid: {value: []}}]", "entry 1: grid value is an empty list"),
        (
            "jobs: [{method: diagnostics.echo, grid: {value: 3}}]",
            "entry 1: grid value is 3, must be a list of values or",
        ),
        (
            "jobs: [{method: diagnostics.echo, grid: {value: {range: [0, 1.5]}}}]",
            "range is [0, 1.5], must be [start, stop]",
        ),
        ("jobs: [{method: diagnostics.echo, grid: {value: {range: [3, 3]}}}]", "range [3, 3] is empty"),
        ("jobs: [{method: diagnostics.echo, grid: {value: {range: [0, 3, 0]}}}]", "range has step 0"),
        (
            "jobs: [{method: diagnostics.echo, params: {value: 1}, grid: {value: [2]}}]",
            "value is given under both params and grid",
        ),
        ("jobs: [{params: {value: 1}}]", "entry 1: method is missing"),
        ("jobs: [{method: diagnostics.echo, param: {value: 1}}]", "`param` is not known here; nearest: params"),
        ("jobs: [{method: diagnostics.echo, limits: {seconds: 0}}]", "seconds is 0, must be a number above 0"),
        (
            "jobs: [{method: diagnostics.echo, limits: {memory: lots}}]",
            "memory is 'lots', must be a size such as 500MB",
        ),
        (f"jobs: [{{method: diagnostics.echo, limits: {{seconds: 1{'0' * 400}}}}}]", "must be a number above 0"),
        (
            "jobs: [{method: diagnostics.echo, limits: {memory: 99999999999999999TB}}]",
            "memory is '99999999999999999TB', must be at most 9,223,372,036,854,774,784 bytes",
        ),
        (
            f"jobs: [{{method: diagnostics.echo, limits: {{memory: {2**63}}}}}]",
            "must be at most 9,223,372,036,854,774,784 bytes",
        ),
        ("jobs: [{method: diagnostics.echo, limits: {memory: 0.4B}}]", "memory is '0.4B', must be at least 1 byte"),
        ("jobs: [{method: diagnostics.echo, limits: {memory: 0}}]", "memory is 0, must be at least 1 byte"),
        ("jobs: [{method: diagnostics.echo, limits: {time: 1}}]", "must be a mapping with seconds, memory or both"),
        ("jobs:\n  - a: 1\n    a: 2", "line 3, column 5: 'a' is given twice, first in line 2"),
        ("jobs: [\n  {a: 1", "line 3, column 1"),
        ("jobs: !!python/object/apply:os.getcwd []", "line 1"),
        ("\x00", "is not YAML"),
    ],
)  # fmt: skip
def test_bad_structure_is_refused(text: str, expected: str) -> None:
    assert expected in refusal(text)


@pytest.mark.parametrize(
    "entry, expected",
    [
        ("method: diagnostics.ecko", "no method is called 'diagnostics.ecko'; nearest: diagnostics.echo"),
        (
            "method: diagnostics.echo, params: {value: 1, valu: 1}",
            "valu is not a parameter of diagnostics.echo; nearest: value (it takes: value, log",
        ),
        ("method: diagnostics.echo", "value is missing; give it under params or grid"),
        ("method: diagnostics.echo, params: {value: .nan}", "value is nan, must be a finite number"),
        ("method: diagnostics.echo, params: {value: [1]}", "value is [1], must be a number or text"),
        ("method: diagnostics.echo, params: {value: 1, tag: 0.5}", "tag is 0.5, must be a whole number"),
        ("method: diagnostics.sleep, params: {seconds: yes}", "seconds is true, must be a number"),
        ("method: diagnostics.echo, params: {value: 1, tag: off}", "tag is false, must be a number"),
        ("method: diagnostics.echo, params: {value: on}", "is true, must be a number or text (write it in quotes)"),
        ("method: diagnostics.sleep, params: {seconds: -1}", "seconds is -1, must be at least 0.0"),
        ("method: diagnostics.sleep, params: {seconds: .inf}", "seconds is inf, must be a finite number"),
        ("method: diagnostics.sleep, params: {seconds: soon}", "seconds is 'soon', must be a number"),
        ("method: diagnostics.sleep, params: {hold_lock: 3}", "hold_lock is 3, must be true or false"),
        (
            "method: diagnostics.burn, params: {busy: pyton}",
            "busy is 'pyton', must be 'python', 'c' or 'c_without_lock'",
        ),
        ("method: diagnostics.fail, params: {message: 3}", "message is 3, must be text (write it in quotes)"),
        ("method: diagnostics.crash, params: {code: 256}", "code is 256, must be at most 255"),
        (
            "method: networks.describe, params: {network: nowhere.onnx}",
            "'nowhere.onnx' is neither a name under `networks` nor a file",
        ),
        ("method: networks.describe, params: {network: {dataset: digitz}}", "there is no dataset 'digitz'"),
        ("method: networks.describe, params: {network: 3}", "network is 3, must be a name from `networks`"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_by_field_value_and_remedy(entry: str, expected: str) -> None:
    message = refusal(f"jobs: [{{{entry}}}]")
    assert "1 error, nothing was submitted" in message
    assert expected in message


def test_an_index_outside_the_data_names_its_row() -> None:
    message = refusal(
        "jobs: {method: verification.certify, params: {network: {seed: 0}, radius: 0.1}, grid: {index: [5, 100000]}}"
    )
    assert "row 2 (index=100000)" in message
    assert "1 error," in message


def test_all_errors_are_collected_and_the_same_one_is_told_once() -> None:
    with pytest.raises(BadSweep) as caught:
        prepare(
            """
            jobs:
              - {method: diagnostics.sleep, grid: {seconds: [-1, 1, -2], tag: {range: [0, 100]}}}
              - {method: diagnostics.echo, grid: {value: [1, .nan]}}
            """
        )
    told = [(error.row, error.field, error.rows) for error in caught.value.errors]
    assert told == [(1, "seconds", 100), (201, "seconds", 100), (2, "value", 1)]
    assert caught.value.total == 201
    assert "entry 1 (diagnostics.sleep), row 201 (seconds=-2, tag=0): seconds is -2" in str(caught.value)
    assert "(so in 100 rows)" in str(caught.value)


def test_no_more_than_twenty_errors_are_shown_and_the_rest_counted() -> None:
    message = refusal("jobs: {method: diagnostics.sleep, grid: {seconds: {range: [-3000, 0]}}}")
    assert len(message.splitlines()) == 22
    assert message.startswith("sweep: 3,000 errors, nothing was submitted")
    assert message.endswith("... and 2,980 more")


def test_skipping_invalid_rows_keeps_the_others_and_reports() -> None:
    prepared = prepare(
        """
        jobs:
          - {method: diagnostics.sleep, grid: {seconds: [-1, 1], tag: [0, 0.5]}}
          - {method: no.such, grid: {a: [1, 2, 3]}}
          - {method: diagnostics.echo, params: {vale: 1}}
        """,
        skip_invalid=True,
    )
    assert values(prepared) == [{"hold_lock": False, "log": "", "seconds": 1.0, "tag": 0}]
    assert prepared.refused == 3 + 3 + 1
    assert prepared.errors


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(BadSweep, match=r"nowhere\.yaml: 1 error.*\n.*cannot be read: No such file"):
        sweeps.read(tmp_path / "nowhere.yaml")


# --- showing, and running one ---------------------------------------------------------------------------------------


def test_describe_sums_jobs_and_states_their_limits() -> None:
    rows = sweeps.describe(
        prepare(
            """
            jobs:
              - {method: diagnostics.sleep, params: {seconds: 10}, grid: {tag: {range: [0, 7]}}}
              - {method: diagnostics.echo, grid: {value: [1, 2]}, limits: {seconds: 5, memory: 1MB}}
            """
        )
    )
    assert [(row.method, row.jobs, row.total_seconds, row.time_limit, row.memory_limit) for row in rows] == [
        ("diagnostics.sleep", 7, 70.0, 200.0, None),
        ("diagnostics.echo", 2, 4e-5, 5.0, 10**6),
    ]
    assert sweeps.time_limit(0.1) == 60.0


@pytest.mark.parametrize(
    "options",
    [["value=1e-2", "tag=3"], ["--value", "0.01", "--tag", "3"], ["--value=0.01", "tag=3"]],
)
def test_parameters_of_one_job_from_the_command_line(options: list[str]) -> None:
    method = catalogue.get("diagnostics.echo")
    assert sweeps.parameters(method, options) == method.Params(value=0.01, tag=3)


def test_flags_text_and_negative_numbers_need_no_quotes() -> None:
    sleep, fail, echo = (catalogue.get(f"diagnostics.{name}") for name in ("sleep", "fail", "echo"))
    assert sweeps.parameters(sleep, ["--hold-lock", "--seconds", "2"]) == sleep.Params(hold_lock=True, seconds=2.0)
    assert sweeps.parameters(fail, ["message=2024-01-01", "cause=error"]).message == "2024-01-01"
    assert sweeps.parameters(fail, ["message=3"]).message == "3"
    assert sweeps.parameters(echo, ["--value", "-3"]).value == -3


@pytest.mark.parametrize(
    "options, expected",
    [
        (["valu=1"], "valu is not a parameter of diagnostics.echo; nearest: value"),
        ([], "value is missing; give it as value=..."),
        (["1"], "'1' must be field=value or --field value"),
        (["value=1", "--value", "2"], "value is given twice"),
        (["value=1", "tag=a"], "tag is 'a', must be a whole number"),
    ],
)
def test_bad_options_are_refused(options: list[str], expected: str) -> None:
    with pytest.raises(BadSweep) as caught:
        sweeps.parameters(catalogue.get("diagnostics.echo"), options)
    assert expected in str(caught.value)


def test_predictions_without_measure_stay_what_a_store_keeps() -> None:
    found = prepare("""
        jobs:
          - {method: diagnostics.sleep, params: {seconds: 1.0e+308}}
          - {method: diagnostics.allocate, params: {bytes: 100000000000000000000}}
        """)
    long, large = found.segments
    assert (long.seconds, time_limit(long.seconds), time_limit(math.inf)) == (1e9, 1e9, 1e9)
    assert large.memory == documents.MOST_BYTES < 2**63


# --- cost -----------------------------------------------------------------------------------------------------------

PREPARE = """
import time, psutil
from pathlib import Path
from producer import references, sweeps
entry = {"method": "diagnostics.echo", "grid": {"value": {"range": [0, 100_000]}}}
document = sweeps.document({"jobs": entry}, Path())
before, began = psutil.Process().memory_info().rss, time.process_time()
prepared = sweeps.prepare(document, references.Resolver(Path()))
print(prepared.count, time.process_time() - began, psutil.Process().memory_info().rss - before)
"""


def test_a_hundred_thousand_jobs_are_prepared_in_about_a_second_and_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PREPARE], capture_output=True, text=True, timeout=60, check=True)
    count, seconds, resident = done.stdout.split()
    assert int(count) == 100_000
    # Measured: 0.53 s and 20 MB on one core. Up to a few times as much is a slower or crowded machine.
    assert float(seconds) < 2.4
    assert int(resident) < 40_000_000
