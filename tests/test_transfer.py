"""Stores travel in files: what comes out of one goes into another, whole or not at all, and no job runs again."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import services
from services import STORES
from sqlalchemy import text
from store_by_hand import (
    audit,
    audit_at_rest,
    builder,
    done,
    drain,
    failed,
    finish,
    jobs,
    number_of,
    rows,
    sign_on,
    submit,
    take,
)

from netassay.job import Segment, key_of
from netassay.store import arriving, control, dispatching, reading, running, submission, transfer
from netassay.store.arriving import Particulars
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database, StoreError
from netassay.store.running import Death, Outcome, Task
from netassay.store.submission import NameTaken
from netassay.store.transfer import BatchesDiffer, NotAnExport


@pytest.fixture(params=[*itertools.product(STORES, STORES)], ids="-to-".join)
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Database, Database]]:
    """A laptop's store and a cluster's, of every pair of kinds."""
    out, into = request.param
    (tmp_path / "laptop").mkdir()
    (tmp_path / "cluster").mkdir()
    with (
        services.new_store(out, tmp_path / "laptop") as laptop,
        services.new_store(into, tmp_path / "cluster") as cluster,
    ):
        yield laptop, cluster


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "laptop").mkdir()
    with services.new_store("sqlite", tmp_path / "laptop") as found:
        yield found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "cluster").mkdir()
    with services.new_store("sqlite", tmp_path / "cluster") as found:
        yield found


@pytest.fixture
def files(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "laptop" / "artifacts")


@pytest.fixture
def shared(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "cluster" / "artifacts")


TABLES = {
    "jobs": "SELECT j.key, v.name, v.version, j.params FROM job j JOIN method_version v ON v.id = j.method_id",
    "records": "SELECT j.key, r.state, r.cause, r.message, r.result, r.seconds, r.finished_at, r.inputs, w.name, p.body"
    " FROM record r JOIN job j ON j.id = r.job_id LEFT JOIN worker w ON w.id = r.worker_id"
    " LEFT JOIN provenance p ON p.id = r.provenance_id",
    "attempts": "SELECT j.key, a.token, a.started_at, a.ended_at, a.cause, a.alone, a.message, a.log, a.spent, w.name"
    " FROM attempt a JOIN job j ON j.id = a.job_id LEFT JOIN worker w ON w.id = a.worker_id",
    "losses": "SELECT j.key, l.losses FROM worker_loss l JOIN job j ON j.id = l.job_id",
    "members": "SELECT b.name, m.ordinal, j.key FROM membership m JOIN job j ON j.id = m.job_id"
    " JOIN batch b ON b.id = m.batch_id",
    "batches": "SELECT name, digest, state, reason, judged, weight, size, submitted_at, note FROM batch",
    "segments": "SELECT b.name, s.start, s.stop, v.name, s.label, s.hint, s.time_limit, s.memory_limit, s.group_size,"
    " s.libraries FROM segment s JOIN batch b ON b.id = s.batch_id JOIN method_version v ON v.id = s.method_id",
    "names": "SELECT b.name, n.reference, n.name FROM reference_name n JOIN batch b ON b.id = n.batch_id",
    "needs": "SELECT b.name, s.start, n.reference, j.key FROM need n JOIN segment s ON s.id = n.segment_id"
    " JOIN batch b ON b.id = s.batch_id JOIN job j ON j.id = n.job_id",
}


def contents(database: Database) -> dict[str, list[str]]:
    """All that a store says, without the ids that only it knows."""

    def plain(value: object) -> object:
        return bytes(value).hex() if isinstance(value, bytes | memoryview) else value

    return {
        table: sorted(repr([plain(value) for value in row]) for row in rows(database, query))
        for table, query in TABLES.items()
    }


RECIPE = "recipe:" + hashlib.sha256(b"{}").hexdigest()


def lived_in(database: Database, files: Artifacts) -> list[Segment]:
    """A store with a history: done, not applicable, failed in two ways, deaths, losses, needs, names, notes, and a
    second batch that shares jobs with the first, half done, with jobs in a worker's hands."""
    array, network = files.put(b"an array"), files.put(b"a network")
    assert files.put(b"{}") == RECIPE[7:]

    def end(task: Task) -> Outcome:
        number = number_of(task)
        if number < 0:
            return Outcome(task.id, "done", result=f'{{"network":"onnx:{network}"}}', seconds=0.5)
        if number == 1:
            return Outcome(task.id, "not_applicable", message='no: \u2028 "quoted"')
        if number in (2, 3):
            return Outcome(task.id, "failed", "numerical" if number == 2 else "time", "over")
        return Outcome(task.id, "done", result=f'{{"a":"array:{array}","x":{{"float":"nan"}},"b":{number / 7!r}}}')

    segments = [builder(RECIPE), jobs(range(8), recipes=(RECIPE,), group="mine"), jobs(range(8), method="other.one")]
    submission.submit(database, "first", segments, {RECIPE: "mine"}, Particulars(2.5, "a note", "ada", ("x", "y=1")))
    worker = sign_on(database, "laptop worker")
    provenance = running.provenance_id(database, "d" * 64, '{"host":"laptop"}')
    claim = take(database, worker)
    running.report_death(
        database, worker, claim, Death(tuple(t.id for t in claim.tasks), 1.5, 2.5, "crash", "died", "last words")
    )
    running.finish(database, worker, claim, [end(task) for task in claim.tasks], provenance)
    drain(database, worker, end)
    submit(database, "second", jobs(range(4, 40)))
    finish(database, worker, take(database, worker), end)
    take(database, worker)  # in hand while the store is exported
    with database.write() as connection:
        connection.execute(text("INSERT INTO worker_loss (job_id, losses) SELECT max(id), 2 FROM job"))
    return segments


