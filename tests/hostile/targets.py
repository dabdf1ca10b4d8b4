"""The readers under test: of each, valid inputs, how they are mutated, and the call that reads them.

What a reader may do with hostile input: read it, or raise an error that is for the person at the keyboard. A target
that a check of a promise needs more time or memory for says so.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import pickle
import random as randomness
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import yaml
from onnx import TensorProto, helper, numpy_helper
from pyarrow import parquet

from hostile import mutations
from netassay import data, vnnlib
from netassay.data import files
from netassay.errors import UserError
from netassay.job import key_of
from netassay.networks import onnx_file, recipes
from netassay.store import artifacts, reading, running, submission, transfer
from netassay.store.arriving import Particulars
from netassay.store.database import Database
from netassay.store.running import Outcome
from producer import readers, sweeps
from producer.references import Resolver

Random = randomness.Random
#: Rows of a document that are validated here: a million valid rows are no fault, and take long.
MOST_ROWS = 3_000


@dataclass(frozen=True)
class Target:
    """suffix: of the file that is read. make: a mutated input. read: returns normally for what it accepts.

    names_files: the input names other files. memory: bytes that reading one input may take at its peak.
    """

    name: str
    suffix: str
    make: Callable[[Random], bytes]
    read: Callable[[Path], None]
    names_files: bool = False
    memory: int = 512 << 20


# --- sweeps and rows --------------------------------------------------------------------------------------------------

SWEEPS: list[dict[str, Any]] = [
    {"name": "a", "jobs": [{"method": "diagnostics.echo", "params": {"tag": 1}, "grid": {"value": {"range": [0, 9]}}}]},
    {
        "networks": {"n": "valid.onnx", "r": {"recipe": {"dataset": "digits", "training": {"kind": "ibp"}}}},
        "datasets": {"moons": {"generator": "two_moons", "noise": 0.1}, "mine": {"file": "valid.csv", "label": "c"}},
        "jobs": [
            {
                "method": "verification.certify",
                "params": {"dataset": "digits", "network": "r"},
                "grid": {"index": [0, 1], "radius": {"linspace": [0.01, 0.1, 3]}},
                "limits": {"seconds": 60, "memory": "1GB"},
            },
            {"method": "networks.train", "params": {"recipe": {"dataset": "moons"}}},
            {"method": "networks.describe", "grid": {"network": {"glob": "*.onnx"}}},
        ],
    },
    {
        "jobs": [
            {
                "method": "diagnostics.echo",
                "rows": "valid.jsonl",
                "zip": {"log": ["", "x"]},
                "random": {"count": 3, "seed": 1, "draw": {"value": {"log_uniform": [1e-4, 1e-1]}}},
            },
            {"method": "verification.verify", "params": {"network": "n", "property": "valid.vnnlib"}},
        ],
        "networks": {"n": "valid.onnx"},
    },
]
ROWS: list[Any] = [
    {"value": 1, "tag": 2, "method": "diagnostics.echo"},
    {"method": "diagnostics.sleep", "params": {"seconds": 0.1}, "limits": {"seconds": 1, "memory": "1MB"}},
    {"value": "x", "tag": 3, "limits.seconds": 5},
]


def _yaml(random: Random) -> bytes:
    document = mutations.tree(random, random.choice((*SWEEPS, ROWS)))
    try:
        dumper = yaml.SafeDumper if random.randrange(4) else yaml.CSafeDumper
        text = yaml.dump(document, Dumper=dumper, default_flow_style=random.choice((None, True, False)))
    except (RecursionError, yaml.YAMLError, ValueError):
        text = "[" * random.choice((90, 5000)) + "1"
    if random.randrange(2):
        text = mutations.lines(random, text, (*mutations.YAML_LINES, *mutations.TEXTS))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):
        return '{"a":' * 3000 + "1" + "}" * 3000


def _json(random: Random) -> bytes:
    text = _dumped(mutations.tree(random, random.choice((*SWEEPS, ROWS))))
    if random.randrange(4) == 0:
        text = mutations.lines(random, text, ('{"a":1,"a":2}', "NaN", "-Infinity", "[", "1e99999", '"\\ud800"', "//"))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


def _json_lines(random: Random) -> bytes:
    rows = mutations.tree(random, ROWS)
    found = [_dumped(row) for row in (rows if isinstance(rows, list) else [rows])]
    text = mutations.lines(random, "\n".join(found) + "\n", ("{}", "[]", '{"value":NaN}', "{", "\x00", '{"a":1,"a":1}'))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


_CELLS = ("1", "x", '"a,b"', '"', '""', "1e5", "nan", "[1,2]", "{a: b}", "{recipe: {dataset: digits}}", "'2'", "~")
_RADIUS = "{recipe: {dataset: digits}},digits,0,0.1,verification.certify"
_TABLES = (
    "method,value,tag,limits.seconds,limits.memory\ndiagnostics.echo,1,2,5,1GB\ndiagnostics.echo,x,3,,\n",
    "value;tag\n1;2\n'x';3\n",
    "value\ttag\n1\t2\n",
    "valid.onnx,valid.vnnlib,116\nvalid.onnx,valid.vnnlib,1\n",
    f"network,dataset,index,radius,method\n{_RADIUS}\n{_RADIUS}\n",
)


def _csv(random: Random) -> bytes:
    text = mutations.lines(random, random.choice(_TABLES), (*_CELLS, *mutations.TEXTS, ",", ";", ",,,,", "\r"))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


def _instances(random: Random) -> bytes:
    words = (*_CELLS, *mutations.TEXTS, "valid.onnx", "../outside/secret", "valid.vnnlib", ",", "116", "-1", "1e400")
    return mutations.lines(random, _TABLES[3], words).encode("utf-8", "surrogatepass")


def _read_sweep(path: Path) -> None:
    method = "" if path.name.endswith("instances.csv") else "diagnostics.echo"
    document = readers.read([path], method=method)
    if sum(entry.rows for entry in document.jobs) <= MOST_ROWS:
        store = artifacts.Artifacts(path.parent / "artifacts")
        resolver = Resolver(document.base, document.networks, store, datasets=document.datasets)
        sweeps.prepare(document, resolver)


# --- datasets ---------------------------------------------------------------------------------------------------------

_DATASETS = (
    "a,b,c\n" + "".join(f"{i}.5,{i * i},{'xyz'[i % 3]}\n" for i in range(12)),
    "a,c\n1,0\n2,1\n3,0\n4,1\n",
    '"a b","c ""d"""\n1e3,u\n-0.0,v\n3,u\n',
)


