"""`hedwig bench`: what this machine reaches, on synthetic input; one command per question."""

from __future__ import annotations

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


@bench_app.command("all")
def all_(as_json: Json = False) -> None:
    """Ratios of the fast paths to what one would write instead; minutes on two cores."""
    set_up(as_json=as_json)
    from hedwig.benchmark import ratios, ratios_text

    results = ratios()
    show(dict(results), ratios_text(results))
