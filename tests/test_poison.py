"""Bad jobs end by themselves and cost their neighbours nothing; people get what they ask of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from labs import KINDS, Lab, a_lab, until

from netassay.job import Record
from netassay.store import control, reading

USER_METHODS = Path(__file__).parent / "user_methods"


@pytest.fixture(scope="module", params=KINDS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    # 1 GB for two slots: also a vectorised group cannot take more than half of it.
    with a_lab(request.param, METHODS=str(USER_METHODS), MEMORY="1000000000") as found:
        yield found


def attempts(lab: Lab, record: Record) -> list[reading.AttemptSeen]:
    return reading.attempts(lab.database, record.key)


def fate(record: Record) -> list[str]:
    """How each of the jobs below has to end."""
    match record.method, record.params:
        case "diagnostics.crash", {"by": by} if by != "none":
            return ["failed:crash"]
        case "diagnostics.allocate", {"endless": True}:
            return ["failed:memory"]
        case "diagnostics.burn", {"seconds": seconds} if seconds > 1:
            return ["failed:time"]
        case _:
            return ["done"]


def test_among_300_jobs_the_poisonous_end_with_their_cause_and_all_others_are_done(lab: Lab) -> None:
    lab.submit(
        "mixed",
        lab.entry("diagnostics.echo", grid={"value": {"range": [0, 188]}}),
        lab.entry("diagnostics.crash", {"by": "SIGSEGV"}, grid={"tag": {"range": [0, 3]}}),
        lab.entry("diagnostics.burn", {"seconds": 0.01}, grid={"tag": {"range": [0, 50]}}),
        lab.entry("diagnostics.allocate", {"endless": True}, grid={"tag": [0, 1, 2]}, limits={"memory": "200MB"}),
        lab.entry("diagnostics.crash", {"by": "exit", "code": 3}, grid={"tag": [0, 1]}),
        lab.entry("diagnostics.burn", {"seconds": 60, "busy": "c"}, grid={"tag": [0, 1, 2]}, limits={"seconds": 1}),
        lab.entry("diagnostics.burn", {"seconds": 0.01}, grid={"tag": {"range": [100, 150]}}),
        lab.entry("diagnostics.echo", grid={"value": [f"word {number}" for number in range(1)]}),
    )
    assert lab.progress("mixed").size == 300
    lab.wait("mixed")
    assert lab.violations("mixed", ends=fate) == []
    runs = lab.runs()
    for record in lab.records("mixed"):
        found = attempts(lab, record)
        if record.cause == "crash":
            assert [(attempt.cause, attempt.alone) for attempt in found] == [("crash", True)] * 3
            assert "crash.py" in found[-1].log or record.params["by"] == "exit"
        elif record.cause == "time":
            assert [attempt.cause for attempt in found] == ["time"]
        else:
            assert found == [], "a neighbour was in a child that died"
    assert len(runs["crash SIGSEGV 0"]) == 3
    assert len(runs["burn 60.0 c 0"]) == 1
    assert {group.cause: group.jobs for group in reading.failures(lab.database, "mixed")} == {
        "crash": 5,
        "memory": 3,
        "time": 3,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_of_1000_jobs_5_crash_5_take_all_memory_and_5_spin_and_985_are_done(kind: str) -> None:
    """With the limits that nobody has set, but for the time; one of the five asks for 100 GB and says 8 would do."""
    with a_lab(kind) as lab:
        lab.submit(
            "thousand",
            lab.entry("diagnostics.echo", grid={"value": {"range": [0, 500]}}),
            lab.entry("diagnostics.crash", {"by": "SIGSEGV"}, grid={"tag": {"range": [0, 5]}}),
            lab.entry("diagnostics.burn", {"seconds": 0.02}, grid={"tag": {"range": [0, 485]}}),
            lab.entry("diagnostics.allocate", {"endless": True}, grid={"tag": [0, 1, 2, 3]}),
            lab.entry("diagnostics.allocate", {"bytes": 100_000_000_000}, limits={"memory": "8GB"}),
            lab.entry("diagnostics.burn", {"seconds": 600, "busy": "c"}, grid={"tag": [0, 1, 2, 3, 4]},
                      limits={"seconds": 10}),
        )  # fmt: skip
        began = time.monotonic()
        lab.wait("thousand", seconds=600)
        seen = lab.progress("thousand")
        assert (seen.size, seen.done, seen.failed) == (1000, 985, 15)
        causes = [record.cause for record in lab.records("thousand") if record.state == "failed"]
        assert sorted(causes) == ["crash"] * 5 + ["memory"] * 5 + ["time"] * 5
        assert lab.violations("thousand", ends=whatever_its_fate) == []
        for record in lab.records("thousand"):
            if record.cause in ("crash", "time"):
                assert attempts(lab, record)[-1].cause == record.cause
            elif record.cause == "memory":
                assert record.message
        # Where it says so itself, there is no worker for it: it is not even begun.
        lab.submit("huge", lab.entry("diagnostics.allocate", {"bytes": 100_000_000_000}))
        until(lambda: lab.progress("huge").state == "paused")
        assert "may use 100.0 GB" in lab.progress("huge").reason
        print(f"{kind}: 985 done, 15 failed with their causes after {time.monotonic() - began:.0f} s")


def whatever_its_fate(record: Record) -> list[str]:
    return ["failed:memory"] if record.method == "diagnostics.allocate" else fate(record)


@pytest.mark.parametrize(
    "how, cause", [("crash", "crash"), ("spin", "time"), ("allocate", "memory"), ("raise", "error")]
)
def test_in_a_vectorised_group_the_culprit_fails_and_its_mates_start_twice_at_most(
    lab: Lab, how: str, cause: str
) -> None:
    name = f"group-{how}"
    limits = {"seconds": 1.5, "memory": "200MB"}
    tag = 1000 * ord(how[0])
    group = lab.entry("poison.grouped", {"how": "well"}, grid={"tag": {"range": [tag, tag + 60]}}, limits=limits)
    culprit = lab.entry("poison.grouped", {"how": how, "tag": tag + 999}, limits=limits)
    after = lab.entry("poison.grouped", {"how": "well"}, grid={"tag": {"range": [tag + 60, tag + 81]}}, limits=limits)
    lab.submit(name, group, culprit, after)
    lab.wait(name)
    assert lab.violations(name, ends=lambda r: ["done"] if r.params["how"] == "well" else [f"failed:{cause}"]) == []
    runs = lab.runs()
    starts = {called: len(found) for called, found in runs.items() if called.startswith("grouped")}
    mates = [starts[f"grouped well {number}"] for number in range(tag, tag + 81)]
    assert max(mates) == 2, "it was never in a group with others"
    assert starts[f"grouped {how} {tag + 999}"] <= 3
    if how == "crash":
        (record,) = [record for record in lab.records(name) if record.params["how"] == how]
        together, *by_itself = attempts(lab, record)
        assert not together.alone
        assert all(attempt.alone for attempt in by_itself)
        assert all("the last words of a job" in attempt.log for attempt in (together, *by_itself))


def sleeping(lab: Lab, seconds: float, start: int, stop: int) -> dict:
    return lab.entry("diagnostics.sleep", {"seconds": seconds}, grid={"tag": {"range": [start, stop]}})


def starts_of(lab: Lab, start: int, stop: int) -> int:
    """How often the sleeping jobs of these tags were started."""
    return sum(
        len(runs) for job, runs in lab.runs().items() if job.startswith("sleep") and start <= int(job.split()[3]) < stop
    )


def test_a_cancelled_batch_ends_within_five_seconds_and_starts_nothing_more(lab: Lab) -> None:
    lab.submit("cancelled", sleeping(lab, 30, 0, 6))
    until(lambda: starts_of(lab, 0, 6) == 2)
    children = lab.children()
    began = time.monotonic()
    assert control.cancel(lab.database, "cancelled")
    until(lambda: lab.progress("cancelled").over and not set(children) & set(lab.children()), 5, "the jobs to be gone")
    assert time.monotonic() - began < 5
    time.sleep(2.0)
    assert starts_of(lab, 0, 6) == 2
    assert {record.state for record in lab.records("cancelled")} == {"pending"}
    assert lab.query("SELECT count(*) FROM running")[0][0] == 0


def test_a_cancelled_batch_leaves_running_what_another_open_batch_holds(lab: Lab) -> None:
    lab.submit("mine", sleeping(lab, 3, 100, 102))
    until(lambda: starts_of(lab, 100, 102) == 2)
    lab.submit("ours", sleeping(lab, 3, 100, 102))
    control.cancel(lab.database, "mine")
    lab.wait("ours")
    assert starts_of(lab, 100, 102) == 2, "they were killed and started again"
    assert lab.violations("ours") == []


def test_a_paused_batch_starts_nothing_until_it_is_resumed(lab: Lab) -> None:
    lab.submit("paused", sleeping(lab, 0.25, 200, 230))
    until(lambda: starts_of(lab, 200, 230) >= 4)
    control.pause(lab.database, "paused")
    until(lambda: not lab.progress("paused").running, 5, "the running jobs to end")
    seen = starts_of(lab, 200, 230)
    time.sleep(1.5)
    assert starts_of(lab, 200, 230) == seen < 30
    control.resume(lab.database, "paused")
    lab.wait("paused")
    assert lab.violations("paused") == []


def test_jobs_that_took_too_long_get_a_new_start_when_asked_for(lab: Lab) -> None:
    too_long = sleeping(lab, 20, 300, 302) | {"limits": {"seconds": 0.5}}
    crash = lab.entry("diagnostics.crash", {"tag": 300})
    lab.submit("retried", sleeping(lab, 0.01, 303, 304), too_long, crash)
    lab.wait("retried")
    assert control.retry(lab.database, "retried", "time") == 2
    assert lab.progress("retried").failed == 1
    lab.wait("retried")

    def slow(record: Record) -> list[str]:
        return ["failed:time"] if record.params.get("seconds") == 20 else fate(record)

    assert lab.violations("retried", ends=slow) == []
    assert starts_of(lab, 300, 302) == 4
    assert len(lab.runs()["crash SIGSEGV 300"]) == 3, "it was not asked for"


def test_ten_quick_jobs_do_not_wait_for_three_thousand(lab: Lab) -> None:
    lab.submit("many", sleeping(lab, 0.01, 10_000, 13_000))
    until(lambda: starts_of(lab, 10_000, 13_000) > 50)
    began = time.monotonic()
    lab.submit("few", sleeping(lab, 0.01, 20_000, 20_010))
    lab.wait("few", seconds=5)
    assert time.monotonic() - began < 5
    assert not lab.progress("many").over
    control.cancel(lab.database, "many")
    until(lambda: lab.progress("many").over, 10)
    assert lab.violations("few") == []
