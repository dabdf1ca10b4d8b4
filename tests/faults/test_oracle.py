"""The oracle itself, on cases made by hand: silent where all is well, and outspoken where something is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import text
from store_by_hand import publish, sign_on

from netassay.settings import Settings
from netassay.store import running
from netassay.store.database import Database
from producer import submission

from . import oracle
from .accidents import Hit
from .oracle import Case, Verdict
from .witness import Run
from .workload import Batch, Stream


@dataclass
class Scene:
    """Six echoes, done in order by one worker in process 7, its child 70, with a side log that says so."""

    database: Database
    batch: Batch
    runs: dict[str, list[Run]] = field(default_factory=dict)
    hits: list[Hit] = field(default_factory=list)
    lost: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    snapshots: list[tuple[float, dict[int, tuple]]] = field(default_factory=list)

    def judged(self) -> Verdict:
        witness = SimpleNamespace(runs=self.runs, parent={70: 7, 80: 8})
        return oracle.judge(Case([self.batch], self.hits, witness, self.database, self.lost, self.snapshots))  # type: ignore[arg-type]

    def change(self, statement: str) -> None:
        with self.database.write() as connection:
            connection.execute(text(statement))

    def name(self, value: int) -> str:
        return f"echo {value} 5"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    database = Database(f"sqlite:///{tmp_path / 'store.sqlite'}")
    database.prepare()
    stream = Stream(1, tmp_path / "side.log", "r1")
    batch = Batch("made", [], {})
    one = {"method": "diagnostics.echo", "params": {"tag": 5}, "grid": {"value": {"range": [0, 6]}}}
    batch.entries = [stream.add(batch, one, ("done",))]
    submission.submit(batch.write(tmp_path), Settings(home=tmp_path))
    batch.tries, batch.accepted = 1, 0.0
    worker = sign_on(database)
    found = Scene(database, batch)
    while messages := publish(database):
        for message in messages:
            claim = running.claim(database, worker, message.chunk_id)
            assert claim is not None
            values = [json.loads(task.params)["value"] for task in claim.tasks]
            results = [json.dumps({"value": value, "square": value * value}) for value in values]
            ends = [running.Outcome(t.id, "done", result=r) for t, r in zip(claim.tasks, results, strict=True)]
            running.finish(database, worker, claim, ends)
            found.runs |= {found.name(v): [Run(found.name(v), 70, 10.0 + v, 10.5 + v)] for v in values}
    yield found
    database.dispose()


def test_of_a_round_in_which_all_went_well_it_says_nothing(scene: Scene) -> None:
    verdict = scene.judged()
    assert verdict.violations == []
    assert (verdict.jobs, verdict.runs) == (6, 6)


def test_a_job_without_an_end_is_lost(scene: Scene) -> None:
    scene.change("DELETE FROM record WHERE job_id = 2")
    verdict = scene.judged()
    assert verdict.lost == ["echo 1 5 never ended (pending)"]
    assert verdict.other == ["made counts 6 done, its records say 5"]


def test_a_batch_that_was_accepted_and_is_gone_is_lost(scene: Scene) -> None:
    scene.change("UPDATE batch SET name = 'another'")
    assert "batch made was accepted and is not there" in scene.judged().lost[0]


def test_a_wrong_value_is_told(scene: Scene) -> None:
    scene.change("""UPDATE record SET result = '{"value": 1, "square": 2}' WHERE job_id = 2""")
    assert scene.judged().violations == [
        "echo 1 5 has the result {'value': 1, 'square': 2}, not {'value': 1, 'square': 1}"
    ]


def test_an_innocent_that_failed_is_told(scene: Scene) -> None:
    scene.change("UPDATE record SET state = 'failed', cause = 'crash', result = NULL WHERE job_id = 2")
    assert scene.judged().other[-1].startswith("echo 1 5 ended failed:crash, not done")


def test_two_runs_at_the_same_time_are_doubled_unless_a_takeover_is_on_record(scene: Scene) -> None:
    scene.runs[scene.name(3)].append(Run(scene.name(3), 80, 13.2, 13.7))
    scene.hits.append(Hit("worker stopped", False, 12.9, 20.0, (7,), (7,)))
    assert "ran twice at the same time" in scene.judged().doubled[0]
    scene.lost[7] = [(11.0, 12.0), (13.3, 13.4)]
    assert "ran twice at the same time" in scene.judged().doubled[0], "given up before the one, and after the other"
    scene.lost[7] = [(13.0, 13.4)]
    verdict = scene.judged()
    assert (verdict.violations, verdict.taken_over) == ([], 1)


def test_a_second_whole_run_is_doubled_unless_an_accident_explains_it(scene: Scene) -> None:
    scene.runs[scene.name(3)].append(Run(scene.name(3), 80, 30.0, 30.5))
    assert "was started 2 times" in scene.judged().doubled[0]
    scene.hits.append(Hit("worker killed", True, 13.6, 13.6, (7,), (7,)))
    verdict = scene.judged()
    assert (verdict.violations, verdict.again) == ([], 1)


def test_a_run_cut_short_by_a_kill_does_not_overlap_what_follows(scene: Scene) -> None:
    scene.runs[scene.name(3)] = [Run(scene.name(3), 70, 13.0, None, 13.45), Run(scene.name(3), 80, 13.4, 13.9)]
    scene.hits.append(Hit("worker killed", True, 13.3, 13.3, (7,), (7,)))
    assert scene.judged().violations == []


def test_a_process_that_died_between_two_late_looks_did_not_run_until_the_second(scene: Scene) -> None:
    name = scene.name(3)
    scene.hits.append(Hit("worker killed", True, 12.0, 12.0, (7,), (7,)))
    scene.runs[name] = [Run(name, 70, 13.0, None, 14.8, 13.2), Run(name, 80, 14.0, 14.5)]
    assert scene.judged().violations == []
    scene.runs[name][0].lived = 14.7
    assert "ran twice at the same time" in scene.judged().doubled[0]


def test_more_starts_than_a_chunk_mate_may_have_are_told(scene: Scene) -> None:
    name = scene.name(3)
    scene.change(
        "INSERT INTO attempt (job_id, chunk_id, token, started_at, ended_at, cause, alone, message, log)"
        " VALUES (4, 1, '', 0, 0, 'crash', 0, '', '')"
    )
    scene.runs[name] = [Run(name, 70, 13.0, None, 13.1), Run(name, 70, 14.0, 14.5)]
    assert scene.judged().violations == []
    scene.runs[name].append(Run(name, 70, 15.0, 15.5))
    assert scene.judged().doubled == [f"{name} was started 3 times; 2 are allowed"]


def test_counters_that_differ_from_the_rows_are_told(scene: Scene) -> None:
    scene.change("UPDATE chunk SET done = done + 1 WHERE id = 1")
    assert scene.judged().other == ["made counts 7 done, its records say 6"]


def test_what_starts_late_after_a_cancellation_or_runs_on_is_told(scene: Scene) -> None:
    scene.batch.cancelled, scene.batch.watched = 12.5, True
    said = scene.judged().other
    assert [words for words in said if "started" in words] == [f"{scene.name(5)} started 2.5 s after its cancellation"]
    scene.runs[scene.name(2)][0].stop = 19.0
    assert f"{scene.name(2)} still ran 5 s after its cancellation" in scene.judged().other


def test_a_record_that_changes_is_told(scene: Scene) -> None:
    scene.snapshots = [(20.0, {4: (1.0, 1, "done")}), (24.0, {4: (1.0, 1, "done")}), (28.0, {4: (2.0, 2, "done")})]
    assert "the record of echo 3 5 was overwritten" in scene.judged().doubled[0]
    scene.hits = [Hit("PostgreSQL crashed", True, 22.0, 23.0, store=True, forgets=True)]
    assert scene.judged().violations == [], "what it was told two seconds before, it may forget"
    scene.hits = [Hit("PostgreSQL crashed", True, 26.0, 27.0, store=True, forgets=True)]
    assert scene.judged().doubled, "six seconds are too long"


def test_a_job_nobody_submitted_is_told(scene: Scene) -> None:
    del scene.batch.jobs[scene.name(5)]
    assert "made holds echo 5 5, which nobody submitted" in scene.judged().other
