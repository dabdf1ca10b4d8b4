"""The compute child: reads jobs from a pipe, computes, writes results to a pipe. It opens neither broker nor store.

It is not given their addresses (NETASSAY_BROKER, NETASSAY_STORE), with whatever passwords stand in them, nor other
variables that look like credentials. Artifacts are those in a folder of this host, whose supervisor has fetched what
the jobs name and shares what they keep. The rest of the environment it inherits, NETASSAY_HOME and what others keep
there included, and it runs as the same user: this keeps jobs from meddling by accident, it does not lock up hostile
code.

Protocol, one JSON text a line. In:

    {"prepare": {"libraries": [...], "artifacts": folder, "threads": 1}}
    {"method": name, "version": n, "given": {recipe: network},
     "groups": [{"memory": bytes, "jobs": [[job id, canonical params], ...]}, ...]}

Out, for each group, in order: `[[job id, state, cause, message, result JSON or null, seconds], ...]`; after `prepare`:
`{"ready": {...provenance...}}`. Beside the ends of a job there are three states: `apart`, the jobs of the group broke
down together and are to be asked for one by one; `lacking`, this version of the method is not to be had here; `short`,
the disk is full. Standard output and error of the jobs go to the log pipe, never into the protocol; their input is
empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from netassay import catalogue
from netassay.method import Failure, Method, MethodError
from netassay.store import artifacts, storable
from worker.limits import cause_of_exception

#: What the system says where a disk, or somebody's share of it, is full.
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
#: Allowance above the measured use when limits are set: allocators grab arenas ahead of need.
_SLACK = 64 << 20


def main() -> None:
    """Serve until the input ends. File descriptors: 0 jobs in, the number in argv[1] results out, 1 and 2 the log."""
    _die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor
    _leave_words()
    jobs, out = _pipes(int(sys.argv[1]))
    for line in jobs:
        request = json.loads(line)
        if "prepare" in request:
            _prepare(request["prepare"], out)
        else:
            _serve(request, out)


def _pipes(results: int) -> tuple[TextIO, TextIO]:
    """The protocol on descriptors of its own: a job that reads standard input finds it empty, and a program that a job
    starts inherits neither end."""
    jobs = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.set_inheritable(results, False)
    return os.fdopen(jobs, encoding="utf-8"), os.fdopen(results, "w", encoding="utf-8", buffering=1)


def _leave_words() -> None:
    """Whatever ends this process, what a job printed and where it was stays in the log; no core file does."""
    import resource

    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _die_with_parent(parent: int) -> None:
    """End when the supervisor does, kill -9 included."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(wanted: dict[str, Any], out: TextIO) -> None:
    global _artifacts
    _artifacts = artifacts.using(wanted["artifacts"])
    _artifacts.__enter__()
    versions = {}
    for name in wanted["libraries"]:
        module = importlib.import_module(name)
        versions[name] = str(getattr(module, "__version__", ""))
    if "torch" in wanted["libraries"]:
        sys.modules["torch"].set_num_threads(wanted["threads"])
    about = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": wanted["threads"],
        **versions,
    }
    print(json.dumps({"ready": about}), file=out)


_artifacts: Any = None


def _serve(request: dict[str, Any], out: TextIO) -> None:
    method = _method(request["method"], request["version"])
    for group in request["groups"]:
        if isinstance(method, str):
            results = [[job_id, "lacking", "error", method, None, 0.0] for job_id, _ in group["jobs"]]
        else:
            results = _run_group(method, request, group["jobs"], group["memory"])
        out.write(json.dumps(results, separators=(",", ":"), ensure_ascii=True) + "\n")
        out.flush()
        if any(cause == "memory" for _, _, cause, *_ in results):
            return  # the supervisor replaces this process; what is begun here now would be begun again


