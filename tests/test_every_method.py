"""Every method is asked the same questions.

A method that must answer one differently says so in its own module, `EXEMPT = {question: reason}`, with these words:
`reference`, `deterministic`, `grouping`. Results of different groupings agree to the module's `TOLERANCE` (of an array,
relative to its largest number; of a number, relative or absolute; default 1e-9), all that is not a float exactly.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from netassay import catalogue, job
from netassay.figure import Figure
from netassay.job import Record
from netassay.method import Contract, Failure, Method, MethodError
from netassay.store import artifacts as artifact_store
from netassay.store import storable
from producer import references, sweeps

NAMES = catalogue.names()
QUESTIONS = {"reference", "deterministic", "grouping"}
# Enough jobs to see groups differ, few enough that hundreds of methods stay testable.
JOBS = 4
ADVICE = (
    "If results may differ now, raise VERSION in its module; if only its "
    "EXAMPLE changed, or it is new, that is fine. Then run: python tests/golden/regenerate.py"
)
REGENERATE = Path(__file__).parent / "golden" / "regenerate.py"

every_method = pytest.mark.parametrize("name", NAMES)


def methods_that(may: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """The question is asked of these methods only."""
    return pytest.mark.parametrize("name", [name for name in NAMES if may(catalogue.get(name))])


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with artifact_store.using(tmp_path_factory.mktemp("every-method")):
        yield


def exempt(method: Method, question: str) -> bool:
    return question in getattr(method.module, "EXEMPT", {})


def prepare(method: Method) -> tuple[sweeps.Prepared, references.Resolver]:
    document = sweeps.document(method.example, base=Path(), source=method.name)
    resolver = references.Resolver(document.base, document.networks)
    return sweeps.prepare(document, resolver), resolver


@functools.cache
def examples(name: str) -> tuple[list[Contract], dict[str, str]]:
    """Up to `JOBS` params of one `run_many` call of the example, and the names of their references."""
    method = catalogue.get(name)
    prepared, resolver = prepare(method)
    resolver.commit()
    segment = max((part for part in prepared.segments if part.method == name), key=lambda part: len(part.keys))
    return [method.Params.model_validate_json(text) for text in segment.params[:JOBS]], prepared.names


def end_of(method: Method, params: Contract) -> Contract | Failure:
    try:
        return method.run(params)
    except MethodError as error:
        return Failure.of(error)


@functools.cache
def ends(name: str) -> tuple[list[Contract | Failure], float]:
    """The ends of the example's jobs run one by one, and the seconds the last one took (the first may import)."""
    method = catalogue.get(name)
    found = []
    seconds = 0.0
    for params in examples(name)[0]:
        began = time.perf_counter()
        found.append(end_of(method, params))
        seconds = time.perf_counter() - began
    return found, seconds


def stored(end: Contract | Failure) -> dict[str, Any]:
    if isinstance(end, Failure):
        return {"cause": end.cause, "message": end.message}
    return storable.load(storable.dump(end.model_dump()))


def records(name: str) -> list[Record]:
    method = catalogue.get(name)
    made = []
    for number, (params, end) in enumerate(zip(examples(name)[0], ends(name)[0], strict=True), 1):
        failed = isinstance(end, Failure)
        state = "done" if not failed else "not_applicable" if end.cause == "not_applicable" else "failed"
        made.append(
            Record(
                id=number,
                key=job.key(method, params),
                method=name,
                version=method.version,
                params=json.loads(job.canonical(params)),
                state=state,
                result=None if failed else stored(end),
                cause=end.cause if failed else "",
                message=end.message if failed else "",
                seconds=0.1,
                names=examples(name)[1],
            )
        )
    return made


