"""Diagnostics do what they say, and their side log tells what really happened."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from netassay.method import Contract, Failure, InvalidInput, NotApplicable, NumericalError
from netassay.methods.diagnostics import _side_log, allocate, burn, crash, echo, fail, sleep
from netassay.store import storable


def in_a_child(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_echo_returns_its_value_and_the_square_of_numbers() -> None:
    many = [echo.Params(value=value) for value in (3, -0.5, "text", 1e200)]
    assert [(end.value, end.square) for end in echo.run_many(many)] == [
        (3, 9),
        (-0.5, 0.25),
        ("text", None),
        (1e200, float("inf")),
    ]


def test_echo_logs_each_job_once_before_and_once_after(tmp_path: Path) -> None:
    log = tmp_path / "log"
    many = [echo.Params(value=number, log=str(log)) for number in range(1000)]
    echo.run_many(many)
    lines = _side_log.read(log)
    assert [line.event for line in lines] == ["start"] * 1000 + ["end"] * 1000
    names = [echo.name(params) for params in many]
    assert [line.job for line in lines] == names + names
    assert len(set(names)) == 1000


def _append_many(path: str, number: int) -> None:
    for place in range(50):
        _side_log.append(path, "start", [f"{number} {place} " + "x" * 300])


def test_side_log_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    spawn = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    children = [spawn.Process(target=_append_many, args=(path, number)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    lines = _side_log.read(path)
    assert len({line.job for line in lines}) == len(lines) == 200
    assert len({line.pid for line in lines}) == 4


def test_side_log_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _side_log.append(str(path), "start", ["a"])
    with open(path, "a") as file:
        file.write('{"job": "b", "ev')
    assert [line.job for line in _side_log.read(path)] == ["a"]
    assert _side_log.read(tmp_path / "none") == []


@pytest.mark.parametrize("busy", ["python", "c", "c_without_lock"])
def test_burn_uses_about_the_cpu_time_asked_for(busy: str) -> None:
    before = time.thread_time()
    burn.run(burn.Params(seconds=0.2, busy=busy))
    assert 0.1 <= time.thread_time() - before <= 0.5


@pytest.mark.parametrize("module, params, held", [
    (sleep, sleep.Params(seconds=0.3, hold_lock=True), True),
    (sleep, sleep.Params(seconds=0.3, hold_lock=False), False),
    (burn, burn.Params(seconds=0.3, busy="c"), True),
    (burn, burn.Params(seconds=0.3, busy="c_without_lock"), False),
])  # fmt: skip
def test_other_threads_stand_still_exactly_while_the_lock_is_held(
    module: ModuleType, params: Contract, held: bool
) -> None:
    """The longest silence of a thread that ticks every millisecond."""
    ticks, done = [time.monotonic()], threading.Event()

    def tick() -> None:
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    module.run(params)
    done.set()
    thread.join()
    silence = max(after - before for before, after in itertools.pairwise(ticks))
    assert (silence > 0.15) == held


@pytest.mark.parametrize("hold_lock", [True, False])
def test_sleep_takes_its_time_and_no_cpu_also_across_signals(hold_lock: bool) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        began, cpu = time.monotonic(), time.thread_time()
        sleep.run(sleep.Params(seconds=0.25, hold_lock=hold_lock))
        assert time.monotonic() - began >= 0.25
        assert time.thread_time() - cpu < 0.1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_allocate_makes_its_bytes_resident() -> None:
    done = in_a_child(
        "import psutil, threading, time; from netassay.methods.diagnostics import allocate as a\n"
        "resident = lambda: psutil.Process().memory_info().rss\n"
        "before, seen = resident(), []\n"
        "threading.Timer(1.5, lambda: seen.append(resident())).start()\n"
        "result = a.run(a.Params(bytes=100 * 2**20, hold=2)); print(result.bytes, seen[0] - before)"
    )
    taken, grown = map(int, done.stdout.split())
    assert taken == 100 * 2**20
    assert 95 * 2**20 <= grown <= 130 * 2**20
    assert allocate.run(allocate.Params(bytes=0)).bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced on Linux only")
def test_endless_allocation_ends_at_a_limit(tmp_path: Path) -> None:
    done = in_a_child(
        "import resource; from netassay.methods.diagnostics import allocate as a\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20, 300 * 2**20))\n"
        f"a.run(a.Params(endless=True, log={str(tmp_path / 'log')!r}))"
    )
    assert "MemoryError" in done.stderr
    assert [line.event for line in _side_log.read(tmp_path / "log")] == ["start"]


@pytest.mark.parametrize("by", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM"])
def test_crash_ends_its_process_by_that_signal_after_the_start_line(by: str, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    done = in_a_child(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"from netassay.methods.diagnostics import crash as c; c.run(c.Params(by={by!r}, log={log!r}))"
    )
    assert done.returncode == -getattr(signal, by)
    assert [(line.event, line.job) for line in _side_log.read(log)] == [("start", crash.name(crash.Params(by=by)))]


def test_crash_may_exit_with_a_code_or_survive() -> None:
    done = in_a_child("from netassay.methods.diagnostics import crash as c; c.run(c.Params(by='exit', code=7))")
    assert done.returncode == 7
    assert crash.run(crash.Params(by="none")).survived


@pytest.mark.parametrize("cause, expected", [
    ("invalid_input", InvalidInput), ("numerical", NumericalError), ("not_applicable", NotApplicable),
    ("error", RuntimeError), ("memory", MemoryError), ("exit", SystemExit), ("interrupt", KeyboardInterrupt),
])  # fmt: skip
def test_fail_raises_what_its_cause_stands_for(cause: str, expected: type[BaseException], tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with pytest.raises(expected, match="the reason"):
        fail.run(fail.Params(cause=cause, message="the reason", log=log))
    assert [line.event for line in _side_log.read(log)] == ["start"]


def test_foreseen_failures_stay_with_their_own_job() -> None:
    causes = ["none", "invalid_input", "none", "numerical", "not_applicable"]
    ends = fail.run_many([fail.Params(cause=cause) for cause in causes])
    assert [end.cause if isinstance(end, Failure) else "none" for end in ends] == causes
    with pytest.raises(RuntimeError):
        fail.run_many([fail.Params(cause="none"), fail.Params(cause="error")])


def test_an_unstorable_result_is_unstorable() -> None:
    result = fail.run(fail.Params(cause="unstorable"))
    with pytest.raises(storable.Unstorable, match="value holds a object"):
        storable.dump(result.model_dump())
