"""Messages that no dispatcher sent, written straight into Redis: none runs, none ends a process, nothing is lost."""

from __future__ import annotations

import base64
import bz2
import functools
import json
import os
import pickle
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from labs import KINDS, Lab, a_lab, until

from netassay.store import reading
from netassay.store.dispatching import QUEUE, TASK, key_prefix
from producer import lab as embedded_lab
from producer import submission
from worker import messages


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def forged(
    arguments: Any = (1, "label"),
    *,
    named: Any = None,
    embedded: Any = None,
    body: bytes | None = None,
    kind: str = "application/json",
    encoding: str = "utf-8",
    task: Any = TASK,
    tag: Any = "",
    **headers: Any,
) -> dict[str, Any]:
    """A message as Celery's own producer makes one, but for what is said otherwise."""
    if body is None:
        chains = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        body = json.dumps([arguments, named or {}, chains if embedded is None else embedded]).encode()
    number = str(uuid.uuid4())
    return {
        "body": base64.b64encode(body).decode(),
        "content-encoding": encoding,
        "content-type": kind,
        "headers": {"lang": "py", "task": task, "id": number, "root_id": number, "parent_id": None, "group": None,
                    "retries": 0, "timelimit": [None, None], "eta": None, "expires": None, "shadow": None,
                    "argsrepr": "()", "kwargsrepr": "{}", "origin": "x@y", "ignore_result": True, **headers},
        "properties": {"correlation_id": number, "reply_to": str(uuid.uuid4()), "delivery_mode": 2, "priority": 0,
                       "delivery_info": {"exchange": "", "routing_key": QUEUE}, "body_encoding": "base64",
                       "delivery_tag": tag or str(uuid.uuid4())},
    }  # fmt: skip


