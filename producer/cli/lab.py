"""Verbs of the lab: up, down, status, doctor; worker, dispatch and monitor for containers and services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from producer.cli.common import AsJson, busy, print_output, read_settings

if TYPE_CHECKING:
    from netassay.settings import Settings

#: Batches that `status` shows to a person; the others: netassay batches.
SHOWN = 10

verbs = typer.Typer()


@verbs.command()
def up(
    slots: Annotated[int, typer.Option(help="Compute children; 0: one per core.", min=0)] = 0,
    flower: Annotated[bool, typer.Option(help="Also start Flower, Celery's own monitor.")] = True,
    monitor: Annotated[
        bool, typer.Option(help="Also start the monitor: /healthz, and /metrics for Prometheus.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Start a lab in the background: worker, dispatcher, monitor, Flower, and a private Redis unless NETASSAY_BROKER is
    set."""
    from producer import lab

    config = read_settings()
    with busy("starting the lab"):
        described = lab.up(config, slots, flower, monitor)
    if as_json:
        print_output("up", _lab(config, described))
        return
    from producer.wording import counted

    print(f"lab up in {config.root}: {counted(described['slots'], 'slot')}, records in {described['store']}")
    if described["flower"]:
        print(f"Flower: {described['flower']}")
    if described["monitor"]:
        print(f"monitor: {described['monitor']}/healthz, /metrics")
    print("next: netassay submit FILE --name NAME; stop the lab with: netassay down")


def _lab(config: Settings, described: dict[str, Any]) -> dict[str, Any]:
    return {"home": str(config.root), **described}


@verbs.command()
def down(as_json: AsJson = False) -> None:
    """Stop the lab of this folder. What is submitted stays, and goes on at the next `up`."""
    from producer import lab

    config = read_settings()
    with busy("stopping the lab; running jobs may end within some seconds"):
        stopped = lab.down(config)
    if as_json:
        print_output("down", {"stopped": stopped, "home": str(config.root)})
    else:
        print("lab stopped" if stopped else f"no lab runs in {config.root}")


@verbs.command()
def status(as_json: AsJson = False) -> None:
    """What runs: the lab, its workers, the newest batches."""
    from dataclasses import asdict

    from producer import lab

    config = read_settings()
    described = lab.Place(config.root).described()
    from netassay.settings import masked
    from netassay.store import reading

    shared = lab.on_cluster(config)
    with lab.records_of(config) as database:
        known = database.exists()
        if known:
            database.prepare()
        # Those of a lab that was killed stay alive in the store until a dispatcher looks for them.
        workers = reading.workers(database) if known and (described or shared) else []
        batches = reading.batches(database) if known else []
    if as_json:
        about = {
            "lab": _lab(config, described) if described else None,
            "works": bool(described or workers),
            "store": masked(config.store_url),
            "workers": [asdict(worker) for worker in workers],
            "batches": [batch.as_dict() for batch in batches],
        }
        print_output("status", about)
        return
    from producer.show import batch_line, batch_table, console
    from producer.wording import counted

    if described:
        flower = f"; Flower: {described['flower']}" if described["flower"] else ""
        print(f"lab up in {config.root} (process {described['pid']}), {counted(described['slots'], 'slot')}{flower}")
        for name, times in described.get("restarts", {}).items():
            print(f"  {name} was started again {counted(times, 'time')}; see {config.root / 'logs' / name}.log")
    elif shared:
        print(f"records in {masked(config.store_url)}; no lab of this host runs")
    else:
        print(f"no lab runs in {config.root}; start it with: netassay up")
    for worker in workers:
        print(f"  worker {worker.name}: {counted(worker.slots, 'slot')}, {counted(worker.running, 'job')} in hand")
    if shared and not workers:
        print("no worker is alive; start one on any host that has these settings: netassay up, or netassay worker")
    if len(batches) == 1:
        print(batch_line(batches[0]))
    elif batches:
        console.print(batch_table(batches[:SHOWN]))
    if len(batches) > SHOWN:
        print(f"... and {len(batches) - SHOWN:,} older ones: netassay batches --limit 0")
    if known and not batches:
        print("no batch was submitted yet; try: netassay submit FILE --name NAME")


@verbs.command()
def doctor(as_json: AsJson = False) -> None:
    """What is missing on this host, and the command that mends it. Exit code 1 where something is."""
    from dataclasses import asdict

    from netassay.settings import BadSettings
    from producer import doctor as practice

    try:
        config = read_settings()
    except BadSettings as error:
        # Without settings nothing else can be looked at; but whoever asks a doctor wants an answer, not a refusal.
        checks = [practice.Check("settings", "wrong", str(error), "mend these environment variables")]
    else:
        with busy("looking"):
            checks = practice.examine(config)
    fine = all(check.state in ("ok", "unknown") for check in checks)
    if as_json:
        print_output("doctor", {"fine": fine, "checks": [asdict(check) for check in checks]})
    else:
        from producer.show import check_table, console

        console.print(check_table(checks))
        ill = sum(check.state in ("missing", "wrong") for check in checks)
        need = "needs" if ill == 1 else "need"
        print("all is well" if fine else f"{ill} of {len(checks)} things {need} mending; the words after -> say how")
    raise typer.Exit(0 if fine else 1)


@verbs.command()
def worker(
    slots: Annotated[int, typer.Option(help="Compute children; 0: NETASSAY_SLOTS, else one per core.", min=0)] = 0,
) -> None:
    """Be a worker, in the foreground: for containers and services. SIGTERM ends it in good order."""
    from producer import lab

    config = read_settings()
    lab.become(config, lab.worker_command(slots or config.slots or lab.cores()))


@verbs.command()
def dispatch() -> None:
    """Be the dispatcher, in the foreground: for containers and services. A second one does no harm."""
    from producer import lab

    lab.become(read_settings(), lab.dispatcher_command())


@verbs.command()
def monitor(
    address: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Else NETASSAY_MONITOR, else 127.0.0.1:5556.")
    ] = "",
) -> None:
    """Be the monitor, in the foreground: /livez, /healthz, and /metrics for Prometheus, over HTTP."""
    from producer import lab

    config = read_settings()
    lab.become(config, lab.monitor_command(address or config.monitor or lab.MONITOR_ADDRESS))
