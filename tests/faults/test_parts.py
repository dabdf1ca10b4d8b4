"""The parts of the harness do what they claim: the bad ways, the armed points, the clock, the eyes on the side log."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from labs import until

from netassay import catalogue, faults

from .page import quantile
from .proxy import Proxy
from .site import METHODS
from .witness import Witness
from .workload import Stream

MESSAGE = b"0123456789" * 10


@pytest.fixture
def way() -> Iterator[tuple[Proxy, list[socket.socket]]]:
    """A proxy before a server that keeps whoever connects."""
    taken: list[socket.socket] = []
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    proxy = Proxy(server.getsockname()[1])
    yield proxy, taken
    proxy.close()
    server.close()
    for end in taken:
        end.close()


def connected(proxy: Proxy, taken: list[socket.socket]) -> tuple[socket.socket, socket.socket]:
    """A client's end and the service's, between which bytes pass in both directions."""
    client = socket.create_connection(("127.0.0.1", proxy.port), 5)
    service = until(lambda: taken and taken[-1], 5)
    for end in (client, service):
        end.settimeout(5)
    client.sendall(b"a")
    assert service.recv(1) == b"a"
    service.sendall(b"b")
    assert client.recv(1) == b"b"
    return client, service


def received(end: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    found = b""
    while piece := end.recv(1000):
        found += piece
    return found


def test_a_way_that_stalls_passes_everything_later(way: tuple[Proxy, list[socket.socket]]) -> None:
    client, service = connected(*way)
    stalling = threading.Thread(target=way[0].stall, args=(0.5,))
    stalling.start()
    until(lambda: not way[0].open.is_set(), 5)
    began = time.monotonic()
    client.sendall(MESSAGE)
    assert service.recv(1000) == MESSAGE
    assert time.monotonic() - began > 0.3
    stalling.join()


def test_a_way_that_cuts_ends_in_the_middle_of_a_message(way: tuple[Proxy, list[socket.socket]]) -> None:
    client, service = connected(*way)
    assert way[0].truncate() == 1
    client.sendall(MESSAGE)
    assert received(service) == MESSAGE[:50]
    assert received(client) == b""


def test_a_way_that_resets_is_heard_of_at_both_ends(way: tuple[Proxy, list[socket.socket]]) -> None:
    client, service = connected(*way)
    assert way[0].reset() == 1
    for end in (client, service):
        with pytest.raises(ConnectionResetError):
            received(end)


@pytest.mark.parametrize("untold", ["client", "service"])
def test_of_a_half_open_link_one_end_hears_nothing_until_it_is_reset(
    untold: str, way: tuple[Proxy, list[socket.socket]]
) -> None:
    ends = dict(zip(("client", "service"), connected(*way), strict=True))
    way[0].half_open(untold, 1.5)
    told = next(name for name in ends if name != untold)
    assert received(ends[told]) == b""
    ends[untold].sendall(MESSAGE)  # goes nowhere
    ends[untold].settimeout(0.3)
    with pytest.raises(TimeoutError):
        ends[untold].recv(1)
    ends[untold].settimeout(10)
    with pytest.raises(ConnectionResetError):
        received(ends[untold])


REACH = "from netassay import faults\nfaults.reach({point!r})\nprint('lives')"


def test_an_armed_point_is_one_death_and_says_whose(tmp_path: Path) -> None:
    point = faults.POINTS[0]
    (tmp_path / point).touch()
    environment = {**os.environ, "NETASSAY_CRASH_ARMED": str(tmp_path)}
    command = [sys.executable, "-c", REACH.format(point=point)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.wait(60) == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [f"{point}.{process.pid}"]
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).stdout == b"lives\n"


SHOW = """
import sys, time
for line in sys.stdin:
    print(time.time(), time.monotonic(), flush=True)
"""


def test_a_clock_jumps_for_one_process_and_its_monotonic_one_does_not(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent / "clock"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NETASSAY_TEST_CLOCKS": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", SHOW],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def shown() -> tuple[float, float]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wall, monotonic = map(float, process.stdout.readline().split())
            return wall - time.time(), monotonic - time.monotonic()

        assert max(map(abs, shown())) < 5
        (tmp_path / str(process.pid)).write_text("3600")
        wall, monotonic = shown()
        assert 3595 < wall < 3605
        assert abs(monotonic) < 5
        (tmp_path / str(process.pid)).unlink()
        assert abs(shown()[0]) < 5


def test_the_eyes_see_runs_deaths_and_lines_that_were_cut(tmp_path: Path) -> None:
    log, mine = tmp_path / "side.log", os.getpid()
    child = subprocess.Popen(["sleep", "60"])
    seen = Witness(list)
    try:
        seen.follow(log)
        log.write_text(
            f'{{"job": "echo 1 1", "event": "start", "pid": {mine}, "monotonic": 1.0}}\n'
            f'{{"job": "echo 2 1", "event": "start", "pid": {mine}, "monotonic": 1.0}}\n'
            '{"job": "echo 9 1", "event": "sta'  # killed in the middle of its line, which another one continues
            f'{{"job": "echo 1 1", "event": "end", "pid": {mine}, "monotonic": 2.0}}\n'
            f'{{"job": "sleep 1", "event": "start", "pid": {child.pid}, "monotonic": 3.0}}\n'
        )
        seen.look()
        assert seen.started() == {"echo 1 1", "echo 2 1", "sleep 1"}
        assert seen.runs["echo 1 1"][0].end == 2.0
        assert seen.open(mine) == ["echo 2 1"]
        child.kill()
        child.wait()
        seen.look()
        assert seen.open(child.pid) == []
        assert seen.runs["sleep 1"][0].stop is None
        assert seen.runs["sleep 1"][0].end < float("inf")
        assert seen.runs["sleep 1"][0].lived is not None
        assert seen.runs["sleep 1"][0].lived < seen.runs["sleep 1"][0].end
        with open(log, "a") as file:  # it had written that before it died, after we had looked
            file.write(f'{{"job": "sleep 1", "event": "end", "pid": {child.pid}, "monotonic": 4.0}}\n')
        seen.look()
        assert seen.runs["sleep 1"][0].stop == 4.0
    finally:
        child.kill()
        seen.close()


def test_a_stream_is_the_same_for_the_same_seed_and_its_batches_overlap(tmp_path: Path) -> None:
    with catalogue.using(str(METHODS)):
        _look_at_streams(tmp_path)


def _look_at_streams(tmp_path: Path) -> None:
    streams = [Stream(seed, tmp_path / "log", "r") for seed in (1, 1, 2)]
    first, same, other = ([stream.next() for _ in range(12)] for stream in streams)
    assert [batch.entries for batch in first] == [batch.entries for batch in same]
    assert [batch.entries for batch in first] != [batch.entries for batch in other]
    pairs = [set(one.jobs) & set(two.jobs) for place, one in enumerate(first) for two in first[:place]]
    assert any(pairs)
    assert any(job.culprit for batch in first for job in batch.jobs.values())


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert quantile(list(range(100)), 0.95) == 94
    assert quantile([5.0], 0.5) == 5.0