def differences(a: Any, b: Any, tolerance: float, path: str = "") -> list[str]:
    """Where two stored values differ by more than `tolerance`, relative to the largest number of the field."""
    if storable.is_array(a) and storable.is_array(b):
        first, second = storable.load_array(a), storable.load_array(b)
        if first.shape != second.shape or first.dtype != second.dtype:
            return [f"{path}: {first.dtype}{first.shape} and {second.dtype}{second.shape}"]
        if first.dtype.kind not in "fc":
            return [] if np.array_equal(first, second) else [f"{path}: arrays differ"]
        scale = np.abs(first[np.isfinite(first)]).max(initial=0.0)
        same = np.allclose(first, second, rtol=0.0, atol=tolerance * scale, equal_nan=True)
        return [] if same else [f"{path}: arrays differ by {np.nanmax(np.abs(first - second))}"]
    if isinstance(a, float) and isinstance(b, float):
        close = a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        return [] if close else [f"{path}: {a!r} and {b!r}"]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [wrong for key in a for wrong in differences(a[key], b[key], tolerance, f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            wrong
            for place, (x, y) in enumerate(zip(a, b, strict=True))
            for wrong in differences(x, y, tolerance, f"{path}.{place}")
        ]
    return [] if a == b and type(a) is type(b) else [f"{path}: {a!r} and {b!r}"]


# --- what it says of itself -------------------------------------------------------------------------------------------


@every_method
def test_true_and_false_are_no_numbers_of_its_params(name: str) -> None:
    params = catalogue.get(name).Params
    numbers = [field for field, about in params.model_fields.items() if about.annotation in (int, float)]
    with pytest.raises(ValidationError) as caught:
        params.model_validate({**dict.fromkeys(numbers, True), "surely no field": 0})
    told = {one["loc"][0] for one in caught.value.errors() if one["msg"].endswith("is true, must be a number")}
    assert told == set(numbers)


@every_method
def test_docstring_claims_defines_prices_and_refers(name: str) -> None:
    method = catalogue.get(name)
    lines = method.doc.splitlines()
    assert method.claim.endswith("."), f"{name}: the docstring's first line is the claim, one sentence with a full stop"
    assert len(lines) > 1, f"{name}: the docstring must go on below its claim"
    assert lines[1] == "", f"{name}: leave a line free below the claim"
    assert any(line.startswith("    ") and line.strip() for line in lines), (
        f"{name}: show the formula or definition, indented"
    )
    assert re.search(r"\bCost\b", method.doc), f"{name}: say what it costs in the size of the input (`Cost: ...`)"
    if not exempt(method, "reference"):
        reference = re.search(r"^References?:(.*)", method.doc, re.MULTILINE | re.DOTALL)
        assert reference, f"{name}: end the docstring with `Reference: authors. title. year.`"
        assert re.search(r"\b(1[89]|20)\d\d\b", reference[1]), f"{name}: the reference has no year"


@every_method
def test_exemptions_are_known_and_have_reasons(name: str) -> None:
    declared = getattr(catalogue.get(name).module, "EXEMPT", {})
    assert set(declared) <= QUESTIONS, f"{name}: exempt from what nobody asks: {set(declared) - QUESTIONS}"
    assert all(len(reason.split()) >= 3 for reason in declared.values()), f"{name}: say why it is exempt"


@every_method
def test_params_and_result_are_frozen_and_closed(name: str) -> None:
    method = catalogue.get(name)
    for contract in (method.Params, method.Result):
        assert issubclass(contract, Contract), f"{name}: {contract.__name__} must be a netassay.method.Contract"
        assert contract.model_config["frozen"], f"{name}: {contract.__name__} must be frozen"
        assert contract.model_config["extra"] == "forbid", f"{name}: {contract.__name__} must forbid unknown fields"
    assert isinstance(method.version, int), f"{name}: VERSION must be an int"
    assert method.version >= 1, f"{name}: VERSION starts at 1"


@every_method
def test_every_parameter_is_described_or_bounded(name: str) -> None:
    method = catalogue.get(name)
    schemas = method.Params.model_json_schema()["properties"]
    for field, about in method.Params.model_fields.items():
        # Bounds and descriptions of the named types stand in the field's metadata or, within a union, in its schema.
        parts = [schemas[field], *schemas[field].get("anyOf", ())]
        bounded = about.metadata or any(
            {"description", "minimum", "exclusiveMinimum", "enum"} & set(part) for part in parts
        )
        told = re.search(rf"\b{field}\b", f"{method.doc} {method.Params.__doc__ or ''}")
        assert bounded or told, (
            f"{name}: {field} has neither bounds nor a word on what it is; give it a type of netassay.fields, a "
            "docstring below it, or a place in the module's docstring"
        )


@every_method
def test_nan_is_refused_in_every_number(name: str) -> None:
    method = catalogue.get(name)
    good = json.loads(job.canonical(examples(name)[0][0]))
    for field, schema in method.Params.model_json_schema()["properties"].items():
        kinds = {part.get("type") for part in [schema, *schema.get("anyOf", ())]}
        if not kinds & {"number", "integer"}:
            continue
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError):  # pydantic's ValidationError is one
                job.canonical(method.Params.model_validate(good | {field: value}))


# --- its example ------------------------------------------------------------------------------------------------------


@every_method
def test_example_prepares_and_stores_nothing_before_commit(name: str, tmp_path: Path) -> None:
    with artifact_store.using(tmp_path / "artifacts") as store:
        prepared, _ = prepare(catalogue.get(name))
    assert any(segment.method == name for segment in prepared.segments), f"{name}: its EXAMPLE has no job of it"
    assert not prepared.errors
    assert not prepared.duplicates, f"{name}: its EXAMPLE names a job twice"
    assert not store.folder.exists()


@every_method
def test_stored_params_validate_to_the_same_key(name: str) -> None:
    method = catalogue.get(name)
    prepared, resolver = prepare(method)
    resolver.commit()
    for segment in prepared.segments:
        if segment.method == name:
            for text, key in zip(segment.params[:20], segment.keys, strict=False):
                assert job.key(method, method.Params.model_validate_json(text)) == key.hex()


@every_method
def test_needs_are_sensible(name: str) -> None:
    method = catalogue.get(name)
    for params in examples(name)[0]:
        needs = method.needs(params)
        assert 0 < needs.seconds < 3600, f"{name}: predicts {needs.seconds} s for one job of its EXAMPLE"
        assert needs.group >= 1
        assert needs.memory is None or needs.memory > 0
        assert method.run_many is not None or needs.group == 1, f"{name}: a group of {needs.group}, but no run_many"


