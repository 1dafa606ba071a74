"""`hedwig bench`: what this machine reaches, on synthetic input; one command per question."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from hedwig.cli.console import set_up, show

__all__ = ["register"]

Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on synthetic input.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(bench_app, name="bench", rich_help_panel="Tools")


@bench_app.command("embed")
def embed(
    model: Annotated[str, typer.Option("--model", help="An encoder's name, e.g. viclip-l14.")] = "viclip-l14",
    weights: Annotated[str | None, typer.Option("--weights", help="Weights file; default: random, as fast.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="What the weights are cast to.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Clips at once; default: 32 on CUDA, 1.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Measure for at least so long.")] = 10.0,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the encoder.")] = False,
    as_json: Json = False,
) -> None:
    """Embed synthetic frames: clips a second, and the share of this machine's matrix product that is reached.

    Example: hedwig bench embed --model viclip-l14 --device cuda --dtype bfloat16 --compile
    """
    set_up(as_json=as_json)
    from hedwig.models.fetched import resolve_weights

    weights = None if weights is None else resolve_weights(weights)
    from hedwig.benchmark.embed import measure_embedding

    figures = measure_embedding(
        model,
        weights=weights,
        dtype=dtype,
        device=device,
        batch_size=batch,
        seconds=seconds,
        compiled=compile_,
    )
    show(figures.to_dict(), figures.text())


@bench_app.command("train")
def train(
    rows: Annotated[int, typer.Option("--rows", min=1, help="Embeddings to train on.")] = 240_000,
    dim: Annotated[int, typer.Option("--dim", min=2, help="Of image and caption together; even.")] = 1536,
    cells: Annotated[int, typer.Option("--cells", min=4, help="Geocells.")] = 2000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Ray Train workers; they share the cores.")] = 1,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of all workers; default: the cores.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs on Ray Train.")] = 3,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows a step, all workers together.")] = 256,
    as_json: Json = False,
) -> None:
    """Train the head on synthetic embeddings: seconds an epoch, beside a bare PyTorch loop over the same rows.

    Example: hedwig bench train --rows 240000 --dim 1536 --cells 2000 --json
    """
    set_up(as_json=as_json)
    from hedwig.benchmark.train import measure_training
    from hedwig.config import ClusterConfig
    from hedwig.pipelines.cluster import ray_running
    from hedwig.training import train_geolocator

    cores = max(workers, threads or len(os.sched_getaffinity(0)))
    with ray_running(ClusterConfig(num_cpus=max(4, cores))):
        figures = measure_training(
            train_geolocator,
            num_rows=rows,
            dim=dim,
            num_cells=cells,
            num_workers=workers,
            num_threads=cores // workers * workers,
            num_epochs=epochs,
            batch_size=batch,
        )
    show(figures.to_dict(), figures.text())


@bench_app.command("all")
def all_(as_json: Json = False) -> None:
    """Ratios of the fast paths to what one would write instead; minutes on two cores."""
    set_up(as_json=as_json)
    from hedwig.benchmark import ratios, ratios_text

    results = ratios()
    show(dict(results), ratios_text(results))