def test_what_goes_out_comes_in_the_same_to_the_byte(
    stores: tuple[Database, Database], files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    laptop, cluster = stores
    segments = lived_in(laptop, files)
    out = transfer.export(laptop, files, tmp_path / "lab.tar")
    assert (out.batches, out.jobs, out.artifacts, out.missing) == (2, 17 + 36, 3, ())
    brought = transfer.bring(cluster, shared, tmp_path / "lab.tar")
    assert (brought.batches, brought.skipped, brought.jobs, brought.artifacts) == (2, 0, 53, 3)
    assert contents(cluster) == contents(laptop)
    assert {file.digest for file in shared.list()} == {file.digest for file in files.list()}
    audit(cluster)
    before = contents(cluster)
    again = transfer.bring(cluster, shared, tmp_path / "lab.tar")
    assert (again.batches, again.skipped, again.new, again.records, again.attempts, again.artifacts) == (
        0,
        2,
        0,
        0,
        0,
        0,
    )
    assert contents(cluster) == before
    # Nothing that is done runs again, and what was under way or waiting goes on.
    assert submission.submit(cluster, "first", segments, {}).already
    ran = drain(cluster, sign_on(cluster), done)
    ended = len(rows(laptop, "SELECT job_id FROM record"))
    assert len(ran) == len(set(ran)) == len(rows(cluster, "SELECT id FROM job")) - ended
    audit_at_rest(cluster)
    assert {seen.state for seen in reading.batches(cluster)} == {"finished"}


def test_jobs_that_are_known_are_used_and_their_records_stay(
    stores: tuple[Database, Database], files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    laptop, cluster = stores
    for database in stores:
        submit(
            database,
            "padding" if database is cluster else "other",
            jobs(range(100, 103 if database is cluster else 109)),
        )
        drain(database, sign_on(database))
    submit(laptop, "a", jobs(range(10)))
    drain(laptop, sign_on(laptop), lambda task: failed("time")(task) if number_of(task) < 4 else done(task))
    submit(cluster, "here", jobs(range(2, 7)))
    worker = sign_on(cluster)
    first = take(cluster, worker)
    finish(cluster, worker, first, lambda task: Outcome(task.id, "done", result='{"n":"of the cluster"}'))
    transfer.export(laptop, files, tmp_path / "lab.tar", ["a"])
    brought = transfer.bring(cluster, shared, tmp_path / "lab.tar")
    assert (brought.jobs, brought.new) == (10, 5)
    audit(cluster)
    found = {record.params["n"]: record for record in reading.records(cluster, "a")}
    mine = [record.params["n"] for record in found.values() if record.result == {"n": "of the cluster"}]
    assert mine == [number_of(task) for task in first.tasks] == [2]
    # 0 and 1 failed there, and nobody here asks for them; 3 is asked for here, and gets its chance.
    assert {n: found[n].state for n in range(7)} == {
        0: "failed", 1: "failed", 2: "done", 3: "pending", 4: "done", 5: "done", 6: "done",
    }  # fmt: skip
    drain(cluster, worker)
    audit_at_rest(cluster)


def test_batches_of_one_name_and_other_jobs_are_refused_together_or_renamed(
    laptop: Database, cluster: Database, files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    for name, numbers in (("a", range(3)), ("b", range(4)), ("c", range(5))):
        submit(laptop, name, jobs(numbers))
    submit(cluster, "b", jobs(range(9)))
    files.put(b"of nobody")
    transfer.export(laptop, files, tmp_path / "lab.tar")
    before = contents(cluster)
    with pytest.raises(BatchesDiffer, match=r"'b' with other jobs.*--rename"):
        transfer.bring(cluster, shared, tmp_path / "lab.tar")
    assert contents(cluster) == before
    for count in (3, 0):
        brought = transfer.bring(cluster, shared, tmp_path / "lab.tar", rename="-laptop")
        assert (brought.batches, brought.artifacts) == (count, 0)
    assert [seen.name for seen in reading.batches(cluster)] == ["c", "b-laptop", "a", "b"]
    submit(cluster, "b-laptop", jobs(range(4)))
    with pytest.raises(NameTaken):
        submit(cluster, "b-laptop", jobs(range(5)))


KILLED = """
from pathlib import Path
from netassay.store import transfer
from netassay.store.artifacts import Artifacts
from netassay.store.database import Database, StoreError
import sys
transfer.bring(Database(sys.argv[1]), Artifacts(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_suffix_that_makes_no_name_is_refused_before_anything_is_stored(
    laptop: Database, cluster: Database, files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    lived_in(laptop, files)
    transfer.export(laptop, files, tmp_path / "lab.tar")
    submit(cluster, "first", jobs([99]))
    with pytest.raises(StoreError, match=r"cannot be called 'first\\nhere': the name holds '\\n', which cannot be"):
        transfer.bring(cluster, shared, tmp_path / "lab.tar", rename="\nhere")
    assert not list(shared.list())
    assert [batch.name for batch in reading.batches(cluster)] == ["first"]


@pytest.mark.parametrize("point, there", [("import.arriving", 0), ("import.opened", 1)])
@pytest.mark.parametrize("store", STORES)
def test_a_killed_import_shows_whole_batches_only_and_the_next_one_does_the_rest(
    store: str, point: str, there: int, laptop: Database, files: Artifacts, tmp_path: Path
) -> None:
    lived_in(laptop, files)
    transfer.export(laptop, files, tmp_path / "lab.tar")
    (tmp_path / "cluster").mkdir()
    shared = Artifacts(tmp_path / "cluster" / "artifacts")
    with services.new_store(store, tmp_path / "cluster") as cluster:
        died = subprocess.run(
            [sys.executable, "-c", KILLED, cluster.url.render_as_string(hide_password=False), str(shared.folder),
             str(tmp_path / "lab.tar")],
            env=os.environ | {"NETASSAY_CRASH_AT": point, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert died.returncode == -9
        assert len(reading.batches(cluster)) == there
        seen = sum(1 for _ in reading.find(cluster, reading.Query()))
        assert seen == (17 if there else 0)
        brought = transfer.bring(cluster, shared, tmp_path / "lab.tar")
        assert (brought.batches, brought.skipped) == (2 - there, there)
        with cluster.write() as connection:
            connection.execute(text("UPDATE batch SET submitted_at = 0 WHERE state = 'arriving'"))
        arriving.discard_abandoned(cluster)
        assert contents(cluster) == contents(laptop)
        audit(cluster)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def sealed(found: dict[str, bytes]) -> dict[str, bytes]:
    """As a careful forger would leave it: all digests of tables, and the seal, made anew."""
    manifest = json.loads(found["manifest.json"])
    manifest["members"] = {name: hashlib.sha256(found[name]).hexdigest() for name in found if name.endswith(".gz")}
    found["manifest.json"] = json.dumps(manifest).encode()
    found["manifest.sha256"] = hashlib.sha256(found["manifest.json"]).hexdigest().encode()
    return found


def change(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def forge(found: dict[str, bytes]) -> dict[str, bytes]:
        packed = name.endswith(".gz")
        body = gzip.decompress(found[name]) if packed else found[name]
        assert old in body
        body = body.replace(old, new, 1)
        return sealed(found | {name: gzip.compress(body) if packed else body})

    return forge


def edit(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Another manifest under a right seal."""
    return change("manifest.json", old, new)


def artifact(found: dict[str, bytes]) -> dict[str, bytes]:
    name = next(name for name in found if name.startswith("artifacts/"))
    return found | {name: found[name][:-1] + b"?"}


def lines(found: dict[str, bytes], name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(found[name]).splitlines()]


def first(table: str, /, **fields: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Other values in the first line of a table."""

    def forge(found: dict[str, bytes]) -> dict[str, bytes]:
        line, *others = lines(found, table)
        body = b"".join(json.dumps(one).encode() + b"\n" for one in [line | fields, *others])
        return sealed(found | {table: gzip.compress(body)})

    return forge


def head(**fields: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Other values of the first batch in the manifest."""

    def forge(found: dict[str, bytes]) -> dict[str, bytes]:
        manifest = json.loads(found["manifest.json"])
        manifest["batches"][0] |= fields
        return sealed(found | {"manifest.json": json.dumps(manifest).encode()})

    return forge


def params(text: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """A job with these params, under the key and in a batch of the digest that it then has."""

    def forge(found: dict[str, bytes]) -> dict[str, bytes]:
        jobs, segment = lines(found, JOBS), lines(found, SEGMENTS)[1]
        place = segment["start"]
        jobs[place] |= {"params": text, "key": key_of(segment["method"], segment["version"], text).hex()}
        keys = b"".join(bytes.fromhex(job["key"]) for job in jobs)
        body = b"".join(json.dumps(job).encode() + b"\n" for job in jobs)
        digest = hashlib.blake2b(keys, digest_size=16).hexdigest()
        return head(digest=digest)(found | {JOBS: gzip.compress(body)})

    return forge


JOBS, SEGMENTS, NAMES = (f"batches/000001/{table}.jsonl.gz" for table in ("jobs", "segments", "names"))
FORGED: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "params under another job's key": (change(JOBS, rb'{\"n\":3}', rb'{\"n\":9}'), "is not that of its job"),
    "a result that is no JSON": (change(JOBS, rb'"result":"{', b'"result":"['), "no JSON object"),
    "a result with a number that readers choke on": (
        change(JOBS, rb'"result":"{', rb'"result":"{\"n\":{\"float\":[]},'), "`result` of job .* is no JSON object"),
    "a result with half a surrogate pair": (
        change(JOBS, rb'"result":"{', rb'"result":"{\"n\":\"\\ud800\",'), "`result` of job .* is no JSON object"),
    "params that are a list": (params("[1]"), "`params` of job .* is no JSON object"),
    "params that are not finite": (params('{"n":NaN}'), "`params` of job .* is no JSON object"),
    "params without end": (params("[" * 100_000), "`params` of job .* is no JSON object"),
    "a label with a NUL": (first(SEGMENTS, label="\0"), "NUL"),
    "groups of no jobs": (first(SEGMENTS, group_size=0), "group_size: Input should be greater"),
    "more memory than a database keeps": (first(SEGMENTS, memory_limit=10**20), "memory_limit: Input should be less"),
    "an endless hint": (first(SEGMENTS, hint=math.inf), "hint: Input should be a finite number"),
    "a name with a NUL": (first(NAMES, name="\0"), "NUL"),
    "a name with half a surrogate pair": (first(NAMES, name="\ud800"), "makes no sense"),
    "a host with a NUL": (first("workers.jsonl.gz", host="\0"), "NUL"),
    "a process that no host has": (first("workers.jsonl.gz", pid=2**40), "pid: Input should be less"),
    "provenance that is a list": (first("provenance.jsonl.gz", body="[1]"), "provenance 1 is no JSON object"),
    "a weight of 0": (head(weight=0), "batches.0.weight: Input should be greater than or equal to 0.001"),
    "a weight that is no number": (head(weight=math.nan), "batches.0.weight: Input should be a finite number"),
    "a batch without a name": (head(name=""), "the name is empty"),
    "a batch with a name that cannot be printed": (head(name="\x1b[2J"), "cannot be printed"),
    "a note with a NUL": (head(note="\0"), "NUL"),
    "a note of a book": (head(note="a" * 20_000), "the note has 20,000 characters"),
    "a reason with half a surrogate pair": (head(reason="\ud800"), "makes no sense"),
    "a NUL": (change(JOBS, b'"message":"over"', rb'"message":"\u0000"'), "NUL"),
    "a state that does not exist": (change(JOBS, b'"state":"done"', b'"state":"well"'), "makes no sense"),
    "a line that is no JSON": (change(JOBS, b'{"key"', b'{key'), "makes no sense"),
    "a field more": (change(JOBS, b'{"key"', b'{"extra":1,"key"'), "makes no sense"),
    "jobs in another order": (
        lambda found: sealed(found | {JOBS: gzip.compress(b"".join(
            sorted(gzip.decompress(found[JOBS]).splitlines(keepends=True))))}),
        "not that of its job|builds no recipe|do not fit",
    ),
    "segments with a hole": (
        change("batches/000001/segments.jsonl.gz", b'"start":9', b'"start":10'), "do not fit together"),
    "a need that nothing builds": (
        change("batches/000001/segments.jsonl.gz", RECIPE.encode(), b"recipe:" + b"0" * 64), "do not fit together"),
    "another digest of the batch": (
        edit(b'"digest": "', b'"digest": "00'),
        "not those of its digest",
    ),
    "an artifact with other bytes": (artifact, "not those of its digest"),
    "an artifact less": (
        lambda found: {n: b for n, b in found.items() if n != next(n for n in found if n.startswith("artifacts/"))},
        "holds 2 artifacts"),
    "a table with other bytes": (lambda found: found | {JOBS: gzip.compress(b"")}, "not those of its digest"),
    "a table less": (lambda found: {n: b for n, b in found.items() if n != JOBS}, "not those of its manifest"),
    "a manifest that was edited": (
        lambda found: found | {"manifest.json": found["manifest.json"].replace(b"a note", b"a vote")}, "was changed"),
    "no end": (lambda found: {n: b for n, b in found.items() if n != "manifest.sha256"}, "its end is missing"),
    "a way out of the folder": (lambda found: {"../../escaped": b"!", **found}, "which no export does"),
    "an absolute path": (lambda found: {"/tmp/escaped": b"!", **found}, "which no export does"),
    "a way out under a known name": (lambda found: {"artifacts/../../escaped": b"!", **found}, "which no export does"),
    "a newer format": (
        edit(b'"version": 2', b'"version": 3'),
        "newer netassay"),
}  # fmt: skip


FORGED |= {
    "a submitter who cannot be printed": (head(submitter="\x1b[2J"), "nobody can be called"),
    "a tag of two words": (head(tags=["two words"]), "is no tag"),
}


def write(path: Path, found: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, body in found.items():
            about = tarfile.TarInfo(name)
            about.size = len(body)
            archive.addfile(about, io.BytesIO(body))


@pytest.fixture
def exported(laptop: Database, files: Artifacts, tmp_path: Path) -> Path:
    lived_in(laptop, files)
    transfer.export(laptop, files, tmp_path / "lab.tar")
    return tmp_path / "lab.tar"


@pytest.mark.parametrize("forge, words", FORGED.values(), ids=FORGED)
def test_a_file_that_was_tampered_with_is_refused_and_nothing_is_written(
    forge: Callable[[dict[str, bytes]], dict[str, bytes]],
    words: str,
    exported: Path,
    cluster: Database,
    shared: Artifacts,
    tmp_path: Path,
) -> None:
    write(tmp_path / "same.tar", members(exported))
    write(tmp_path / "forged.tar", forge(members(exported)))
    with pytest.raises(NotAnExport, match=words):
        transfer.bring(cluster, shared, tmp_path / "forged.tar")
    assert not any(contents(cluster).values())
    assert not list(shared.list())
    assert not list(tmp_path.rglob("escaped"))
    assert transfer.bring(cluster, shared, tmp_path / "same.tar").batches == 2  # it was the forgery that was refused


def test_a_file_of_the_first_format_is_still_read(
    exported: Path, cluster: Database, shared: Artifacts, tmp_path: Path
) -> None:
    found = members(exported)
    manifest = json.loads(found["manifest.json"]) | {"version": 1}
    for batch in manifest["batches"]:
        del batch["submitter"], batch["tags"]
    write(tmp_path / "first.tar", sealed(found | {"manifest.json": json.dumps(manifest).encode()}))
    assert transfer.bring(cluster, shared, tmp_path / "first.tar").batches == 2
    assert rows(cluster, "SELECT DISTINCT submitter, tags FROM batch") == [("", "")]


def test_links_in_the_file_are_refused(exported: Path, cluster: Database, shared: Artifacts, tmp_path: Path) -> None:
    with tarfile.open(exported, "a") as archive:
        link = tarfile.TarInfo("artifacts/" + "0" * 64)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(NotAnExport, match="which no export does"):
        transfer.bring(cluster, shared, exported)


def test_a_file_cut_short_anywhere_is_refused(
    exported: Path, cluster: Database, shared: Artifacts, tmp_path: Path
) -> None:
    whole = exported.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for part in (0, 1, 511, 700, end // 3, end // 2, end - 600, end - 1):
        (tmp_path / "cut.tar").write_bytes(whole[:part])
        with pytest.raises(NotAnExport):
            transfer.bring(cluster, shared, tmp_path / "cut.tar")
    assert not any(contents(cluster).values())


@pytest.mark.parametrize(
    "body", [b"", b"jobs: {method: diagnostics.echo}", b"SQLite format 3\0" * 100, os.urandom(9999)]
)
def test_foreign_files_are_refused(body: bytes, cluster: Database, shared: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(body)
    with pytest.raises(NotAnExport):
        transfer.bring(cluster, shared, tmp_path / "foreign")
    with pytest.raises(NotAnExport, match="No such file"):
        transfer.bring(cluster, shared, tmp_path / "nowhere")


def test_an_export_is_one_moment_and_appears_when_it_is_whole(
    laptop: Database, files: Artifacts, tmp_path: Path
) -> None:
    submit(laptop, "a", jobs(range(50)))
    worker = sign_on(laptop)
    path = tmp_path / "lab.tar"

    def meanwhile(share: float) -> None:
        assert not path.exists()
        drain(laptop, worker)

    out = transfer.export(laptop, files, path, progress=lambda share: meanwhile(share) if share < 0.95 else None)
    assert (out.jobs, out.records) == (50, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lab.tar", "laptop"]
    assert transfer.export(laptop, files, path).records == 50


def test_only_files_are_replaced_and_links_are_followed(laptop: Database, files: Artifacts, tmp_path: Path) -> None:
    lived_in(laptop, files)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "ring").symlink_to("ring")
    for name in ("folder", "pipe", "to-pipe", "ring", "nowhere/lab.tar"):
        with pytest.raises(transfer.BadTarget):
            transfer.export(laptop, files, tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("folder/lab.tar")
    transfer.export(laptop, files, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["lab.tar"]
    transfer.export(laptop, files, tmp_path / f"{250 * 'x'}.tar")


def test_artifacts_that_are_lost_or_damaged_are_named_and_the_rest_travels(
    laptop: Database, cluster: Database, files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    lived_in(laptop, files)
    lost, damaged = files.put(b"an array"), files.put(b"a network")
    files.remove(lost)
    files.path(damaged).write_bytes(b"bit rot")
    out = transfer.export(laptop, files, tmp_path / "lab.tar")
    assert set(out.missing) == {f"array:{lost}", f"onnx:{damaged}"}
    assert transfer.bring(cluster, shared, tmp_path / "lab.tar").batches == 2
    assert [file.digest for file in shared.list()] == [RECIPE[7:]]


def test_states_of_batches_travel(
    laptop: Database, cluster: Database, files: Artifacts, shared: Artifacts, tmp_path: Path
) -> None:
    for name in ("open", "paused", "cancelled", "finished"):
        submit(laptop, name, jobs(range(5), method=f"some.{name}"))
    control.pause(laptop, "paused")
    control.cancel(laptop, "cancelled")
    control.pause(laptop, "open")
    drain(laptop, sign_on(laptop))
    control.resume(laptop, "open")
    transfer.export(laptop, files, tmp_path / "lab.tar")
    transfer.bring(cluster, shared, tmp_path / "lab.tar")
    assert {seen.name: seen.state for seen in reading.batches(cluster)} == {
        name: name for name in ("open", "paused", "cancelled", "finished")
    }
    assert len(drain(cluster, sign_on(cluster))) == 5
    audit_at_rest(cluster)
    dispatching.finish_batches(cluster)
    assert key_of("some.open", 1, '{"n":0}') in {bytes(key) for (key,) in rows(cluster, "SELECT key FROM job")}
