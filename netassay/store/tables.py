"""The tables of the store.

A job row never changes: its outcome is a row of `record`, its execution a row of `running`. So its state is

    done | not_applicable | failed   a record says so
    running                          it is in `running`
    pending                          neither

`running` is the lock as well: its primary key is the job, so no two chunks run one job at a time, whichever batches
they belong to. A chunk is claimed by writing a token into it; everything its holder writes later is fenced by that
token.

A batch is a list of jobs (`membership`), cut at submission into segments: consecutive jobs of one method with the same
networks and limits. The dispatcher cuts chunks from segments. Each chunk row counts the settled jobs of its own range;
a batch's counters are the sum over its chunks.
"""

from __future__ import annotations

import secrets

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, sqlite_where=text(where), postgresql_where=text(where))


lab = Table(
    "lab",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
    comment="id (of the lab, at random), incarnation (of Redis); counters: next_job (first free job id), published,"
    " claimed (publication serials)",
)

method_version = Table(
    "method_version",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("seconds", Float, comment="newest measured seconds a job, for each that it predicted"),
    Index("method_version_name", "name", "version", unique=True),
)

job = Table(
    "job",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
    Column("method_id", Integer, nullable=False),
    Column("params", Text, nullable=False, comment="canonical JSON"),
)

job_key = Table(
    "job_key",
    metadata,
    Column("key", LargeBinary, primary_key=True),
    Column("job_id", _Id, nullable=False),
    sqlite_with_rowid=False,
    comment="apart from job, and filled in sorted order: a random digest as clustered key is five times slower",
)

batch = Table(
    "batch",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", LargeBinary, nullable=False, comment="of the ordered keys"),
    Column("state", Text, nullable=False, comment="arriving, open, paused, cancelled, finished"),
    Column("reason", Text, nullable=False, server_default="", comment="why it paused itself"),
    Column("judged", Integer, nullable=False, server_default="0", comment="1: its first jobs were looked at"),
    Column("weight", Float, nullable=False, server_default="1"),
    Column("size", Integer, nullable=False),
    Column("submitted_at", Float, nullable=False, comment="seconds since 1970"),
    Column("note", Text, nullable=False, server_default="", comment="whatever its submitter wants remembered"),
    Column("submitter", Text, nullable=False, server_default="", comment="who submitted it; empty: not known"),
    Column("tags", Text, nullable=False, server_default="", comment="words, separated by spaces"),
    # One name, one batch; while arriving, rival submissions of one name may coexist and the first to open wins.
    _partial("batch_name", "name", where="state <> 'arriving'", unique=True),
    sqlite_autoincrement=True,
)

submitter = Table(
    "submitter",
    metadata,
    Column("name", Text, primary_key=True),
    Column("weight", Float, nullable=False),
    comment="submitters whose share of the slots is not the usual 1",
)

