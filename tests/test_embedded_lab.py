"""The embedded lab: started, stopped, killed in parts, it leaves nothing behind and loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labs import Lab, alive, embedded, until, variables
from services import require_redis
from sqlalchemy import text

from netassay.settings import Settings
from netassay.store import control
from netassay.store.database import SCHEMA
from producer import lab as embedded_lab

USER_METHODS = Path(__file__).parent / "user_methods"


def leftovers(lab: Lab) -> list[str]:
    """What a lab must not leave behind."""
    place = embedded_lab.Place(lab.config.root)
    files = [path for path in (place.lock, place.description, place.runtime) if path.exists()]
    return [*map(str, files), *(" ".join(process.cmdline()) for process in lab.processes())]


def test_up_and_down_twice_leaves_nothing_and_keeps_the_records() -> None:
    with embedded(start=False) as lab:
        for tag in (1, 2):
            lab.up()
            with pytest.raises(embedded_lab.LabError, match="a lab runs in"):
                lab.up()
            lab.submit(f"batch-{tag}", lab.entry("diagnostics.echo", {"tag": tag}, grid={"value": [1, 2.5, "three"]}))
            lab.wait(f"batch-{tag}")
            began = time.monotonic()
            lab.down()
            assert time.monotonic() - began < 20
            assert leftovers(lab) == []
        assert lab.violations("batch-1", "batch-2") == []
        assert not embedded_lab.down(lab.config)


def test_what_was_submitted_without_a_lab_runs_when_there_is_one() -> None:
    with embedded(start=False) as lab:
        lab.submit("early", lab.entry("diagnostics.echo", grid={"value": {"range": [0, 30]}}))
        assert lab.progress("early").waiting == 30
        lab.up()
        lab.wait("early")
        assert lab.violations("early") == []


def test_each_service_that_is_killed_is_started_again_and_this_is_written_down() -> None:
    require_redis()
    with embedded(start=False, LOST_AFTER="3") as lab:
        embedded_lab.up(lab.config, 1, flower=True)
        services = ["dispatcher", "flower", "monitor", "redis", "worker"]
        assert sorted(lab.described()["services"]) == services
        killed = {service: lab.kill(service) for service in services}
        for service, pid in killed.items():
            lab.restarted(service, pid)
        assert lab.described()["restarts"] == dict.fromkeys(services, 1)
        lab.submit("after", lab.entry("diagnostics.echo", grid={"value": {"range": [0, 30]}}))
        lab.wait("after")
        assert lab.violations("after") == []
        lab.down()
        assert leftovers(lab) == []


def test_down_in_the_middle_of_a_long_job_is_prompt_and_costs_it_no_attempt() -> None:
    with embedded() as lab:
        lab.submit("long", lab.entry("diagnostics.sleep", {"seconds": 60, "hold_lock": True}))
        until(lambda: lab.started())
        (child,) = lab.children()
        began = time.monotonic()
        lab.down()
        assert time.monotonic() - began < 20
        assert leftovers(lab) == []
        assert not alive(child)
        assert lab.records("long")[0].state == "pending"
        assert lab.query("SELECT count(*) FROM attempt")[0][0] == 0
        assert lab.query("SELECT count(*) FROM worker_loss")[0][0] == 0
        lab.up()
        until(lambda: sum(map(len, lab.runs().values())) == 2, what="the job to be started again")
        control.cancel(lab.database, "long")
        until(lambda: lab.progress("long").over, 5)


def test_settings_given_by_a_program_reach_all_services() -> None:
    require_redis()
    with embedded(start=False) as lab:
        config = Settings(home=lab.home, methods=str(USER_METHODS), memory=123_000_000, lost_after=3)
        described = embedded_lab.up(config, 1, flower=False)
        assert described["slots"] == 1
        until(lambda: "memory_a_slot=123000000" in (lab.home / "logs" / "worker.log").read_text())
        with variables({"NETASSAY_METHODS": config.methods}):
            lab.submit("user", lab.entry("poison.grouped", grid={"tag": {"range": [0, 50]}}))
            lab.wait("user")
            assert lab.violations("user") == []
            assert [record.result for record in lab.records("user")] == [{"tag": tag} for tag in range(50)]


def test_a_recipe_is_trained_first_and_its_network_then_certified() -> None:
    recipe = {"recipe": {"dataset": "digits", "architecture": {"kind": "mlp", "hidden": [16]}, "epochs": 2}}
    with embedded() as lab:
        lab.submit(
            "certified",
            {
                "method": "verification.certify",
                "params": {"network": "tiny", "dataset": "digits", "radius": 0.01},
                "grid": {"index": {"range": [0, 12]}},
            },
            networks={"tiny": recipe},
        )
        lab.wait("certified", seconds=120)
        trained, *certified = lab.records("certified")
        assert trained.method == "networks.train"
        assert trained.state == "done"
        assert trained.result is not None
        assert [record.method for record in certified] == ["verification.certify"] * 12
        assert {record.state for record in certified} <= {"done", "not_applicable"}, certified[0].message
        for record in certified:
            assert record.finished >= trained.finished
            assert record.name("network") == "tiny"
            assert set(record.inputs.values()) == {trained.result["network"]}
        assert lab.violations("certified", ends=lambda record: ["done", "not_applicable"]) == []


def test_two_labs_in_one_folder_cannot_be_and_a_look_at_the_lock_does_not_disturb(tmp_path: Path) -> None:
    path = tmp_path / "lab.lock"
    first = embedded_lab.take_lock(path)
    assert first is not None
    assert embedded_lab.is_locked(path)
    assert embedded_lab.take_lock(path) is None
    # Its holder removes the file and ends: who waited on the old file must not believe to hold the new one.
    path.unlink()
    second = embedded_lab.take_lock(path)
    assert second is not None
    first.close()
    assert embedded_lab.is_locked(path)
    second.close()
    assert not embedded_lab.is_locked(path)


def test_a_worker_without_a_store_ends_and_takes_no_messages() -> None:
    command = "celery --app worker.app --quiet worker --pool threads --concurrency 1"
    ended = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**os.environ, "NETASSAY_STORE": "sqlite:////proc/none/store.sqlite", "NETASSAY_BROKER": "redis://none:1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "the worker cannot start" in ended.stderr


def test_a_store_upgraded_under_a_lab_ends_its_old_processes_and_costs_no_job() -> None:
    """As a newer program would upgrade it; a moment later the older one is right again."""
    with embedded(LOST_AFTER="3") as lab:
        jobs = lab.entry("diagnostics.sleep", {"seconds": 0.05}, grid={"tag": {"range": [0, 100]}})
        lab.submit("upgraded", jobs)
        until(lambda: len(lab.started()) > 5)
        before = {name: lab.pid(name) for name in ("worker", "dispatcher")}
        with lab.database.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        until(lambda: not any(map(alive, before.values())), what="the older programs to end")
        logs = lab.logs()
        assert "outdated" in logs
        assert "was upgraded to schema 9999" in logs
        with lab.database.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": SCHEMA})
        lab.wait("upgraded")
        assert lab.violations("upgraded", takeover=True) == []


def test_a_lab_that_cannot_start_says_why_and_leaves_nothing() -> None:
    require_redis()
    with embedded(start=False) as lab:
        long = lab.home / ("long" * 25)
        long.mkdir()
        with variables({"TMPDIR": str(long)}):
            with pytest.raises(embedded_lab.LabError, match="ended at once"):
                embedded_lab.up(lab.config, 1, flower=False)
            assert "too long for a unix socket" in lab.logs()
            assert leftovers(lab) == []


def test_a_service_that_came_up_is_started_again_soon_however_often_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    service = embedded_lab.Service("sleeper", command, os.environ, tmp_path / "log")
    for lived, pause in ((0.0, 1.0), (0.0, 2.0), (4.0, 0.5), (4.0, 0.5), (0.0, 1.0)):
        service.start()
        assert service.process is not None
        service.process.kill()
        service.process.wait()
        service.started -= lived
        service.tend()
        assert service.pause == pause
        service.due = 0.0