@functools.cache
def hostile(canary: Path) -> dict[str, str | bytes]:
    """Name -> what is pushed to the queue. canary: a folder that is made if anything of it runs."""
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    plain = json.dumps([[1, "x"], {}, {}]).encode()
    bomb = json.dumps([[1, "x" * (32 << 20)], {}, {}]).encode()
    system = {"task": "celery.map", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    ours = {"task": TASK, "args": [1, ""], "kwargs": {}, "options": {"queue": "netassay"}}
    without = forged()
    del without["properties"]["delivery_tag"]
    found: dict[str, Any] = {
        "no JSON": "{",
        "no text": b"\xff\xfe\x00",
        "nothing": "",
        "a number": "1",
        "a list": "[]",
        "nested": "[" * 5000,
        "no fields": "{}",
        "a key twice, NaN": '{"headers": NaN, "headers": 1}',
        "no tag": without,
        "a tag that is a list": forged(tag=["x"]),
        "no headers": {**forged(), "headers": None},
        "no properties": {**forged(), "properties": None},
        "no body": {**forged(), "body": None},
        "a body in no base64": {**forged(), "body": "%%%"},
        "an unknown task": forged(task="os.system"),
        "a task of Celery's": forged(task="celery.backend_cleanup", arguments=[]),
        "a task that is a list": forged(task=[TASK]),
        "the first protocol": {**forged(body=json.dumps({"task": TASK, "id": "x", "args": [1], "kwargs": {}}).encode()),
                               "headers": {}},
        "a pickle": forged(body=pickle.dumps(Canary(canary)), kind="application/x-python-serialize",
                           encoding="binary"),
        "YAML": forged(body=yaml.dump([[1, "x"], {}, {}]).encode(), kind="application/x-yaml"),
        "msgpack": forged(body=b"\x93\x92\x01\xa1x\x80\x80", kind="application/x-msgpack", encoding="binary"),
        "text": forged(body=plain, kind="text/plain"),
        "raw bytes": forged(body=plain, kind="application/data", encoding="binary"),
        "another encoding": forged(encoding="utf-7"),
        "a zlib bomb": forged(body=zlib.compress(bomb, 1), compression="application/x-gzip"),
        "a bzip2 bomb": forged(body=bz2.compress(bomb[: 1 << 20]), compression="application/x-bz2"),
        "zstd": forged(body=b"\x28\xb5\x2f\xfd", compression="application/zstd"),
        "an unknown compression": forged(compression="x"),
        "no chunk of that number": forged([10**9, "x"]),
        "the largest number": forged([2**63 - 1, "x"]),
        "beyond the largest number": forged([2**70, "x"]),
        "a negative number": forged([-1, "x"]),
        "zero": forged([0, "x"]),
        "a fraction": forged([1.5, "x"]),
        "text for a number": forged(["1; DROP TABLE job", "x"]),
        "nothing for a number": forged([None, "x"]),
        "truth for a number": forged([True, "x"]),
        "a list for a number": forged([[1], "x"]),
        "too few arguments": forged([]),
        "too many arguments": forged([1, "x", 2]),
        "named arguments": forged([1, "x"], named={"label": "x"}),
        "arguments that are a mapping": forged({"chunk_id": 1}),
        "nested arguments": forged(deep),
        "a label of control characters": forged([10**9, "\x1b]0;x\x07\u202e\x00\ud800" * 100]),
        "a label that is a mapping": forged([1, {"a": 1}]),
        "callbacks": forged(embedded={"callbacks": [ours], "errbacks": None, "chain": None, "chord": None}),
        "error callbacks": forged([2**70, ""], embedded={"callbacks": None, "errbacks": [ours], "chain": None}),
        "a chain": forged(embedded={"callbacks": None, "errbacks": None, "chain": [ours, system], "chord": None}),
        "a chord": forged(embedded={"callbacks": None, "errbacks": None, "chain": None, "chord": ours}),
        "for the year 9999": forged(eta="9999-12-31T23:59:59+00:00"),
        "for no date": forged(eta="tomorrow"),
        "over long ago": forged(expires="1970-01-01T00:00:00+00:00"),
        "a time limit": forged([10**9, "x"], timelimit=[0.001, "x"]),
        "retries without end": forged(retries=2**70),
        "a group": forged(group=str(uuid.uuid4())),
        "stamps": forged(stamps={"a": ["b"]}, stamped_headers=["a"]),
        "an id that is a list": forged(id=["x"]),
        "an id of a megabyte": forged(id="x" * (1 << 20)),
        "a long body": forged([1, "x" * (1 << 20)]),
    }  # fmt: skip
    return {name: one if isinstance(one, str | bytes) else json.dumps(one) for name, one in found.items()}


def commands(canary: Path) -> list[str]:
    """What is published on the channel of remote control."""
    import worker.app

    def control(method: Any, kind: str = "application/json", **arguments: Any) -> str:
        body = json.dumps({"method": method, "arguments": arguments, "destination": None, "pattern": None,
                           "matcher": None}).encode()  # fmt: skip
        return json.dumps({
            "body": base64.b64encode(body).decode(), "content-encoding": "utf-8", "content-type": kind,
            "headers": {"clock": 1, "expires": time.time() + 60},
            "properties": {"delivery_mode": 2, "priority": 0, "body_encoding": "base64",
                           "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
                           "delivery_tag": str(uuid.uuid4())},
        })  # fmt: skip

    assert worker.app.app.conf.accept_content == ["json"]
    pickled = json.loads(control("ping"))
    pickled["content-type"] = "application/x-python-serialize"
    pickled["body"] = base64.b64encode(pickle.dumps(Canary(canary))).decode()
    return [
        "{", "[]", "1", "\xff", json.dumps(pickled), control("ping", kind="text/plain"), control(None), control(["x"]),
        control("os.system", command="true"), control("shutdown"), control("pool_restart", modules=["antigravity"]),
        control("pool_grow", n=10_000), control("pool_shrink", n=100), control("autoscale", max=10_000, min=0),
        control("add_consumer", queue="another"), control("cancel_consumer", queue=QUEUE),
        control("rate_limit", task_name=TASK, rate_limit="1/h"), control("time_limit", task_name=TASK, hard=1),
        control("revoke", task_id=["x"] * 1000), control("terminate", signal="KILL", task_id="x"),
        control("election", id="x", topic="task", action={"task": TASK}), control("disable_events"),
        control("memdump"), control("objgraph"), control("revoke_by_stamped_headers", headers={"a": "b"}),
        control("query_task", ids=["x"]), control("ping", x=1),
    ]  # fmt: skip


@pytest.fixture(params=KINDS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with a_lab(request.param, slots=1) as found:
        yield found


def client(lab: Lab) -> Any:
    return redis.Redis.from_url(embedded_lab.redis_address(embedded_lab.broker_of(lab.config)))


def run_batch(lab: Lab, name: str) -> None:
    values = {"value": [f"{name} {i}" for i in range(40)]}
    jobs = [{"method": "diagnostics.echo", "params": {"tag": 1}, "grid": values}]
    path = lab.home / f"{name}.json"
    path.write_text(json.dumps({"name": name, "jobs": jobs}))
    submission.submit(path, lab.config)
    lab.wait(name)


def push(lab: Lab, broker: Any, prefix: str, message: str | bytes) -> None:
    """Put a message at the queue's end, and wait until a worker has taken it."""
    try:
        broker.lpush(prefix + QUEUE, message)
    except redis.RedisError:  # the lab's own Redis takes nothing longer than a megabyte
        assert lab.server is None
        assert len(message) > 1 << 20
    drained(broker, prefix)


def drained(broker: Any, prefix: str) -> None:
    until(lambda: broker.llen(prefix + QUEUE) == 0, what="the queue to be empty")


def worker_of(lab: Lab) -> int:
    return embedded_lab.Place(lab.config.root).described()["services"]["worker"]  # type: ignore[index]


def test_a_forged_message_runs_nothing_and_ends_no_process(lab: Lab, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    run_batch(lab, "before")
    prefix, broker, pid = key_prefix(lab.database), client(lab), worker_of(lab)
    ran = len(lab.query("SELECT job_id FROM record"))
    for name, message in hostile(canary).items():
        push(lab, broker, prefix, message)
        assert psutil.pid_exists(pid), name
    # A thousand times the same, of a chunk that is done, and of one that is none.
    for message in (forged([1, "again"]), forged([10**9, "none"])):
        broker.lpush(prefix + QUEUE, *[json.dumps(message)] * 1000)
        drained(broker, prefix)
    for command in commands(canary):
        broker.publish(prefix + "/0.celery.pidbox", command)
    run_batch(lab, "after")
    assert worker_of(lab) == pid, "the worker was started again"
    assert not canary.exists()
    assert len(lab.query("SELECT job_id FROM record")) == ran + 40
    assert lab.violations("before", "after") == []
    threads = psutil.Process(pid).num_threads()
    assert threads < 30, threads
    assert broker.hlen(prefix + "unacked") == 0
    # It still answers who asks.
    broker.publish(prefix + "/0.celery.pidbox", commands(canary)[-1])
    assert reading.workers(lab.database)[0].slots == 1


def test_a_message_of_100_mb_costs_memory_for_as_long_as_it_is_read(lab: Lab) -> None:
    run_batch(lab, "before")
    prefix, broker, pid = key_prefix(lab.database), client(lab), worker_of(lab)
    before = psutil.Process(pid).memory_info().rss
    big = json.dumps(forged([1, "x" * (75 << 20)]))
    assert len(big) > 100_000_000
    for _ in range(3):
        push(lab, broker, prefix, big)
    run_batch(lab, "after")
    assert worker_of(lab) == pid
    assert psutil.Process(pid).memory_info().rss < before + (300 << 20)


@pytest.mark.parametrize("name", sorted(hostile(Path("x"))))
def test_what_no_dispatcher_sent_is_refused_or_is_a_chunk_made_anew(name: str, tmp_path: Path) -> None:
    raw = hostile(tmp_path / "canary")[name]
    try:
        made = messages.made_anew(json.loads(raw))
    except (messages.Refused, ValueError, RecursionError):
        return
    chunk_id, label, _ = messages.chunk_of(made)
    assert type(chunk_id) is int
    assert 0 < chunk_id <= messages.LARGEST_ID
    body = json.loads(base64.b64decode(made["body"]))
    assert body == [[chunk_id, label], {}, {}]
    assert made["headers"]["timelimit"] == [None, None]


def test_what_a_dispatcher_sends_is_taken() -> None:
    from celery import Celery
    from kombu.transport import memory

    sender = Celery("netassay", broker="memory://")
    sender.send_task(TASK, args=[7, "a / b / 0-10"], queue=QUEUE)
    with sender.connection() as connection:
        channel = connection.channel()
        assert isinstance(channel, memory.Channel)
        sent = channel._get(QUEUE)
    assert messages.chunk_of(sent)[:2] == (7, "a / b / 0-10")
    assert messages.chunk_of(messages.made_anew(sent))[:2] == (7, "a / b / 0-10")