def _dataset_csv(random: Random) -> bytes:
    text = mutations.lines(random, random.choice(_DATASETS), (*_CELLS, *mutations.TEXTS, ",", "c,c,c", "9" * 400))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.octets(random, raw) if random.randrange(3) == 0 else raw


class Canary:
    """Unpickling one leaves a file, which the watch reports."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch CANARY",)


def _npy(random: Random, array: np.ndarray) -> bytes:
    """An array in NumPy's format, mostly with a header that lies."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    whole = buffer.getvalue()
    if random.randrange(3) == 0:
        return whole
    shape: Any = random.choice((
        array.shape, (2**62, 2), (10**12,), (), (0,), (-1, 2), (2**31, 2**31), (0, 2**62), (1,) * 70, (2**28,), "x",
        (10, -1), (1.5,), None, (True,), [3], (2**28, 1), (6, 0), (0, 3),
    ))  # fmt: skip
    kind: Any = random.choice((
        "<f4", "<f8", ">f8", "|O", "<i8", "<U5", "|S3", "<c16", "|V8", "<M8[s]", "<f2", "<U100000000", "|b1", "u8",
        [("a", "<f4")], [("a", "|O")], "x", [("a", "<f4", (10**9,))], "<V0", "<U0", 7, None, ("<f4", (2, 2)),
    ))  # fmt: skip
    header = random.choice((
        repr({"descr": kind, "fortran_order": random.choice((True, False, 1, "x")), "shape": shape}),
        "{'descr': __import__('os').system('touch CANARY'), 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 3000 + ")}",
        "[" * 500, "{}", "(" * 95 + ")" * 95, "{'shape': (3,)}", "-" * 9000 + "1",
    ))  # fmt: skip
    raw = header.encode("latin1", "replace") + b" " * 20 + b"\n"
    version = random.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", min(len(raw), 65535))
    if random.randrange(8) == 0:
        size = random.choice((b"\xff\xff", b"\xff\xff\xff\xff", b"\0\0"))
    body = random.choice((whole[128:], pickle.dumps(np.array([Canary()]), protocol=2), b""))
    return b"\x93NUMPY" + version + size + raw + body


