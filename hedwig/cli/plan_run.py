"""``hedwig plan-run``: what embedding so many panoramas on such machines takes and costs, and what holds it up.

A few seconds of calibration on this machine, then arithmetic; with ``--simulate`` also a simulation of fleets of
several sizes with preemptions. Every assumption is printed. Prices are the caller's: hedwig knows none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import set_up, show

if TYPE_CHECKING:
    from hedwig.planning import Fleet, Outlook, Rates

__all__ = ["register"]

SPOT_PER_HOUR = 0.05  # of a node: a spot node lives 20 hours on average; the busiest markets are worse
NUM_SEEDS = 5


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("plan-run", rich_help_panel="Make")(plan_run)


def plan_run(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Experiment file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Accelerators; for --gpu cpu, actors.")] = 8,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Panoramas; default: the listing's.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="h200, h100, a100, l4, t4 or cpu; default: this device, measured.")
    ] = None,
    clips_per_s: Annotated[
        float | None, typer.Option("--clips-per-s", min=1e-9, help="Measured rate of one accelerator.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1)] = 8,
    cores_per_gpu: Annotated[float, typer.Option("--cores-per-gpu", min=0.1, help="Cores that decode for one.")] = 16.0,
    storage_gb_s: Annotated[
        float | None, typer.Option("--storage-gb-s", min=1e-6, help="Bandwidth for all readers; default: unlimited.")
    ] = None,
    overlapped: Annotated[
        bool,
        typer.Option("--overlapped/--serial", help="Whether actors decode the next batch during the forward pass."),
    ] = False,
    spot: Annotated[bool, typer.Option("--spot", help="Nodes that may be taken away.")] = False,
    preemptions: Annotated[
        float | None, typer.Option("--preemptions-per-hour", min=0, help=f"Of one node; --spot: {SPOT_PER_HOUR}.")
    ] = None,
    provision_s: Annotated[float, typer.Option("--provision-s", min=0, help="From asking to having a node.")] = 180.0,
    startup_s: Annotated[float, typer.Option("--startup-s", min=0, help="From then to the first panorama.")] = 90.0,
    nodes_per_minute: Annotated[
        float | None, typer.Option("--nodes-per-minute", min=1e-6, help="Autoscaler's pace; default: all at once.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="Of one accelerator with its share of the node.")
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate fleets of several sizes.")] = False,
    sizes: Annotated[str, typer.Option("--sizes", help="Accelerators, for --simulate.")] = "8,64,256,1024",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Bytes, time, cost and bottleneck of embedding an experiment's panoramas, or many more, on a fleet.

    Example: hedwig plan-run experiments/real.yaml --gpu h200 --gpus 64 --rows 1000000000 --spot --price-per-hour 4
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.config import load_experiment
    from hedwig.pipelines import use_storage
    from hedwig.pipelines.estimate import calibrate, compare, local_fleet, num_panoramas
    from hedwig.planning import Fleet, outlook

    x = load_experiment(experiment, overrides or ())
    use_storage(x.storage.model_dump())
    rates = calibrate(x, gpu=gpu, clips_per_s=clips_per_s, overlapped=overlapped)
    num_rows = rows or num_panoramas(x)
    hazard = preemptions if preemptions is not None else SPOT_PER_HOUR if spot else 0.0
    fleet = Fleet(
        num_gpus=gpus,
        gpus_per_node=gpus_per_node,
        cores_per_gpu=cores_per_gpu,
        storage_bytes_per_s=math.inf if storage_gb_s is None else storage_gb_s * 1e9,
        startup_s=startup_s,
        provision_s=provision_s,
        preemptions_per_hour=hazard,
        price_per_hour=price,
        block_rows=x.embed.rows_per_block,
        nodes_per_minute=math.inf if nodes_per_minute is None else nodes_per_minute,
    )
    told = outlook(rates, fleet, num_rows)
    assumptions = _assumptions(rates, fleet)
    result: dict[str, Any] = {"encoder": x.encoder.name, "gpus": gpus, "gpu": gpu or "this device", **told.record()}
    result["clips_per_s"], result["assumptions"] = rates.clips_per_s, assumptions
    text = [*_lines(told, fleet), "", "Assumptions:", *(f"  {name:<22} {value}" for name, value in assumptions.items())]
    if simulate:
        result["simulation"] = _simulated(rates, fleet, num_rows, [int(size) for size in sizes.split(",")])
        text += ["", *_table(result["simulation"], price)]
    measured = compare(x, None if gpu or clips_per_s or overlapped else rates)
    if measured is not None:
        result["plan_vs_real"] = measured
        text += ["", *_comparison(measured, local_fleet(x).num_gpus)]
    show(result, "\n".join(text))


def _assumptions(rates: Rates, fleet: Fleet) -> dict[str, str]:
    stated = {
        "clips/s": f"{rates.clips_per_s:.4g} per accelerator ({rates.sources['clips_per_s']})",
        "decode and slice": f"{rates.decode_s * 1e3:.1f} ms of one core ({rates.sources['decode_s']})",
        "Ray": f"{rates.overhead_s * 1e3:.1f} ms of one core per panorama ({rates.sources['overhead_s']})",
        "image": f"{rates.bytes_in / 1e3:.0f} kB ({rates.sources['bytes_in']})",
        "row": f"{rates.bytes_out / 1e3:.1f} kB ({rates.sources['bytes_out']})",
        "order": "decoding during the forward pass" if rates.overlapped else "decoding, then the forward pass",
        "node": f"{fleet.gpus_per_node} accelerators with {fleet.cores_per_gpu:g} cores each",
        "delays": f"{fleet.provision_s:g} s to get a node, {fleet.startup_s:g} s until it embeds",
        "block": f"{fleet.block_rows} rows are done again when a node is lost, per accelerator",
    }
    if fleet.preemptions_per_hour:
        stated["preemptions"] = f"Poisson, {fleet.preemptions_per_hour:g} per node and hour; a new node is asked for"
    stated["storage"] = (
        "not limited" if math.isinf(fleet.storage_bytes_per_s) else f"{fleet.storage_bytes_per_s / 1e9:g} GB/s"
    )
    return stated


def _lines(told: Outlook, fleet: Fleet) -> list[str]:
    limits = told.limits
    cost = "no price given" if told.cost is None else f"{told.cost:,.2f}"
    return [
        f"{told.num_rows:,} panoramas on {fleet.num_gpus} accelerators: {duration(told.seconds)}, "
        f"{told.gpu_hours:,.1f} accelerator hours, cost {cost}",
        f"  rate        {limits.rows_per_s:,.1f} panoramas/s; bottleneck: {limits.bottleneck}",
        f"  alone       accelerators {limits.accelerator:,.1f}/s, decoding {limits.decode:,.1f}/s, "
        f"storage {'unlimited' if math.isinf(limits.storage) else f'{limits.storage:,.1f}/s'}",
        f"  decoding    {limits.cores_needed_per_gpu:.1f} cores per accelerator keep up with it",
        f"  storage     {limits.storage_needed / 1e9:.3f} GB/s when no accelerator waits",
        f"  bytes       {told.bytes_read / 1e12:,.3f} TB read, {told.bytes_written / 1e12:,.3f} TB written",
        f"  preemptions {told.preemptions:,.1f} expected; {told.useful:.1%} of the paid time is kept",
    ]


def _simulated(rates: Rates, fleet: Fleet, num_rows: int, sizes: list[int]) -> list[dict[str, Any]]:
    """One record per size: the mean and the range over some seeds."""
    from dataclasses import replace

    from hedwig.planning import limits_of, node_fleet, simulate

    records = []
    for size in sizes:
        one = replace(fleet, num_gpus=size)
        nodes = node_fleet(rates, one)
        outcomes = [simulate(nodes, num_rows, seed) for seed in range(NUM_SEEDS if fleet.preemptions_per_hour else 1)]
        seconds = [outcome.seconds for outcome in outcomes]
        hours = sum(o.node_seconds for o in outcomes) / len(outcomes) * nodes.lanes_per_node / 3600
        records.append(
            {
                "gpus": nodes.num_nodes * nodes.lanes_per_node,
                "rows": num_rows,
                "seconds": sum(seconds) / len(seconds),
                "least_seconds": min(seconds),
                "most_seconds": max(seconds),
                "gpu_hours": hours,
                "cost": None if fleet.price_per_hour is None else hours * fleet.price_per_hour,
                "preemptions": sum(o.num_preemptions for o in outcomes) / len(outcomes),
                "blocks_redone": sum(o.num_blocks_redone for o in outcomes) / len(outcomes),
                "storage_bound": sum(o.storage_bound_s for o in outcomes) / sum(seconds),
                "bottleneck": limits_of(rates, one).bottleneck,
            }
        )
    return records


def _table(records: list[dict[str, Any]], price: float | None) -> list[str]:
    lines = [
        f"{'GPUs':>6} {'time':>12} {'range':>23} {'GPU hours':>12} {'cost':>12} {'taken away':>11} "
        f"{'blocks redone':>14}  bottleneck"
    ]
    for r in records:
        span = f"{duration(r['least_seconds'])} - {duration(r['most_seconds'])}"
        cost = "-" if price is None else f"{r['cost']:,.0f}"
        lines.append(
            f"{r['gpus']:>6} {duration(r['seconds']):>12} {span:>23} {r['gpu_hours']:>12,.1f} {cost:>12} "
            f"{r['preemptions']:>11,.1f} {r['blocks_redone']:>14,.1f}  {r['bottleneck']}"
        )
    return lines


def _comparison(measured: dict[str, Any], num_actors: int) -> list[str]:
    lines = [f"Plan and what the run on disk took ({measured['rows']} panoramas, {num_actors} actors):"]
    lines += [
        f"  {name:<12} planned {one['planned']:>12.4g}   real {one['real']:>12.4g}   ratio {one['ratio']:.2f}"
        for name, one in measured.items()
        if isinstance(one, dict)
    ]
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them: 95 s, 42.0 min, 7.5 h, 12.3 d."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86_400:,.1f} d"
