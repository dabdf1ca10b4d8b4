"""What the way between hosts costs a lab: two hosts, with PostgreSQL and Redis at a distance of some milliseconds.

    python benchmarks/hosts.py --store postgresql://user@127.0.0.1/empty --broker redis://127.0.0.1:6379/0
        [--delays 0,1,10] [--repeats 3]

Each host is a network namespace with a veth to this one, where that is allowed (root on Linux), else a folder; either
way it has a home of its own, and reaches the services only through a relay that keeps each packet back for half of the
delay: the round trip is one delay longer. (A relay, and not `tc netem`, which not every kernel has.) Host one runs a
dispatcher and a worker of two slots, host two a worker of two. Three batches for each delay, in turn: jobs that sleep
20 ms (4 slots want 5 ms a job), jobs that do nothing, and one batch of a single job. Seconds from submission, which is
made without delay, to the last record; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from netassay.settings import Settings
from netassay.store import reading
from netassay.store.database import Database
from producer import lab, submission

NETWORK = "10.213"


class Relay:
    """Passes connections on, each packet `delay` seconds late in either direction."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def serve(self, address: str, target: tuple[str, int]) -> int:
        """Listen at an address of this host. Returns the port."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            other_reader, other_writer = await asyncio.open_connection(*target)
            await asyncio.gather(self._pass(reader, other_writer), self._pass(other_reader, writer))

        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(accept, address, 0), self.loop).result()
        return server.sockets[0].getsockname()[1]

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def send() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - self.loop.time()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.close()

        with contextlib.suppress(OSError):
            sending = asyncio.ensure_future(send())
            while data := await reader.read(1 << 16):
                queue.put_nowait((self.loop.time() + self.delay, data))
            queue.put_nowait((self.loop.time() + self.delay, b""))
            await sending


@contextlib.contextmanager
def host(number: int) -> Iterator[tuple[str, list[str]]]:
    """The address at which a host finds us, and what to put before a command so that it runs there."""
    name, here, there = f"na{os.getpid()}-{number}", f"nav{os.getpid()}{number}", f"naw{os.getpid()}{number}"
    address = f"{NETWORK}.{number}"
    steps = [
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there}",
        f"ip link set {there} netns {name}",
        f"ip addr add {address}.1/24 dev {here}",
        f"ip link set {here} up",
        f"ip -n {name} addr add {address}.2/24 dev {there}",
        f"ip -n {name} link set {there} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for step in steps:
            subprocess.run(step.split(), check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or error
        print(f"host {number} is a folder only, network namespaces are refused: {str(why).strip()}", flush=True)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        yield "127.0.0.1", []
        return
    try:
        yield f"{address}.1", ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def through(url: str, address: str, port: int) -> str:
    """The URL with another address."""
    parts = urlsplit(url)
    before, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{before}{at}{address}:{port}").geturl()


def target(url: str, port: int) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or port


def seconds(config: Settings, database: Database, name: str, entry: dict) -> float:
    """From the start of a submission to its last record."""
    began = time.perf_counter()
    submission.submit({"name": name, "jobs": [entry]}, config)
    while not (seen := reading.progress(database, name)).over:
        time.sleep(0.01)
    assert seen.done == seen.size, seen
    return time.perf_counter() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--store", required=True)
    options.add_argument("--broker", required=True)
    options.add_argument("--delays", default="0,1,10")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--jobs", type=int, default=2_000, help="of 20 ms")
    wanted = options.parse_args()
    relay = Relay()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nabench-")))
        near = Settings(home=folder, store=wanted.store, broker=wanted.broker, artifacts=str(folder / "artifacts"))
        database = Database(near.store_url)
        database.prepare()
        for number in (1, 2):
            address, prefix = stack.enter_context(host(number))
            config = Settings(
                home=folder / f"host{number}",
                store=through(wanted.store, address, relay.serve(address, target(wanted.store, 5432))),
                broker=through(wanted.broker, address, relay.serve(address, target(wanted.broker, 6379))),
                artifacts=near.artifacts,
            )
            environment = {**os.environ, **lab.environment_of(config)}
            for words in (["worker", "--slots", "2"], ["dispatch"])[: 3 - number]:
                log = (folder / f"{words[0]}{number}.log").open("wb")
                command = [*prefix, sys.executable, "-m", "producer.cli", *words]
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                stack.callback(process.wait)
                stack.callback(process.terminate)
        while len(reading.workers(database)) < 2:
            time.sleep(0.1)
        first, found = int(time.time()) * 100, {}
        kinds = {
            f"{wanted.jobs:,} jobs of 20 ms": ("diagnostics.sleep", {"seconds": 0.02}, "tag", wanted.jobs),
            f"{10 * wanted.jobs:,} jobs that do nothing": ("diagnostics.echo", {}, "value", 10 * wanted.jobs),
            "1 job": ("diagnostics.echo", {}, "value", 1),
        }
        seconds(
            near, database, f"warm{first}", {"method": "diagnostics.sleep", "params": {"seconds": 0.02, "tag": first}}
        )
        for repeat in range(wanted.repeats):
            for delay in map(float, wanted.delays.split(",")):
                relay.delay = delay / 2000
                for kind, (method, params, varied, count) in kinds.items():
                    start = (first + repeat * 17 + int(delay * 3)) * 100_000
                    entry = {"method": method, "params": params, "grid": {varied: {"range": [start, start + count]}}}
                    name = f"{kind} {first} {repeat} {delay}"
                    if count == 1:
                        entry["params"] = {"tag": first}
                    found.setdefault((kind, delay), []).append(seconds(near, database, name, entry))
        print(
            f"two hosts of two slots, {wanted.repeats} repeats, load {os.getloadavg()[0]:.1f}: seconds, medians (all)"
        )
        for (kind, delay), values in sorted(found.items()):
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"| {kind} | {delay:g} ms | {statistics.median(values):.1f} | {each} |", flush=True)
        database.dispose()


if __name__ == "__main__":
    main()