def _method(name: str, version: int) -> Method | str:
    """The method, or why this worker has none of that name and version."""
    try:
        method = catalogue.get(name)
    except catalogue.UnknownMethod as error:
        return storable.text(
            f"this worker cannot load {name}: {error}; restart the lab (or this worker) with NETASSAY_METHODS set to "
            "the folder that holds it, or with its package installed, then resume the batch"
        )
    except catalogue.BrokenMethod as error:
        lines = "".join(traceback.format_exception(error.__cause__, limit=-12)) if error.__cause__ else ""
        return storable.text(
            f"this worker cannot load {name}: {error.reason}; mend its module, or install what it needs, on the "
            f"worker's host, then resume the batch{_below(lines)}"
        )
    except Exception as error:
        return storable.text(f"this worker cannot load {name}: {error}; mend this, then resume the batch")
    if method.version == version:
        return method
    return (
        f"this worker has version {method.version} of {name}, the jobs ask for version {version}; install the same on "
        "both sides, then resume the batch"
    )


def _run_group(method: Method, request: dict[str, Any], group: list[list[Any]], memory: int) -> list[list[Any]]:
    results: dict[int, list[Any]] = {}
    parsed: list[tuple[int, Any]] = []
    for job_id, params_text in group:
        try:
            parsed.append((job_id, method.Params.model_validate_json(params_text)))
        except Exception as error:
            results[job_id] = _failed(job_id, error, 0.0)
    started = time.perf_counter()
    with _limited(memory):
        ends = _compute(method, [params for _, params in parsed], request["given"]) if parsed else []
    share = (time.perf_counter() - started) / max(1, len(parsed))
    if isinstance(ends, Exception):
        cause = cause_of_exception(ends)
        return [[job_id, "apart", cause, "", None, share] for job_id, _ in parsed] + list(results.values())
    for (job_id, _), end in zip(parsed, ends, strict=True):
        results[job_id] = _ended(method, job_id, end, share)
    return [results[job_id] for job_id, _ in group]


def _compute(method: Method, params: list[Any], given: dict[str, str]) -> list[Any] | Exception:
    """A Result, a Failure or an exception for each; one exception where the whole call raised.

    To run each by itself then is not done here: it would be a second start that nobody counts, with the time and memory
    of the first one spent.
    """
    with contextlib.ExitStack() as stack:
        if given:
            from netassay import networks

            stack.enter_context(networks.given(given))
        if method.run_many is not None and len(params) > 1:
            try:
                ends = method.run_many(params)
                if len(ends) != len(params):
                    raise RuntimeError(f"{method.name}.run_many returned {len(ends)} results for {len(params)} jobs")
                return list(ends)
            except Exception as error:
                traceback.print_exc()
                return error
        ends = []
        for item in params:
            try:
                ends.append(method.run(item))
            except Exception as error:
                ends.append(error)
        return ends


def _ended(method: Method, job_id: int, end: Any, seconds: float) -> list[Any]:
    if isinstance(end, Failure):
        state = "not_applicable" if end.cause == "not_applicable" else "failed"
        cause = "" if state == "not_applicable" else end.cause
        return [job_id, state, cause, storable.text(end.message + _below(end.traceback)), None, seconds]
    if isinstance(end, BaseException):
        return _failed(job_id, end, seconds)
    try:
        if not isinstance(end, method.Result):
            raise storable.Unstorable(f"{method.name} returned a {type(end).__name__} instead of its Result")
        result = storable.dump(end)
    except storable.Unstorable as error:
        return [job_id, "failed", "unstorable", str(error), None, seconds]
    except Exception as error:
        return _failed(job_id, error, seconds)
    return [job_id, "done", "", "", result, seconds]


def _failed(job_id: int, error: BaseException, seconds: float) -> list[Any]:
    if isinstance(error, MethodError):
        if error.cause == "not_applicable":
            return [job_id, "not_applicable", "", storable.text(str(error)), None, seconds]
        return [job_id, "failed", error.cause, storable.text(str(error)), None, seconds]
    cause = cause_of_exception(error)
    state = "short" if isinstance(error, OSError) and error.errno in _DISK_FULL else "failed"
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    lines = "".join(traceback.format_exception(error, limit=-12))
    return [job_id, state, cause, storable.text(words + _below(lines)), None, seconds]


def _below(lines: str) -> str:
    return f"\n{lines}" if lines else ""


@contextlib.contextmanager
def _limited(memory: int) -> Iterator[None]:
    """Let allocations fail beyond what is in use now plus so many bytes; lifted again for dealing with the results."""
    if sys.platform != "linux":
        yield
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + memory + _SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process: VmData, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
