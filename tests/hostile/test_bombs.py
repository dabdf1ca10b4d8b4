"""Small inputs that stand for huge ones: refused before anything is made of them."""

from __future__ import annotations

import io
import itertools
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import TensorProto, helper, numpy_helper
from pyarrow import parquet

from hostile import targets
from netassay.data import files
from netassay.errors import UserError
from netassay.networks import onnx_file
from producer import readers
from producer.documents import BadSweep

f = np.float32


def net(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> bytes:
    """A network of one input of 4 numbers that adds the constant called `last`."""
    made = targets._net([*nodes, helper.make_node("Add", ["x", "last"], ["y"])], ["batch", 4], constants, ["batch", 4])
    return made.SerializeToString()


def doubled() -> bytes:
    nodes = [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(45)]
    return net([*nodes, helper.make_node("Identity", ["c45"], ["last"])], c0=np.ones(1 << 10, f))


def repeated() -> bytes:
    node = helper.make_node("Gather", ["data", "places"], ["last"], axis=0)
    return net([node], data=np.ones((1, 1 << 20), f), places=np.zeros(1 << 20, np.int64))


def broadcast() -> bytes:
    node = helper.make_node("Mul", ["a", "b"], ["last"])
    return net([node], a=np.ones((1 << 18, 1), f), b=np.ones((1, 1 << 18), f))


BOMBS: dict[str, Callable[[], bytes]] = {"doubled": doubled, "repeated": repeated, "broadcast": broadcast}

SCRIPT = """
import resource, sys, time
from netassay.networks import onnx_file
import onnx.reference, onnx.checker
held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (held + (1 << 30),) * 2)
try:
    onnx_file.read(open(sys.argv[1], "rb").read())
except onnx_file.NetworkFileError as error:
    assert "too large" in str(error), error
else:
    raise AssertionError("it was read")
"""


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_network_whose_constants_grow_is_refused_within_a_gigabyte(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.onnx"
    path.write_bytes(BOMBS[name]())
    assert path.stat().st_size < 20 << 20
    ended = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_tensor_within_a_node_or_a_function_may_lie_outside_no_more_than_any_other(tmp_path: Path) -> None:
    inside, _ = targets.surroundings(tmp_path)
    tensor = numpy_helper.from_array(np.ones(4, f), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../outside/secret"
    constant = helper.make_node("Constant", [], ["inner"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])])
    whether = numpy_helper.from_array(np.array(True), "w")
    for nodes in (
        [helper.make_node("If", ["w"], ["last"], then_branch=branch, else_branch=branch)],
        [helper.make_node("Custom", ["w"], ["last"], tensors=[tensor], domain="mine")],
    ):
        model = onnx.ModelProto.FromString(net(nodes))
        model.graph.initializer.append(whether)
        model.opset_import.append(helper.make_opsetid("mine", 1))
        (inside / "input.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(onnx_file.NetworkFileError, match="external tensors"):
            onnx_file.from_file(inside / "input.onnx")
        with pytest.raises(onnx_file.NetworkFileError, match="in other files"):
            onnx_file.model(model.SerializeToString())


def test_a_file_of_zeros_is_no_network_and_costs_its_size_once(tmp_path: Path) -> None:
    size = 1 << 29
    with open(tmp_path / "zeros.onnx", "wb") as stream:
        stream.truncate(size)
    with open(tmp_path / "huge.onnx", "wb") as stream:
        stream.truncate(1 << 40)
    script = """
import resource, sys
from netassay.networks import onnx_file
import onnx.checker
held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
try:
    onnx_file.check(onnx_file.from_file(sys.argv[1]), analysable=False)
except onnx_file.NetworkFileError as error:
    print(error)
"""
    # A terabyte is refused by its size: there is not even the memory to read the first half gigabyte.
    for name, memory, expected in (("zeros", size + (64 << 20), "not an ONNX file"), ("huge", 64 << 20, "more than")):
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / f"{name}.onnx"), str(memory)],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert expected in ended.stdout


def test_a_network_cut_anywhere_is_refused() -> None:
    for network in targets.networks():
        data = network.SerializeToString()
        onnx_file.check(data, analysable=False)
        for end in range(len(data)):
            with pytest.raises(UserError):
                onnx_file.check(data[:end], analysable=False)


def test_networks_within_networks_are_refused_at_any_depth() -> None:
    def message(field: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + content

    deep = b""
    for _ in range(20_000):  # a graph's first node's only attribute is a graph
        deep = message(1, message(5, message(6, deep)))
    with pytest.raises(onnx_file.NetworkFileError, match="not an ONNX file"):
        onnx_file.check(message(7, deep), analysable=False)
    # As deep as the format's reader takes them.
    empty = branch = helper.make_graph([], "empty", [], [])
    for _ in range(25):
        node = helper.make_node("If", ["x"], ["inner"], then_branch=branch, else_branch=empty)
        branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])])
    data = net([helper.make_node("If", ["x"], ["last"], then_branch=branch, else_branch=empty)])
    with pytest.raises(UserError):
        onnx_file.check(data, analysable=True)


def test_a_network_of_32000_nodes_is_read_in_time_that_grows_with_their_number() -> None:
    def seconds(count: int) -> float:
        names = ["x", *(f"h{i}" for i in range(count)), "y"]
        nodes = [helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise(names)]
        data = targets._net(nodes, ["batch", 4], {}, ["batch", 4]).SerializeToString()
        least = math.inf
        for _ in range(3):
            began = time.process_time()
            onnx_file.read(data)
            least = min(least, time.process_time() - began)
        return least

    seconds(10)
    # Sixteen times as many: 16 if it grows with their number, 256 if with its square.
    assert seconds(32_000) < 64 * seconds(2_000)


def test_a_table_whose_texts_repeat_for_ever_costs_no_more_than_their_dictionary(tmp_path: Path) -> None:
    rows = 20_000
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 100_000]))
    numbers = pa.array(np.arange(rows) / 7)
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"a": numbers, "b": column.dictionary_encode(), "c": column}), path)
    assert path.stat().st_size < 5 << 20, "2 GB of text"
    script = """
import resource, sys
from pathlib import Path
from netassay.data import files
import polars, pyarrow.parquet, numpy
held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_DATA, (held + (1 << 30),) * 2)
try:
    files.read(Path(sys.argv[1]), files.File(file="x"))
except files.DatasetFileError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "too" in ended.stdout or "not" in ended.stdout, ended.stdout


def test_an_npz_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    import zipfile

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (1 << 20, 1 << 12)})
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x.npy", "w", force_zip64=True) as file:
            file.write(buffer.getvalue())
            for _ in range(64):
                file.write(bytes(1 << 20))
        archive.writestr("y.npy", b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(files.DatasetFileError, match="too many"):
        files.read(path, files.File(file=path.name))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_rows_that_are_a_pipe_nobody_writes_to_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("name: a\njobs: [{method: diagnostics.echo, rows: rows.csv}]\n")
    with pytest.raises(BadSweep, match="no regular file"):
        readers.read([sweep])
