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
    address: Annotated[str | None, typer.Option("--address", help="A running Ray; default: a local one.")] = None,
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
    with ray_running(ClusterConfig(address=address, num_cpus=None if address else max(4, cores))):
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


@bench_app.command("slice")
def slice_(
    images: Annotated[int, typer.Option("--images", min=1, help="Synthetic panoramas of 2048 x 1024.")] = 4,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Cut from each.")] = 10,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Medians are over so many.")] = 7,
    as_json: Json = False,
) -> None:
    """Slice panoramas on one core: ratios to Pillow's crop-then-resize and to open_clip's transform of the same frames.

    Example: hedwig bench slice --json
    """
    set_up(as_json=as_json)
    from hedwig.benchmark import ratios_text
    from hedwig.benchmark.preprocessing import slice_figures

    figures = slice_figures(images, num_rounds=rounds, num_frames=frames)
    show(dict(figures), ratios_text({f"slicing into {frames} frames, one thread": figures}))


@bench_app.command("pipeline")
def pipeline(
    model: Annotated[str, typer.Option("--model", help="An encoder's name; random weights.")] = "open_clip:ViT-B-32",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="What the weights are cast to.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    rows: Annotated[int, typer.Option("--rows", min=2, help="Panoramas to embed.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Panoramas at once.")] = 16,
    block: Annotated[int, typer.Option("--block", min=1, help="Rows of a block.")] = 64,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Decoding and torch threads.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus", min=0.0, help="GPUs reserved by the actor.")] = 0.0,
    decode: Annotated[
        Literal["actor", "apart"], typer.Option("--decode", help="In the actor, or in workers apart from it.")
    ] = "actor",
    decode_workers: Annotated[int, typer.Option("--decode-workers", min=1, help="Of --decode apart.")] = 1,
    read_ahead: Annotated[int, typer.Option("--read-ahead", min=0, help="Batches fetched before their turn.")] = 2,
    latency_ms: Annotated[float, typer.Option("--latency-ms", min=0.0, help="That every image comes late.")] = 0.0,
    address: Annotated[str | None, typer.Option("--address", help="A running Ray; default: a local one.")] = None,
    as_json: Json = False,
) -> None:
    """Embed on one Ray Data actor: panoramas a second beside the bare model loop on the same decoded batches.

    Example: hedwig bench pipeline --rows 256 --json
    """
    set_up(as_json=as_json)
    from hedwig.pipelines.throughput import pipeline_figures

    figures = pipeline_figures(
        model, num_rows=rows, batch_size=batch, rows_per_block=block, num_threads=threads, num_gpus=gpus,
        address=address, decode=decode, decode_workers=decode_workers, read_ahead=read_ahead,
        latency_s=latency_ms / 1000, dtype=dtype, device=device,
    )  # fmt: skip
    show(figures.to_dict(), figures.text())


@bench_app.command("storage")
def storage(
    rows: Annotated[int, typer.Option("--rows", min=1, help="Vectors to write and read.")] = 50_000,
    dim: Annotated[int, typer.Option("--dim", min=1, help="Their components.")] = 768,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Medians are over so many.")] = 5,
    as_json: Json = False,
) -> None:
    """Write and read vectors as our tables hold them: ratios to fixed-size lists in the same file format.

    Example: hedwig bench storage --rows 200000 --json
    """
    set_up(as_json=as_json)
    from hedwig.benchmark import ratios_text
    from hedwig.benchmark.table import table_benchmark

    results = {d: table_benchmark(rows, dim, dtype=d, num_rounds=rounds) for d in ("float32", "float16")}
    show({"rows": rows, "dim": dim, **results}, ratios_text(results))


@bench_app.command("retrieve")
def retrieve(
    vectors: Annotated[int, typer.Option("--vectors", min=1000, help="References.")] = 240_000,
    cells: Annotated[int, typer.Option("--cells", min=8, help="Geocells, of skewed sizes.")] = 2000,
    probe: Annotated[int, typer.Option("--probe", min=1, help="Cells searched per query.")] = 5,
    dim: Annotated[int, typer.Option("--dim", min=8, help="Of an embedding.")] = 768,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of every method.")] = 5,
    as_json: Json = False,
) -> None:
    """Search inside the nearest cells by every codec, beside brute force, FAISS and hnswlib; one thread.

    Example: hedwig bench retrieve --vectors 240000 --cells 2000 --probe 5 --json
    """
    set_up(as_json=as_json)
    from hedwig.benchmark.retrieve import measure_retrieval

    figures = measure_retrieval(num_vectors=vectors, num_cells=cells, probe=probe, dim=dim, num_rounds=rounds)
    show(figures.to_dict(), figures.text())


@bench_app.command("serve")
def serve(
    vectors: Annotated[int, typer.Option("--vectors", min=1000, help="References.")] = 100_000,
    cells: Annotated[int, typer.Option("--cells", min=8, help="Geocells, of skewed sizes.")] = 2000,
    dim: Annotated[int, typer.Option("--dim", min=8, help="Of an embedding.")] = 768,
    batch: Annotated[int, typer.Option("--batch", min=1, max=4096, help="Rows of a batch request.")] = 256,
    connections: Annotated[int, typer.Option("--connections", min=1, help="At once.")] = 8,
    batch_connections: Annotated[int, typer.Option("--batch-connections", min=1, help="Of the batch endpoint.")] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of everybody.")] = 5,
    requests: Annotated[int, typer.Option("--requests", min=50, help="Single requests of every turn.")] = 400,
    proxy: Annotated[
        Literal["python", "haproxy"], typer.Option("--proxy", help="What stands in front; haproxy needs Linux.")
    ] = "haproxy",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Of loopback.")] = 8017,
    as_json: Json = False,
) -> None:
    """Search stored embeddings over HTTP: beside an empty ping of the same Serve, and beside the search in process.

    Example: hedwig bench serve --json
    """
    set_up(as_json=as_json)
    from hedwig.benchmark.serve import measure_serving
    from hedwig.serving import start, start_ray, stop

    os.environ.pop("RAY_ADDRESS", None)
    start_ray(proxy=proxy, num_cpus=2)
    figures = measure_serving(
        start, lambda: stop(ray_too=True), proxy=proxy, port=port, num_vectors=vectors, num_cells=cells, dim=dim,
        batch=batch, connections=connections, batch_connections=batch_connections, num_rounds=rounds,
        num_requests=requests,
    )  # fmt: skip
    show(figures.to_dict(), figures.text())


@bench_app.command("all")
def all_(as_json: Json = False) -> None:
    """Ratios of the fast paths to what one would write instead; minutes on two cores."""
    set_up(as_json=as_json)
    from hedwig.benchmark import ratios, ratios_text

    results = ratios()
    show(dict(results), ratios_text(results))