def _npz(random: Random) -> bytes:
    numbers = np.random.default_rng(random.randrange(100))
    arrays: dict[str, np.ndarray] = {"x": numbers.random((9, 2)).astype("f4"), "y": np.arange(9) % 3}
    if random.randrange(2):
        arrays["class_names"] = np.array(["a", "b", "c"])
    if random.randrange(3) == 0:
        arrays[random.choice(("feature_names", "target", "../x", "y", "labels", "X"))] = random.choice((
            np.array(["u", "v"]), np.array([1.5, np.nan]), np.array(3), np.array([], dtype="U3"), np.ones((9, 2)),
            np.array(["1", "2", "x"] * 3), np.array([True, False, True] * 3), np.full(9, 1e300),
        ))  # fmt: skip
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, array in arrays.items():
            with_suffix = name + random.choice((".npy",) * 8 + ("", ".NPY", ".npy/", "\x00.npy"))
            archive.writestr(with_suffix, _npy(random, array))
        if random.randrange(8) == 0:
            archive.writestr(random.choice(("x.npy", "y.npy", "../outside/secret", "/etc/passwd")), _npy(random, array))
    raw = buffer.getvalue()
    return mutations.octets(random, raw) if random.randrange(3) == 0 else raw


def _parquet(random: Random) -> bytes:
    rows = random.choice((1, 6, 30))
    columns: list[Callable[[], Any]] = [
        lambda: pa.array([i / 3 for i in range(rows)]),
        lambda: pa.array([i % 3 for i in range(rows)]),
        lambda: pa.array(["abc"[i % 3] for i in range(rows)]),
        lambda: pa.array(["abc"[i % 3] for i in range(rows)]).dictionary_encode(),
        lambda: pa.array([None] * rows, pa.int64()),
        lambda: pa.nulls(rows),
        lambda: pa.array([[1, 2]] * rows),
        lambda: pa.array([{"a": 1}] * rows),
        lambda: pa.array([b"\xff\x00"] * rows),
        lambda: pa.array([2**40] * rows, pa.timestamp("ns")),
        lambda: pa.array([None, float("nan"), float("inf")][:rows] + [1.0] * (rows - 3), pa.float32()),
        lambda: pa.array([True] * rows),
        lambda: pa.array([1] * rows, pa.decimal128(38, 10)),
        lambda: pa.array([1] * rows, pa.uint64()),
        lambda: pa.array([3] * rows, pa.duration("us")),
        lambda: pa.array([10**6] * rows, pa.time64("us")),
        lambda: pa.array(["x" * 100_000] * rows),
        lambda: pa.array(["1", "x"] * (rows // 2) + ["2"] * (rows % 2)),
    ]
    chosen = [random.choice(columns)() for _ in range(random.randint(1, 4))]
    names = [random.choice(("a", "b", "c", "", "\x1b", "x" * 300)) for _ in chosen]
    if random.randrange(2):
        chosen, names = [columns[0](), columns[1](), columns[2]()], ["a", "b", "c"]
    buffer = io.BytesIO()
    schema = pa.schema([pa.field(name, array.type) for name, array in zip(names, chosen, strict=True)])
    parquet.write_table(
        pa.Table.from_arrays(chosen, schema=schema.with_metadata({"pandas": "{", "ARROW:schema": "x"})),
        buffer,
        compression=random.choice(("none", "snappy", "gzip", "zstd", "lz4", "brotli")),
        use_dictionary=bool(random.randrange(2)),
        data_page_version=random.choice(("1.0", "2.0")),
        store_schema=bool(random.randrange(2)),
    )
    raw = buffer.getvalue()
    return mutations.octets(random, raw) if random.randrange(4) else raw


def _read_dataset(path: Path) -> None:
    table = files.read(path, files.File(file=path.name))
    content = files.content(table)
    files.facts(content)
    files.load(content)


def _kept(random: Random) -> bytes:
    """What a stranger's export may bring in as a dataset's artifact."""
    if random.randrange(3) == 0:
        return _npz(random)
    table = files.Table(np.ones((6, 2)), np.arange(6) % 2, ("u", "v"), ("a", "b"))
    raw = files.content(table)
    if random.randrange(2):
        shape = random.choice((b"()", b"(6,)", b"(9)", b"(1 2)", b"(007, 2)", b"(,)", b"(" + b"9" * 60 + b", 2)"))
        raw = raw.replace(b"(6, 2)", shape[:6].ljust(6) if random.randrange(2) else shape)
    return mutations.octets(random, raw)


def _read_kept(path: Path) -> None:
    content = path.read_bytes()
    files.facts(content)
    files.load(content)


def _text_artifact(random: Random) -> bytes:
    generator = {"generator": "blobs", "samples": 60, "seed": 0, "classes": 3, "dimension": 2}
    recipe = {"dataset": "digits", "seed": 0, "architecture": {"kind": "mlp", "hidden": [8]}, "epochs": 1, "batch": 4,
              "learning_rate": 0.1, "weight_decay": 0, "training": {"kind": "standard"}}  # fmt: skip
    text = _dumped(mutations.tree(random, random.choice((generator, recipe))))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.octets(random, raw) if random.randrange(4) == 0 else raw


def _read_generator(path: Path) -> None:
    data.facts_of("generator:" + "0" * 64, path.read_bytes())


def _read_recipe(path: Path) -> None:
    with artifacts.using(path.parent / "artifacts") as kept:
        recipes.from_reference("recipe:" + kept.put(path.read_bytes()))


# --- networks ---------------------------------------------------------------------------------------------------------


def _net(nodes: Sequence[Any], shape: Sequence[Any], constants: dict[str, Any], out: Sequence[Any]) -> Any:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "g",
        [info("x", TensorProto.FLOAT, list(shape))],
        [info("y", TensorProto.FLOAT, list(out))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@functools.cache
def networks() -> list[Any]:
    """Valid models, of all operators that are read."""
    node = helper.make_node
    f = np.float32
    return [
        _net(
            [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["i"]), node("Relu", ["i"], ["y"])],
            ["batch", 3],
            {"w": np.ones((3, 2), f), "b": np.ones(2, f)},
            ["batch", 2],
        ),
        _net(
            [
                node("Conv", ["x", "k", "c"], ["h"], pads=[1, 1, 1, 1], strides=[1, 1], kernel_shape=[3, 3]),
                node("BatchNormalization", ["h", "s", "s", "s", "s"], ["i"]),
                node("Relu", ["i"], ["j"]),
                node("Flatten", ["j"], ["l"]),
                node("Gemm", ["l", "w", "b"], ["y"], transB=1),
            ],
            [1, 1, 4, 4],
            {
                "k": np.ones((2, 1, 3, 3), f),
                "c": np.ones(2, f),
                "s": np.ones(2, f),
                "w": np.ones((3, 32), f),
                "b": np.ones(3, f),
            },
            [1, 3],
        ),
        _net(
            [
                node("Shape", ["x"], ["n"]),
                node("Gather", ["n", "zero"], ["first"]),
                node("Unsqueeze", ["first", "zeros"], ["one"]),
                node("Concat", ["one", "rest"], ["shape"], axis=0),
                node("Reshape", ["x", "shape"], ["h"]),
                node("Transpose", ["h"], ["i"], perm=[0, 1]),
                node("Sub", ["i", "c"], ["j"]),
                node("Div", ["j", "d"], ["k"]),
                node("Constant", [], ["e"], value=numpy_helper.from_array(np.ones(4, f))),
                node("Mul", ["k", "e"], ["l"]),
                node("Slice", ["c", "zeros", "ones"], ["p"]),
                node("Cast", ["p"], ["q"], to=1),
                node("Identity", ["l"], ["m"]),
                node("Dropout", ["m"], ["y"]),
            ],
            ["batch", 2, 2],
            {
                "zero": np.int64(0),
                "zeros": np.zeros(1, np.int64),
                "ones": np.ones(1, np.int64),
                "rest": np.array([4], np.int64),
                "c": np.ones(4, f),
                "d": np.full(4, 2, f),
            },
            ["batch", 4],
        ),
    ]


_OPERATORS = (
    "If", "Loop", "Scan", "Expand", "Tile", "ConstantOfShape", "Pad", "Concat", "Gather", "Reshape", "Add", "Sigmoid",
    "Custom", "Identity", "Squeeze", "Unsqueeze", "Slice", "Cast", "MatMul", "Range", "StringNormalizer", "Transpose",
)  # fmt: skip


def _external(random: Random, tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    place = random.choice((
        "../outside/secret", "outside-link", "outside-dir/secret", "/etc/passwd", "valid.bin", "../../../etc/passwd",
        "fifo", ".", "", "a\x00b", "valid.bin/../../outside/secret", "/dev/zero", "/proc/self/environ", "x" * 5000,
        "hard-link", "inside/../valid.bin", "..\\outside\\secret",
    ))  # fmt: skip
    for key, value in (
        ("location", place),
        ("offset", random.choice(("", "0", "-1", "4", "9" * 30, "x"))),
        ("length", random.choice(("", "0", "-1", "24", "9" * 30, "1e3"))),
        (random.choice(("checksum", "__class__", "basepath")), "../outside"),
    ):
        if value or random.randrange(3) == 0:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value


def _messages(proto: Any, found: list[Any], deep: int = 0) -> list[Any]:
    found.append(proto)
    for field, value in proto.ListFields():
        if field.type == field.TYPE_MESSAGE and deep < 8:
            for item in value if field.is_repeated else [value]:
                _messages(item, found, deep + 1)
    return found


def _change(random: Random, proto: Any) -> None:
    """Set, double or clear one field of a message, whatever its type."""
    field = random.choice(proto.DESCRIPTOR.fields)
    texts, numbers = (*mutations.TEXTS, "x", "y", "h", "w", *_OPERATORS), mutations.NUMBERS
    whole = [int(n) for n in numbers if isinstance(n, int) and -(2**63) <= n < 2**63]
    makers: dict[int, Callable[[], Any]] = {
        field.TYPE_STRING: lambda: random.choice(texts).encode("utf-8", "replace").decode(),
        field.TYPE_BYTES: lambda: random.choice((b"", b"\xff" * 9, b"x" * 100, bytes(8))),
        field.TYPE_INT64: lambda: random.choice(whole),
        field.TYPE_INT32: lambda: random.choice([n for n in whole if -(2**31) <= n < 2**31]),
        field.TYPE_UINT64: lambda: random.choice([n for n in whole if n >= 0]),
        field.TYPE_FLOAT: lambda: float(random.choice([n for n in numbers if abs(n) < 1e30 or n != n])),
        field.TYPE_DOUBLE: lambda: float(random.choice([n for n in numbers if n < 10**300])),
        field.TYPE_ENUM: lambda: random.choice([*field.enum_type.values_by_number]),
    }
    if random.randrange(4) == 0:
        proto.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        if field.is_repeated:
            items = getattr(proto, field.name)
            if len(items) and random.randrange(3):
                items.add().CopyFrom(random.choice(items))
            elif len(items):
                del items[random.randrange(len(items))]
            else:
                items.add()
        else:
            getattr(proto, field.name).SetInParent()
    elif make := makers.get(field.type):
        if field.is_repeated:
            items = getattr(proto, field.name)
            items.extend([make() for _ in range(random.choice((1, 3, 200)))])
            if len(items) > 1 and random.randrange(2):
                items[random.randrange(len(items))] = make()
        else:
            setattr(proto, field.name, make())


def _network(random: Random) -> bytes:
    proto = onnx.ModelProto()
    proto.CopyFrom(random.choice(networks()))
    for _ in range(random.randint(0, 4)):
        match random.randrange(7):
            case 0 if len(proto.graph.initializer):
                _external(random, random.choice(proto.graph.initializer))
            case 1:  # operators in a row, each reading what is there
                names = [o for node in proto.graph.node for o in node.output] + ["x", "w", "b", "c", ""]
                for number in range(random.choice((1, 5, 60))):
                    made = proto.graph.node.add()
                    made.op_type = random.choice(_OPERATORS)
                    chosen = f"n{number}"
                    made.input.extend([random.choice(names[-3:]) for _ in range(random.randint(1, 3))])
                    made.output.append(chosen)
                    names.append(chosen)
                if random.randrange(2) and len(proto.graph.output):
                    proto.graph.output[0].name = names[-1]
            case 2 if len(proto.graph.node) > 1:  # a ring
                first, last = proto.graph.node[0], proto.graph.node[-1]
                if len(first.input) and len(last.output):
                    first.input[0] = last.output[0]
            case 3 if len(proto.graph.initializer):
                tensor = random.choice(proto.graph.initializer)
                tensor.dims[:] = random.choice(
                    ([2**62], [-1], [0, 2**40], [2**31, 2**31], [10**9, 10**9], [1] * 200, [])
                )
            case _:
                _change(random, random.choice(_messages(proto, [])))
    try:
        raw = proto.SerializeToString()
    except Exception:  # text that is not UTF-8
        raw = networks()[0].SerializeToString()
    if random.randrange(6) == 0:
        return mutations.packed(random, raw)
    return mutations.octets(random, raw) if random.randrange(4) == 0 else raw


def _read_network(path: Path) -> None:
    raw = onnx_file.from_file(path)
    try:
        onnx_file.check(raw, analysable=False)
    finally:
        onnx_file.check(raw, analysable=True)
    if SECRET in raw:
        raise AssertionError("bytes of a file outside were folded into the network")


#: What stands in the files that nobody may read.
SECRET = b"of nobody's business"


# --- properties -------------------------------------------------------------------------------------------------------

_PROPERTIES = (
    "; a comment\n(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const X_2 Real)\n"
    "(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n(assert (<= X_2 0))\n"
    "(assert (>= X_2 0))\n(assert (<= X_0 0.5))\n(assert (>= X_0 -0.5))\n(assert (<= X_1 1e-3))\n"
    "(assert (>= X_1 0))\n(assert (or (and (<= Y_0 Y_1)) (and (>= Y_0 3.5) (<= (* 2 Y_1) (+ Y_0 1)))))\n",
    "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 0))"
    " (and (>= X_0 2) (<= X_0 3) (>= Y_0 (/ 1 3)))))\n(check-sat)\n",
)


def _property(random: Random) -> bytes:
    words = (
        "(", ")", "(and", "(or", "X_0", "Y_1", "X_999999999", "(assert", "(declare-const", "Real)", "(<= Y_0", "(/",
        "1e300", "1e-300", "1e600", "9" * 399, "0." + "0" * 390 + "1", "(not", "|x|", '"', ";", "(* ",
        "(assert (or" + " (<= Y_0 1)" * 300 + "))", "(" * 101, "(+" + " Y_0" * 300 + ")", "(*" + " 1.5" * 300 + ")",
        "(assert (and (or (<= Y_0 1) (<= Y_1 2)) (or (<= Y_0 3) (<= Y_1 4))))", "(assert (or))", "(assert (and))",
        "(- X_0)", "true", "(vnnlib-version 2.0)", "(/ 1 0)", "NaN", "-", "+", "=", "(= X_0 0.1)",
    )  # fmt: skip
    text = mutations.lines(random, random.choice(_PROPERTIES), words)
    if random.randrange(300) == 0:
        text += "(assert (or (<= Y_0 1) (<= Y_0 2)))\n" * random.choice((5, 16, 40))
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


_PROPERTIES_2 = (
    "; a comment\n(vnnlib-version <2.0>)\n(declare-network f\n (declare-input X float32 [1,3])\n"
    " (declare-output Y float32 [1,2])\n)\n(assert (<= X[0,2] 0.0))\n(assert (>= X[0,2] 0.0))\n"
    "(assert (<= X[0,0] 0.5))\n(assert (>= X[0,0] -0.5))\n(assert (<= X[0,1] 0.001))\n(assert (>= X[0,1] 0.0))\n"
    "(assert (or (and (<= Y[0,0] Y[0,1])) (and (>= Y[0,0] 3.5) (<= (* 2.0 Y[0,1]) (+ Y[0,0] 1.0)))))\n",
    "(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [2]) (declare-output Y real []))\n"
    "(assert (or (and (>= X[0] 0.0) (<= X[0] 1.0) (<= Y 0.0)) (and (>= X[0] 2.0) (<= X[0] 3.0) (>= (- Y 1.0) 0.25))))\n"
    "(assert (== X[1] (- 1.0)))\n",
)


def _property_2(random: Random) -> bytes:
    words = (
        "(", ")", "[", "]", ",", "(and", "(or", "X[0,0]", "X[0]", "Y", "X[-1,0]", "X[0.5]", "X[99999999999999999999]",
        "(assert", "(declare-input Z real [3])", "(declare-hidden H real [3] \"n\")", "(declare-network g", "[1,0]",
        "[]", "(declare-output W float64 [1])", "(equal-to f)", "(isomorphic-to g)", "initialized", "(<= Y[0,0]", "1",
        "9" * 399 + ".0", "9" * 290 + ".0", "0." + "0" * 320 + "1", "1.0e5", "(!= Y 1.0)", "(not", "<2.1>", "<3.0>",
        "<99999999999999999999.0>", "(vnnlib-version", '"', '"\\', ";", "(* ", "(-", "(* X[0] X[0])", "(<= X[0] Y)",
        "(assert (or" + " (<= Y[0,0] 1.0)" * 300 + "))", "(" * 101, "[" * 101, "(+" + " Y" * 300 + ")", "Real", "f",
        "[4294967296,4294967296,4294967296]", "[" + "1," * 500 + "1]", "(*" + " 1.5" * 300 + ")", "(assert (and))",
    )  # fmt: skip
    text = mutations.lines(random, random.choice(_PROPERTIES_2), words)
    raw = text.encode("utf-8", "surrogatepass")
    return mutations.packed(random, mutations.octets(random, raw) if random.randrange(5) == 0 else raw)


def _read_property(path: Path) -> None:
    raw = vnnlib.from_file(path)
    vnnlib.check(raw)
    vnnlib.parse(raw)


# --- exports ----------------------------------------------------------------------------------------------------------


@functools.cache
def _export() -> dict[str, bytes]:
    """The members of a valid export: two batches, records of all states, an attempt, an artifact."""
    import tempfile

    from store_by_hand import drain, jobs, sign_on

    with tempfile.TemporaryDirectory() as folder:
        database, kept = Database(f"sqlite:///{folder}/store.sqlite"), artifacts.Artifacts(Path(folder) / "artifacts")
        database.prepare()
        array = kept.put(b"an array")

        def end(task: Any) -> Outcome:
            number = json.loads(task.params)["n"]
            if number % 3 == 0:
                return Outcome(task.id, "failed", "numerical", "over")
            return Outcome(task.id, "done", result=f'{{"a":"array:{array}","x":{{"float":"nan"}},"n":{number}}}')

        submission.submit(
            database, "first", [jobs(range(4)), jobs(range(3), method="other.one")], {}, Particulars(2.5, "n")
        )
        worker = sign_on(database)
        running.provenance_id(database, "d" * 64, '{"host":"laptop"}')
        drain(database, worker, end)
        submission.submit(database, "second", [jobs(range(3, 9))], {})
        transfer.export(database, kept, Path(folder) / "lab.tar")
        database.dispose()
        with tarfile.open(Path(folder) / "lab.tar") as archive:
            return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def _sealed(members: dict[str, bytes]) -> dict[str, bytes]:
    """With digests that are right again: what a stranger, who can compute digests too, would hand over."""
    manifest = json.loads(members["manifest.json"])
    try:
        for number, head in enumerate(manifest["batches"], 1):
            folder = f"batches/{number:06}"
            segments = [json.loads(x) for x in gzip.decompress(members[f"{folder}/segments.jsonl.gz"]).splitlines()]
            lines = [json.loads(x) for x in gzip.decompress(members[f"{folder}/jobs.jsonl.gz"]).splitlines()]
            hasher = hashlib.blake2b(digest_size=16)
            for segment in segments:
                for job in lines[segment["start"] : segment["stop"]]:
                    job["key"] = key_of(segment["method"], segment["version"], job["params"]).hex()
                    hasher.update(bytes.fromhex(job["key"]))
            packed = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines), 1)
            members[f"{folder}/jobs.jsonl.gz"] = packed
            head["digest"], head["size"] = hasher.hexdigest(), len(lines)
    except Exception:  # what was mutated is too far from an export for that
        pass
    if isinstance(manifest, dict) and isinstance(manifest.get("members"), dict):
        manifest["members"] = {name: hashlib.sha256(members[name]).hexdigest()
                               for name in members if name.endswith(".gz")}  # fmt: skip
    members["manifest.json"] = json.dumps(manifest).encode()
    members["manifest.sha256"] = hashlib.sha256(members["manifest.json"]).hexdigest().encode()
    return members


def _archive(random: Random) -> bytes:
    members = dict(_export())
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(members))
        match random.randrange(5):
            case 0 if name.endswith(".gz"):
                members[name] = mutations.octets(random, members[name])
            case 1 if name == "manifest.json" or random.randrange(3) == 0:
                members["manifest.json"] = _dumped(
                    mutations.tree(random, json.loads(members["manifest.json"]))
                ).encode("utf-8", "surrogatepass")  # fmt: skip
            case _ if name.endswith(".gz"):
                try:
                    lines = [json.loads(line) for line in gzip.decompress(members[name]).splitlines()]
                except Exception:  # mutated before
                    continue
                changed = mutations.tree(random, lines)
                text = "\n".join(map(_dumped, changed if isinstance(changed, list) else [changed])) + "\n"
                members[name] = gzip.compress(text.encode("utf-8", "surrogatepass"), 1)
                if random.randrange(12) == 0:
                    members[name] += mutations.BOMB
    if random.randrange(4):
        try:
            members = _sealed(members)
        except Exception:  # a manifest that is no JSON any more
            members["manifest.sha256"] = hashlib.sha256(members["manifest.json"]).hexdigest().encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as out:
        items = list(members.items())
        if random.randrange(8) == 0:
            random.shuffle(items)
        for name, body in items:
            about = tarfile.TarInfo(name)
            about.size = len(body)
            if random.randrange(40) == 0:
                about.name = random.choice(
                    ("../outside/secret", "/tmp/x", "artifacts/..", f"artifacts/{'g' * 64}", "a")
                )
            if random.randrange(40) == 0:
                about.type = random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
                                            tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE, b"Z"))  # fmt: skip
                about.linkname = random.choice(("../outside/secret", "/etc/passwd", name))
            out.addfile(about, io.BytesIO(body))
    raw = buffer.getvalue()
    return mutations.octets(random, raw) if random.randrange(5) == 0 else raw


