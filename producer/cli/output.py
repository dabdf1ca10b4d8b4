"""What `--json` prints, a model a verb; the JSON schemas in docs/schemas are made from these.

    python -m producer.cli.output docs/schemas

A verb prints one JSON value on one line of standard output, `results` one a line. Numbers that JSON does not know are
`{"float": "nan"}`, `{"float": "inf"}`. Where a verb fails, that value is an `Error` instead, and the exit code is the
one in it. Passwords in addresses are `***`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, RootModel


class Output(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Error(Output):
    """Why a verb did not do what it was asked."""

    error: str
    """what, why, and what to try; the same text as on standard error"""
    exit_code: int
    """2: bad input, nothing was done; 4: a disk, database or broker would not; 130: interrupted"""
    rows: list[str] = []
    """of a sweep: each row and field that is wrong, the first thousand"""


class Lab(Output):
    """A lab of this host."""

    home: str
    pid: int
    """process of its supervisor"""
    broker: str
    store: str
    artifacts: str
    slots: int
    flower: str
    """address of Flower; empty where it was not started"""
    monitor: str
    """address of the monitor; empty where it was not started"""
    services: dict[str, int]
    """name -> process"""
    restarts: dict[str, int]
    """name -> how often it was started again because it had died"""


class Down(Output):
    stopped: bool
    """false: no lab ran in this folder"""
    home: str


class Worker(Output):
    id: int
    name: str
    host: str
    pid: int
    slots: int
    state: Literal["alive", "stopped", "lost"]
    running: int
    """jobs it has in hand"""


class Batch(Output):
    """A batch at one moment. size = done + not_applicable + failed + running + waiting."""

    name: str
    state: Literal["open", "paused", "cancelled", "finished"]
    reason: str
    """why it paused itself; else empty"""
    size: int
    done: int
    not_applicable: int
    failed: int
    running: int
    waiting: int
    weight: float
    note: str
    submitter: str
    """empty: not known"""
    tags: list[str]
    submitted_at: float
    """seconds since 1970"""


class Status(Output):
    lab: Lab | None
    """null: no lab of this folder runs on this host"""
    works: bool
    """whether what is submitted runs at once"""
    store: str
    workers: list[Worker]
    batches: list[Batch]
    """newest first"""


class Check(Output):
    name: str
    state: Literal["ok", "missing", "wrong", "unknown"]
    """unknown: it could not be seen, e.g. for want of rights; that alone makes nobody ill"""
    found: str
    mend: str
    """the command, or the words, that mend it; empty where nothing is to be mended"""


class Doctor(Output):
    fine: bool
    """nothing is missing or wrong"""
    checks: list[Check]


class MethodLine(Output):
    name: str
    claim: str
    """first line of its text"""
    broken: str = ""
    """why it cannot be used; empty where it can"""


class FieldShown(Output):
    name: str
    type: str
    bounds: str
    required: bool
    default: Any = None
    meaning: str


class Method(Output):
    """One method. params, result: JSON schemas of its question and its answer."""

    name: str
    version: int
    doc: str
    references: list[str]
    fields: list[FieldShown]
    answers: list[FieldShown]
    params: dict[str, Any]
    result: dict[str, Any]
    example: dict[str, Any]
    """a sweep"""


class Methods(RootModel[list[MethodLine] | Method]):
    """A list of methods, or one of them where its full name was given."""


class Run(Output):
    method: str
    key: str
    seconds: float
    result: dict[str, Any]


class Submitted(Output):
    batch_id: int
    name: str
    size: int
    new: int
    """jobs the store did not know"""
    known: int
    rerun: int
    """known jobs that failed for reasons that may pass, and run again"""
    appended: int
    """jobs added to a batch that was there"""
    already: bool
    """the very same batch was there; nothing was added"""
    reopened: bool
    """it had been cancelled and goes on"""
    seconds: float
    refused: int
    """invalid rows that were left out"""
    duplicates: int
    """rows that asked for a job which the batch holds already"""
    works: bool
    """whether the jobs run at once: false where no lab and no worker runs"""


class DryRow(Output):
    """Jobs that share method, networks and limits."""

    method: str
    group: str
    jobs: int
    seconds: float
    """predicted, of one job"""
    total_seconds: float
    time_limit: float
    memory_limit: int | None
    """bytes; null: an even share of the host"""


class DryRun(Output):
    jobs: int
    refused: int
    duplicates: int
    rows: list[DryRow]


class Submit(RootModel[Submitted | DryRun]):
    """What was submitted, or with `--dry-run` what would be."""


class Failures(Output):
    cause: str
    jobs: int
    example_key: str
    example: str


class Watch(Batch):
    failures: list[Failures]
    """by cause, the most frequent first"""


class Wait(Output):
    outcome: Literal["done", "failed", "cancelled", "timeout", "paused"]
    """of all batches together; exit codes 0, 1, 3, 5, 6"""
    batches: list[Batch]


class Batches(RootModel[list[Batch]]):
    """Newest first."""


class Changed(Output):
    batch: str
    changed: bool
    """false: it was in no state for that, and stays as it was"""
    state: Literal["open", "paused", "cancelled", "finished"]


class Retry(Output):
    batch: str
    jobs: int
    """how many get a new start"""


class Weight(Output):
    batch: str
    weight: float


class Submitter(Output):
    name: str
    weight: float


class Share(Output):
    submitters: list[Submitter]


class Attempt(Output):
    """A process that died on the job."""

    started_at: float
    ended_at: float
    cause: str
    alone: bool
    message: str
    log: str
    """the last of what it wrote"""
    worker: str


class Logs(Output):
    key: str
    """as it was asked for"""
    state: Literal["pending", "running", "done", "not_applicable", "failed"]
    cause: str
    message: str
    attempts: list[Attempt]


class Results(RootModel[dict[str, Any]]):
    """One record (or, with `--by`, one group of them) a line: `job`, `method` and `state`; each field of the params,
    `params.<name>` where each record has a column called so; each of the result, `result.<name>` where each record has
    one or a param is called so; `seconds`, `cause`, `message`. With `--columns` only those."""


class Export(Output):
    path: str
    batches: int
    jobs: int
    records: int
    artifacts: int
    bytes: int
    """of the file"""
    missing: list[str]
    """references whose files are not there, or damaged"""


class Import(Output):
    batches: int
    """that came in"""
    skipped: int
    """that were there"""
    jobs: int
    """of the batches that came in"""
    new: int
    """jobs that were not known here"""
    records: int
    attempts: int
    artifacts: int
    renamed: dict[str, str]
    """name in the file -> name here"""


class Backup(Output):
    path: str
    """of its manifest"""
    batches: int
    jobs: int
    records: int
    artifacts: int
    """that it needs"""
    copied: int
    """those of them that the folder did not have"""
    bytes: int
    """written now"""
    missing: list[str]
    """references whose files are not there, or damaged"""


class Restore(Output):
    path: str
    """of the manifest it is of"""
    batches: int
    """that came back"""
    skipped: int
    """that a restore before had brought back"""
    jobs: int
    records: int
    attempts: int
    artifacts: int


class Unnamed(Output):
    digest: str
    bytes: int


class Garbage(Output):
    """What serves nobody, and was removed unless `dry_run`."""

    dry_run: bool
    batches: int
    """that died while they arrived"""
    jobs: int
    """of no batch, without record"""
    jobs_kept: int
    """the same, left alone because a submission is on its way"""
    artifacts: list[Unnamed]
    temporaries: int
    """temporary files that writers left when they died"""
    bytes: int


#: Verb -> what it prints.
OUTPUTS: dict[str, type[BaseModel]] = {
    "error": Error,
    "up": Lab,
    "down": Down,
    "status": Status,
    "doctor": Doctor,
    "methods": Methods,
    "run": Run,
    "submit": Submit,
    "watch": Watch,
    "wait": Wait,
    "batches": Batches,
    "pause": Changed,
    "resume": Changed,
    "cancel": Changed,
    "retry": Retry,
    "weight": Weight,
    "share": Share,
    "logs": Logs,
    "results": Results,
    "export": Export,
    "import": Import,
    "backup": Backup,
    "restore": Restore,
    "gc": Garbage,
}


def schema(verb: str) -> str:
    """The JSON schema of a verb's output, as it is published."""
    about = OUTPUTS[verb].model_json_schema(mode="serialization")
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"netassay {verb} --json"} | {
        name: value for name, value in about.items() if name != "title"
    }
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


def publish(folder: Path) -> None:
    """Write the schemas of all verbs, and remove those of verbs that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.json"):
        if file.stem not in OUTPUTS:
            file.unlink()
    for verb in OUTPUTS:
        (folder / f"{verb}.json").write_text(schema(verb))


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
