"""A cluster by hand: hosts that share nothing but PostgreSQL, Redis and a bucket of artifacts."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from buckets import serving
from labs import Lab, called, until
from services import RedisServer, new_database, require_redis, shared_redis

from netassay import catalogue, networks
from netassay.store import artifacts, reading
from producer import lab as embedded_lab

RECIPE = {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [16]}, "epochs": 3}
#: Seconds without a sign of life after which a worker of these clusters is given up.
LOST_AFTER = "3"


class Cluster:
    """One store, one Redis, one bucket; processes are started by the commands of the documentation."""

    def __init__(self, folder: Path, shared: Mapping[str, str]) -> None:
        self.folder, self.shared = folder, shared
        self.processes: list[subprocess.Popen] = []
        # What submits is a host of its own too.
        self.lab = Lab(folder / "submitter", environment=dict(shared), store=shared["NETASSAY_STORE"])
        self.lab.home.mkdir()

    def start(self, host: str, *words: str) -> subprocess.Popen:
        """`netassay WORDS` on a host of this name, whose folder nobody else knows."""
        home = self.folder / host
        home.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NETASSAY_")}
        with open(home / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "producer.cli", *words],
                env={**environment, **self.shared, "NETASSAY_HOME": str(home), "OMP_NUM_THREADS": "1"},
                cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def worker(self, host: str) -> tuple[subprocess.Popen, int]:
        """A worker of one slot, signed on: its process and its number in the store."""
        before = {worker.id for worker in reading.workers(self.lab.database)}
        process = self.start(host, "worker", "--slots", "1")
        (mine,) = until(
            lambda: {worker.id for worker in reading.workers(self.lab.database)} - before,
            what=f"worker {host}: {(self.folder / host / 'log').read_text()}",
        )
        return process, mine

    def held_by(self, worker: int) -> int:
        return self.lab.query(
            "SELECT count(*) FROM chunk c JOIN running r ON r.chunk_id = c.id WHERE c.worker_id = :id", id=worker
        )[0][0]

    def run_by(self, worker: int) -> int:
        return self.lab.query("SELECT count(*) FROM record WHERE worker_id = :id", id=worker)[0][0]

    def stop(self) -> None:
        self.lab.database.dispose()
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster(broker: str) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-")))
        found = Cluster(
            folder,
            {
                "NETASSAY_BROKER": broker,
                "NETASSAY_STORE": stack.enter_context(new_database()),
                "NETASSAY_ARTIFACTS": stack.enter_context(serving()).url,
                "NETASSAY_LOST_AFTER": LOST_AFTER,
            },
        )
        stack.callback(found.stop)
        found.lab.database.prepare()
        yield found


@pytest.mark.parametrize("size", [1_500, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_two_hosts_finish_what_a_killed_third_began_and_a_newcomer_takes_its_share(size: int) -> None:
    """On this machine's own Redis, beside whatever else uses it."""
    with cluster(shared_redis()) as found:
        images, radii = 599, -(-size // 599)
        certify = {
            "method": "verification.certify",
            "params": {"network": "small", "dataset": "digits"},
            "grid": {
                "index": {"range": [0, min(images, size)]},
                "radius": [round(0.001 * (1 + number), 6) for number in range(radii)],
            },
        }
        witnessed = found.lab.entry("diagnostics.sleep", {"seconds": 0.05}, grid={"tag": {"range": [0, 100]}})
        found.lab.submit("fleet", certify, witnessed, networks={"small": {"recipe": RECIPE}})
        found.start("dispatcher", "dispatch")
        (first, _), (_, second) = found.worker("first"), found.worker("second")
        total = found.lab.progress("fleet").size
        assert total >= size

        until(lambda: found.lab.progress("fleet").ended > total * 0.2, 600)
        os.killpg(first.pid, signal.SIGKILL)
        began = time.monotonic()
        _, third = found.worker("third")
        signed_on = time.monotonic()
        until(lambda: found.held_by(third) or found.run_by(third), 5.0, "the newcomer's first jobs")
        claimed = time.monotonic()
        until(lambda: found.run_by(third), 60, "the newcomer's first results")
        print(
            f"newcomer: signed on after {signed_on - began:.1f} s, first jobs {claimed - signed_on:.1f} s later, first "
            f"results {time.monotonic() - signed_on:.1f} s later"
        )
        found.lab.wait("fleet", seconds=900)

        assert found.lab.violations("fleet", ends=lambda record: ["done", "not_applicable"], takeover=True) == []
        assert found.run_by(second) > 0
        assert found.run_by(third) > 0
        agree_with_a_direct_call(found)


def agree_with_a_direct_call(found: Cluster) -> None:
    """Every fifteenth certificate, computed again here on the network that the record names."""
    records = [record for record in found.lab.records("fleet") if record.method == "verification.certify"][::15]
    method = catalogue.get("verification.certify")
    with artifacts.using(artifacts.of(found.lab.config)):
        for given, group in itertools.groupby(records, key=lambda record: record.inputs):
            mine = list(group)
            with networks.given(given):
                direct = method.run_many([method.Params.model_validate(record.params) for record in mine])
            for record, result in zip(mine, direct, strict=True):
                if record.state == "done":
                    assert record.result is not None
                    assert record.result["verdict"] == result.verdict, called(record)


def test_two_who_submit_the_same_jobs_at_once_to_one_cluster_both_have_them(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = RedisServer(tmp_path / "redis")
        server.start()
        stack.callback(server.kill)
        found = stack.enter_context(cluster(server.url))
        said: dict[str, Any] = {}
        gate = threading.Barrier(2)
        entry = {"method": "diagnostics.echo", "grid": {"value": {"range": [0, 20_000]}}}
        names = {"left": "left", "right": "right"}
        documents = {side: found.lab.document(name, entry) for side, name in names.items()}

        def submit(side: str) -> None:
            gate.wait()
            process = subprocess.run(
                [sys.executable, "-m", "producer.cli", "submit", str(documents[side]), "--json"],
                env={**os.environ, **found.shared, "NETASSAY_HOME": str(found.folder / side)},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            said[side] = (process.returncode, process.stdout, process.stderr)

        threads = [threading.Thread(target=submit, args=(side,)) for side in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [code for code, _, _ in said.values()] == [0, 0], said
        assert found.lab.query("SELECT count(*) FROM job")[0][0] == 20_000
        found.start("dispatcher", "dispatch")
        found.worker("first")
        found.worker("second")
        found.lab.wait("left", "right", seconds=120)
        assert found.lab.violations("left", "right") == []


def test_two_labs_share_a_redis_and_do_not_hear_each_other(tmp_path: Path) -> None:
    require_redis()
    with contextlib.ExitStack() as stack:
        server = RedisServer(tmp_path / "redis")
        server.start()
        stack.callback(server.kill)
        labs = []
        for _ in range(2):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="na-")))
            lab = Lab(home, 1, server=server, store=stack.enter_context(new_database()))
            stack.callback(lab.database.dispose)
            stack.callback(embedded_lab.down, lab.config)
            lab.up()
            labs.append(lab)
        for number, lab in enumerate(labs):
            lab.submit("same", lab.entry("diagnostics.echo", {"tag": number}, grid={"value": {"range": [0, 500]}}))
        for lab in labs:
            lab.wait("same")
            assert lab.violations("same") == []
            assert "worker_lost" not in lab.logs()