@every_method
def test_example_runs_in_seconds_and_its_results_are_storable(name: str) -> None:
    method = catalogue.get(name)
    found, seconds = ends(name)
    assert seconds < 20, f"{name}: one job of its EXAMPLE took {seconds:.1f} s; make the EXAMPLE smaller"
    assert any(isinstance(end, method.Result) for end in found), f"{name}: no job of its EXAMPLE gives a Result"
    for end in found:
        assert isinstance(end, method.Result | Failure), f"{name}: run returned a {type(end).__name__}"
        text = storable.dump(stored(end))
        json.loads(text, parse_constant=pytest.fail)
        assert storable.dump(storable.load(text)) == text


@methods_that(lambda method: not exempt(method, "deterministic"))
def test_the_same_params_give_the_same_result(name: str) -> None:
    method = catalogue.get(name)
    params = examples(name)[0][0]
    assert storable.dump(stored(end_of(method, params))) == storable.dump(stored(ends(name)[0][0]))


@methods_that(lambda method: not exempt(method, "deterministic"))
def test_the_golden_result_of_the_example_stands(name: str) -> None:
    """To 1e-6, or to the module's `GOLDEN_TOLERANCE` where training or chaos magnifies the last bit of a processor."""
    method = catalogue.get(name)
    kept = json.loads((REGENERATE.parent / "results.json").read_text())
    if name not in kept:
        assert all(isinstance(end, Failure) for end in ends(name)[0]), f"{name} has no golden result; {ADVICE}"
        return
    spec = importlib.util.spec_from_file_location("regenerate", REGENERATE)
    assert spec is not None
    assert spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    examples(name)  # keeps the recipes that the params refer to
    end = method.run(method.Params.model_validate_json(kept[name]["params"]))
    wrong = differences(
        kept[name]["result"], golden.outline(stored(end)), getattr(method.module, "GOLDEN_TOLERANCE", 1e-6)
    )
    assert not wrong, f"{name}: {'; '.join(wrong)}. {ADVICE}"


@methods_that(lambda method: method.run_many is not None and not exempt(method, "grouping"))
def test_results_do_not_depend_on_order_or_grouping(name: str) -> None:
    method = catalogue.get(name)
    assert method.run_many is not None
    tolerance = getattr(method.module, "TOLERANCE", 1e-9)
    many = examples(name)[0]
    alone = [stored(end) for end in ends(name)[0]]
    order = list(range(len(many)))
    random.Random(0).shuffle(order)
    for size in {1, max(1, len(many) - 1), len(many)}:
        for start in range(0, len(order), size):
            places = order[start : start + size]
            together = method.run_many([many[place] for place in places])
            assert len(together) == len(places), f"{name}: run_many must return one end for each of its params"
            for place, end in zip(places, together, strict=True):
                wrong = differences(alone[place], stored(end), tolerance)
                assert not wrong, f"{name}: job {place} in a group of {size} differs from run: {'; '.join(wrong)}"


# --- its plot ---------------------------------------------------------------------------------------------------------


@methods_that(lambda method: method.plot is not None)
def test_plot_is_plain_data_of_any_records(name: str) -> None:
    method = catalogue.get(name)
    assert method.plot is not None
    made = records(name)
    failed = Record(
        id=99, key="0" * 32, method=name, version=method.version, params=made[0].params, state="failed", cause="time",
        message="ran longer than 1 s", names=made[0].names,
    )  # fmt: skip
    pending = Record(id=98, key="1" * 32, method=name, version=method.version, params=made[0].params, state="pending")
    done = [record for record in made if record.state == "done"]
    for chosen in (made, done[:1], [*made, failed, pending], [failed]):
        figure = method.plot(chosen)
        assert isinstance(figure, Figure), f"{name}: plot must return a netassay.figure.Figure"
        json.dumps(figure.model_dump(mode="json"), allow_nan=False)


# --- light, and the same in every process -----------------------------------------------------------------------------


def keys_in_a_fresh_process(hash_seed: str) -> dict[str, Any]:
    """Keys of all examples, computed where torch and its like cannot be imported."""
    command = [
        sys.executable,
        str(REGENERATE),
        "--print",
        "--block",
        "torch,sklearn,pandas,scipy,onnxruntime,matplotlib",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"without torch, a method cannot be listed or its example prepared:\n{done.stderr}"
    return json.loads(done.stdout)


def test_keys_are_the_same_in_every_process_and_need_no_torch() -> None:
    first, second = keys_in_a_fresh_process("1"), keys_in_a_fresh_process("2")
    assert set(first) == set(NAMES)
    assert first == second
    for name in NAMES:
        segment = next(part for part in prepare(catalogue.get(name))[0].segments if part.method == name)
        assert first[name]["key"] == segment.keys[0].hex()


def test_importing_all_that_submits_loads_no_heavy_library() -> None:
    script = (
        "import sys; from netassay import catalogue; import producer.sweeps\n"
        "for name in catalogue.names(): catalogue.get(name)\n"
        "print(*sorted({'torch', 'sklearn', 'pandas', 'scipy', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