segment = Table(
    "segment",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("batch_id", _Id, ForeignKey("batch.id"), nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    Column("next", Integer, nullable=False, comment="first ordinal not yet cut into a chunk"),
    Column("method_id", Integer, nullable=False),
    Column("label", Text, nullable=False, comment="what its jobs share, for people"),
    Column("hint", Float, nullable=False, comment="predicted seconds a job, by the method"),
    Column("seconds", Float, comment="measured seconds a job"),
    Column("time_limit", Float, nullable=False, comment="seconds a job"),
    Column("memory_limit", BigInteger, comment="bytes a job; NULL: the host decides"),
    Column("group_size", Integer, nullable=False),
    Column("libraries", Text, nullable=False, comment="imported before limits are set, separated by spaces"),
    Column("waiting", Integer, nullable=False, comment="1: needs jobs that are not known to be done"),
    Index("segment_batch", "batch_id", "start"),
    # A batch may have a segment a job (one network each): what comes next must not be looked for among all of them.
    # Queries use these only where they repeat the very words of the condition.
    _partial("segment_fresh", "batch_id", "start", where="waiting = 0 AND next = start"),
    _partial("segment_left", "batch_id", "start", where="waiting = 0 AND next < stop"),
    _partial("segment_waiting", "id", where="waiting = 1"),
)

need = Table(
    "need",
    metadata,
    Column("segment_id", _Id, ForeignKey("segment.id"), primary_key=True),
    Column("reference", Text, primary_key=True, comment="recipe"),
    Column("job_id", _Id, nullable=False, index=True, comment="the job that builds it"),
    sqlite_with_rowid=False,
)

membership = Table(
    "membership",
    metadata,
    Column("batch_id", _Id, primary_key=True, autoincrement=False),
    Column("ordinal", Integer, primary_key=True, autoincrement=False),
    Column("job_id", _Id, nullable=False),
    Index("membership_job", "job_id"),
    sqlite_with_rowid=False,
)

reference_name = Table(
    "reference_name",
    metadata,
    Column("batch_id", _Id, primary_key=True, autoincrement=False),
    Column("reference", Text, primary_key=True),
    Column("name", Text, nullable=False, comment="as the user called it"),
    sqlite_with_rowid=False,
)

chunk = Table(
    "chunk",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("segment_id", _Id, nullable=False),
    Column("batch_id", _Id, nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    Column("state", Text, nullable=False, comment="ready, blocked, published, claimed, finished"),
    Column("serial", BigInteger, comment="order of publication"),
    Column("token", Text),
    Column("worker_id", _Id),
    Column("current", Text, comment="ids of the jobs its child runs now, as last reported: for people"),
    Column("done", Integer, nullable=False, server_default="0"),
    Column("not_applicable", Integer, nullable=False, server_default="0"),
    Column("failed", Integer, nullable=False, server_default="0"),
    Index("chunk_batch", "batch_id"),
    # Not partial: SQLite would use one on "state <> 'finished'" only for queries that repeat those very words.
    Index("chunk_state", "state", "batch_id"),
    sqlite_autoincrement=True,
)

running = Table(
    "running",
    metadata,
    Column("job_id", _Id, primary_key=True, autoincrement=False),
    Column("chunk_id", _Id, nullable=False, index=True),
)

record = Table(
    "record",
    metadata,
    Column("job_id", _Id, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False, comment="done, not_applicable, failed"),
    Column("cause", Text, nullable=False, server_default=""),
    Column("message", Text, nullable=False, server_default=""),
    Column("result", Text),
    Column("seconds", Float, nullable=False, server_default="0"),
    Column("finished_at", Float, nullable=False),
    Column("worker_id", _Id),
    Column("provenance_id", Integer),
    Column("inputs", Text, comment="JSON: recipe -> digest of the network used"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, nullable=False, index=True),
    Column("chunk_id", _Id, nullable=False),
    Column("token", Text, nullable=False),
    Column("worker_id", _Id),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("cause", Text, nullable=False),
    Column("alone", Integer, nullable=False, comment="1: no other job ran in the child"),
    Column("message", Text, nullable=False),
    Column("log", Text, nullable=False, comment="the last 64 KiB of stdout and stderr"),
    Column("spent", Integer, nullable=False, server_default="0", comment="1: a retry gave the job a new start"),
)

worker_loss = Table(
    "worker_loss",
    metadata,
    Column("job_id", _Id, primary_key=True, autoincrement=False),
    Column("losses", Integer, nullable=False),
    comment="workers lost with a chunk in hand that had taken this job",
)

worker = Table(
    "worker",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("counter", BigInteger, nullable=False, server_default="0"),
    Column("state", Text, nullable=False, comment="alive, stopped, lost"),
    Column("started_at", Float, nullable=False),
    Column("memory", BigInteger, nullable=False, server_default="0", comment="bytes its slots may use; 0: not told"),
    # No default: a program that does not know this column must not be able to sign on.
    Column("schema", Text, nullable=False, comment="of the store that its program knows"),
    sqlite_autoincrement=True,
)

worker_lack = Table(
    "worker_lack",
    metadata,
    Column("worker_id", _Id, primary_key=True, autoincrement=False),
    Column("method_id", Integer, primary_key=True, autoincrement=False),
    Column("reason", Text, nullable=False),
    comment="versions of methods that a worker could not load when it was handed jobs of them",
)

provenance = Table(
    "provenance",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    Column("body", Text, nullable=False, comment="JSON: versions of python and libraries, host, processor"),
)


def counters() -> dict[str, int]:
    """What the table `lab` of a new store holds: counters at their start, and an id at random."""
    return {"next_job": 1, "published": 0, "claimed": 0, "incarnation": 0, "id": secrets.randbits(48)}


def create(connection: Connection) -> None:
    """All tables, empty, and the counters at their start."""
    metadata.create_all(connection)
    for name, value in counters().items():
        connection.execute(lab.insert(), {"name": name, "value": value})
