"""Backups are made of a store in use, hold what was accepted by then, and bring it back after the lab is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from labs import KINDS, Lab, a_lab, alive, called, until
from services import STORES, new_store
from sqlalchemy import text
from store_by_hand import (
    audit_at_rest,
    builder,
    done,
    drain,
    failed,
    finish,
    jobs,
    publish,
    rows,
    sign_on,
    submit,
    take,
)

from netassay import faults
from netassay.store import backup, control, reading, running
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database
from netassay.store.transfer import NotAnExport, bring
from producer import lab as embedded_lab


def contents(database: Database) -> dict[str, list[tuple[str, str, str | None, int]]]:
    """Batch -> key, state (running counts as pending), result and attempts of its jobs, in order."""
    return {
        seen.name: [
            (one.key, "pending" if one.state == "running" else one.state, json.dumps(one.result), one.attempts)
            for one in reading.records(database, seen.name)
        ]
        for seen in reading.batches(database)
    }


def filled(database: Database, artifacts: Artifacts) -> list[str]:
    """Batches in all states, one running, with attempts, needs and files. Returns the digests of the files."""
    worker = sign_on(database)
    files = [artifacts.put(f"array {number}".encode()) for number in range(3)]
    recipe = artifacts.put(json.dumps({"dataset": f"array:{files[0]}"}).encode())
    submit(database, "done", jobs(range(30)))
    drain(database, worker, lambda task: done(task) if task.id % 3 else failed("numerical")(task))
    submit(database, "trained", builder(f"recipe:{recipe}"), jobs(range(5), recipes=(f"recipe:{recipe}",), group="a"))
    submit(database, "cancelled", jobs(range(200, 210)))
    control.cancel(database, "cancelled")
    submit(database, "paused", jobs(range(20, 40)))
    control.pause(database, "paused")
    submit(database, "open", jobs(range(100, 150), seconds=0.5), weight=2.0)
    finish(database, worker, take(database, worker))
    claim = take(database, worker)
    running.report_death(
        database, worker, claim, running.Death((claim.tasks[0].id,), 1.0, 2.0, "crash", "it died", "its log")
    )
    publish(database, most=2)
    with database.write() as connection:
        connection.execute(
            text(
                "UPDATE record SET result = :result WHERE job_id = (SELECT min(job_id) FROM record WHERE result <> '')"
            ),
            {"result": json.dumps({"one": f"array:{files[1]}", "other": f"array:{files[2]}"})},
        )
    return [*files, recipe]


@pytest.mark.parametrize("there", STORES)
@pytest.mark.parametrize("here", STORES)
def test_a_store_comes_back_as_it_was_on_either_kind(here: str, there: str, tmp_path: Path) -> None:
    kept, back = Artifacts(tmp_path / "a"), Artifacts(tmp_path / "b")
    (tmp_path / "new").mkdir()
    with new_store(here, tmp_path) as old, new_store(there, tmp_path / "new") as new:
        files = filled(old, kept)
        before = contents(old)
        shares: list[float] = []
        saved = backup.save(old, kept, tmp_path / "backups", shares.append)
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert (saved.artifacts, saved.copied, saved.missing) == (4, 4, ())
        assert saved.jobs == sum(map(len, before.values()))
        restored = backup.restore(new, back, tmp_path / "backups")
        assert (restored.batches, restored.jobs, restored.artifacts) == (saved.batches, saved.jobs, 4)
        assert contents(new) == before
        assert all(back.has(digest) for digest in files)
        assert {seen.name: (seen.state, seen.weight) for seen in reading.batches(new)} == {
            seen.name: (seen.state, seen.weight) for seen in reading.batches(old)
        }
        audit_at_rest(new)
        (identity,), (other,) = (rows(db, "SELECT value FROM lab WHERE name = 'id'") for db in (old, new))
        assert identity != other, "two labs that share keys in Redis would disturb each other"
        control.resume(new, "paused")
        control.resume(new, "cancelled")
        worker, ran = sign_on(new), []
        ran += drain(new, worker)
        assert all(state != "pending" for batch in contents(new).values() for _, state, _, _ in batch)
        ended = {key for batch in before.values() for key, state, _, _ in batch if state != "pending"}
        again = {row[0].hex() for row in rows(new, f"SELECT key FROM job WHERE id IN ({', '.join(map(str, ran))})")}
        assert not again & ended
        audit_at_rest(new)


def test_a_second_backup_copies_only_what_is_new_and_both_can_be_restored(tmp_path: Path) -> None:
    kept = Artifacts(tmp_path / "a")
    with new_store("sqlite", tmp_path) as database:
        filled(database, kept)
        first, before = backup.save(database, kept, tmp_path / "backups"), contents(database)
        files = {path: path.stat().st_ino for path in (tmp_path / "backups" / "artifacts").rglob("?" * 64)}
        assert len(files) == first.copied == 4
        submit(database, "more", builder(f"recipe:{kept.put(b'{}')}"))
        second, after = backup.save(database, kept, tmp_path / "backups"), contents(database)
        assert (second.artifacts, second.copied) == (5, 1)
        assert all(path.stat().st_ino == number for path, number in files.items())
    for path, right in ((Path(first.path), before), (tmp_path / "backups", after), (Path(second.path), after)):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        with new_store("sqlite", folder) as new:
            backup.restore(new, Artifacts(folder / "a"), path)
            assert contents(new) == right


def test_only_an_empty_store_is_restored_to_and_a_restore_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Artifacts(tmp_path / "a")
    for name in ("new", "other"):
        (tmp_path / name).mkdir()
    with new_store("sqlite", tmp_path) as old, new_store("sqlite", tmp_path / "new") as new:
        filled(old, kept)
        backup.save(old, kept, tmp_path / "backups")
        with new_store("sqlite", tmp_path / "other") as other:
            submit(other, "done", jobs(range(3)))
            with pytest.raises(backup.NotEmpty, match=r"'done'.*into an empty one"):
                backup.restore(other, kept, tmp_path / "backups")
            assert list(contents(other)) == ["done"]
        opened = 0

        def die(point: str) -> None:
            nonlocal opened
            opened += point == "import.opened"
            if opened == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(faults, "reach", die)
        with pytest.raises(KeyboardInterrupt):
            backup.restore(new, kept, tmp_path / "backups")
        monkeypatch.undo()
        assert 0 < len(contents(new)) < 5
        restored = backup.restore(new, kept, tmp_path / "backups")
        assert (restored.batches, restored.skipped) == (3, 2)
        assert contents(new) == contents(old)
        audit_at_rest(new)


def test_what_is_damaged_or_missing_is_told_and_no_batch_is_brought_back(tmp_path: Path) -> None:
    kept, folder = Artifacts(tmp_path / "a"), tmp_path / "backups"
    with new_store("sqlite", tmp_path) as old:
        filled(old, kept)
        saved = backup.save(old, kept, folder)
    manifest = Path(saved.path)
    records, a_file = manifest.with_suffix(".tar"), next((folder / "artifacts").rglob("?" * 64))
    (tmp_path / "new").mkdir()
    with new_store("sqlite", tmp_path / "new") as new:

        def refused(words: str, path: Path = folder) -> None:
            with pytest.raises(backup.NotABackup, match=words):
                backup.restore(new, Artifacts(tmp_path / "new" / "a"), path)
            assert reading.batches(new) == []

        refused("holds no backup", tmp_path)
        refused("cannot be read", tmp_path / "nowhere")
        whole = records.read_bytes()
        records.write_bytes(whole[:-700] + b"x" + whole[-699:])
        refused("other bytes than its manifest says")
        records.unlink()
        refused("cannot be read")
        records.write_bytes(whole)
        right = a_file.read_bytes()
        a_file.write_bytes(right[:-1] + b"?")
        refused("is damaged")
        a_file.unlink()
        refused("is missing in")
        a_file.write_bytes(right)
        about = manifest.read_text()
        for wrong in (about[:-20], "[]", about.replace('"version": 1', '"version": 2'), "\udc80"):
            manifest.write_text(wrong, errors="surrogateescape")
            refused("newer netassay")
        manifest.write_text(json.dumps(json.loads(about) | {"artifacts": ["../../etc/passwd"]}))
        refused("not the manifest")
        manifest.write_text(about)
        with pytest.raises(NotAnExport, match=r"part of a backup.*netassay restore"):
            bring(new, Artifacts(tmp_path / "new" / "a"), records)
        assert reading.batches(new) == []
        backup.restore(new, Artifacts(tmp_path / "new" / "a"), folder)


def test_a_backup_without_its_manifest_is_none_and_a_damaged_artifact_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, folder = Artifacts(tmp_path / "a"), tmp_path / "backups"
    with new_store("sqlite", tmp_path) as old:
        files = filled(old, kept)

        digest_of = backup._digest_of

        def die(path: Path) -> str:
            if path.suffix == ".tar":
                raise KeyboardInterrupt
            return digest_of(path)

        monkeypatch.setattr(backup, "_digest_of", die)
        with pytest.raises(KeyboardInterrupt):
            backup.save(old, kept, folder)
        monkeypatch.undo()
        assert [path.name for path in folder.iterdir()] == ["artifacts"]
        shutil.rmtree(folder)
        backup.save(old, kept, folder)
        kept.path(files[1]).write_bytes(kept.path(files[0]).read_bytes())  # another's bytes under its name
        kept.path(files[2]).unlink()
        for digest in files[1:3]:
            next((folder / "artifacts").rglob(digest)).unlink()
        saved = backup.save(old, kept, folder)
        assert sorted(saved.missing) == sorted(f"array:{digest}" for digest in files[1:3])
        assert (saved.artifacts, saved.copied) == (2, 0), "the good copy of the other one stays"
        assert len(list((folder / "artifacts").rglob("?" * 64))) == 2


# --- a lab that writes meanwhile -----------------------------------------------------------------------------------


def verb(lab: Lab, *words: str) -> dict:
    command = [sys.executable, "-m", "producer.cli", *words, "--json"]
    environment = {**os.environ, **lab.environment, **embedded_lab.environment_of(lab.config)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def emptied(lab: Lab) -> None:
    """kill -9 of all that runs, and everything the lab had is gone; the side log, which is a witness, stays."""
    processes = lab.processes()
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)
    until(lambda: not any(alive(process.pid) for process in processes), what="their end")
    witness = lab.log.read_bytes()
    shutil.rmtree(lab.home)
    shutil.rmtree(embedded_lab.Place(lab.home).runtime, ignore_errors=True)
    lab.home.mkdir()
    lab.log.write_bytes(witness)
    if lab.store:
        lab.database.dispose()
        shutil.rmtree(lab.config.artifacts_folder, ignore_errors=True)
        with lab.database.write() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        lab.database.dispose()
    else:
        lab.database.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_of_a_busy_lab_loses_nothing_that_was_accepted_before_it_began(kind: str) -> None:
    with a_lab(kind, 2, LOST_AFTER="3") as lab, tempfile.TemporaryDirectory(prefix="na-backup-") as folder:
        stop = threading.Event()
        accepted: list[str] = []

        def submit_on() -> None:
            number = 0
            while not stop.is_set():
                name = f"small-{number}"
                entry = lab.entry("diagnostics.echo", {"tag": number}, grid={"value": {"range": [0, 20]}})
                accepted.append(lab.submit(name, entry))
                number += 1

        long = lab.entry("diagnostics.sleep", {"seconds": 0.05}, grid={"tag": {"range": [0, 300]}})
        lab.submit("long", long)
        submitter = threading.Thread(target=submit_on)
        submitter.start()
        try:
            until(lambda: lab.progress("long").done > 40 and len(accepted) > 3, what="some work")
            before = list(accepted)
            saved = verb(lab, "backup", folder)
            until(lambda: len(accepted) > len(before) + 1, what="submissions after the backup")
            assert not lab.progress("long").over
        finally:
            stop.set()
            submitter.join()
        emptied(lab)
        assert not lab.database.sqlite or not Path(lab.database.url.database or "").exists()
        restored = verb(lab, "restore", folder)
        assert restored["records"] == saved["records"] >= 40
        names = [seen.name for seen in reading.batches(lab.database)]
        assert {"long", *before} <= set(names)
        ended = [called(record) for record in lab.records("long") if record.state == "done"]
        assert 40 < len(ended) < 300
        lab.up()
        lab.wait(*names, seconds=120)
        assert lab.violations(*names, takeover=True) == []
        runs = lab.runs()
        assert [name for name in ended if len(runs[name]) > 1] == [], "what had ended was run again"