class _Store:
    """The store of the next import. What is taken in stays, so there is a new one now and then."""

    database: Database | None = None
    used = number = 0

    @classmethod
    def next(cls, folder: Path) -> Database:
        if cls.database is None or cls.used >= 60:
            if cls.database is not None:
                cls.database.dispose()
            cls.number, cls.used = cls.number + 1, 0
            cls.database = Database(f"sqlite:///{folder}/store-{cls.number}.sqlite")
            cls.database.prepare()
        return cls.database


def _read_archive(path: Path) -> None:
    database = _Store.next(path.parent)
    brought = transfer.bring(database, artifacts.Artifacts(path.parent / "artifacts"), path, rename="-2")
    _Store.used += 1
    if brought.batches:  # and whoever reads what came in gets it whole
        for batch in reading.batches(database):
            list(reading.records(database, batch.name))


# --- all of them ------------------------------------------------------------------------------------------------------

TARGETS = {
    target.name: target
    for target in (
        Target("sweep-yaml", ".yaml", _yaml, _read_sweep, names_files=True),
        Target("sweep-json", ".json", _json, _read_sweep, names_files=True),
        Target("rows-jsonl", ".jsonl", _json_lines, _read_sweep, names_files=True),
        Target("rows-csv", ".csv", _csv, _read_sweep, names_files=True),
        Target("instances", "-instances.csv", _instances, _read_sweep, names_files=True),
        Target("unnamed", "", lambda random: random.choice((_yaml, _json, _json_lines, _csv))(random), _read_sweep,
               names_files=True),
        Target("dataset-csv", ".csv", _dataset_csv, _read_dataset),
        Target("dataset-npz", ".npz", _npz, _read_dataset),
        Target("dataset-parquet", ".parquet", _parquet, _read_dataset),
        Target("dataset-artifact", ".npz", _kept, _read_kept),
        Target("generator-artifact", ".json", _text_artifact, _read_generator),
        Target("recipe-artifact", ".json", _text_artifact, _read_recipe),
        Target("network", ".onnx", _network, _read_network),
        Target("property", ".vnnlib", _property, _read_property),
        Target("export", ".tar", _archive, _read_archive),
    )
}  # fmt: skip
if importlib.util.find_spec("vnnlib"):
    TARGETS["property-2"] = Target("property-2", ".vnnlib", _property_2, _read_property)

#: What a reader may raise: all of them say what is wrong to the person at the keyboard.
FOR_PEOPLE = (UserError,)


def surroundings(folder: Path) -> tuple[Path, Path]:
    """(inside, outside): a folder with valid files that inputs name, and one that nothing may touch."""
    inside, outside = folder / "inside", folder / "outside"
    for one in (inside, outside, inside / "tmp", inside / "artifacts"):
        one.mkdir(parents=True)
    (outside / "secret").write_bytes(SECRET * 10)
    (inside / "outside-link").symlink_to(outside / "secret")
    (inside / "outside-dir").symlink_to(outside)
    (inside / "valid.onnx").write_bytes(networks()[0].SerializeToString())
    (inside / "valid.bin").write_bytes(np.ones(6, np.float32).tobytes())
    (inside / "valid.csv").write_text(_DATASETS[0])
    (inside / "valid.jsonl").write_text('{"tag": 1}\n{"tag": 2}\n')
    (inside / "valid.vnnlib").write_text(_PROPERTIES[0])
    return inside, outside
