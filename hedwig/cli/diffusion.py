"""Commands about panoramas made by diffusion: making them, and adapting the model that makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hedwig.cli.console import Progress, set_up, show
from hedwig.cli.listings import card_beside

__all__ = ["register"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Model = Annotated[str, typer.Option("--model", help="Folder of a Stable Diffusion checkpoint, e.g. models/sd-base")]
Height = Annotated[int, typer.Option("--height", min=64, help="Height in px, a multiple of 64; the width is twice it.")]
Prefix = Annotated[str | None, typer.Option("--prefix", help="Words before every caption; the model needs its own.")]
Suffix = Annotated[str | None, typer.Option("--suffix", help="Words after every caption.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("synthesize", rich_help_panel="Make")(synthesize)
    app.command("train-lora", rich_help_panel="Make")(train_lora)


def synthesize(
    source: Annotated[str, typer.Argument(metavar="LISTING|CAPTIONS", help="File with a caption column, or captions/")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder for images/ and panoramas.csv.")],
    controlnet: Annotated[
        str | None, typer.Option("--controlnet", help="Folder of sd-i2p: each row's image is the view in front.")
    ] = None,
    view_fov: Annotated[
        float | None,
        typer.Option("--view-fov", min=1, max=160, help="Of that view, degrees; of a photograph, its middle square."),
    ] = None,
    lora: Annotated[str | None, typer.Option("--lora", help="Folder of trained adapters.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", min=1.0, help="Classifier-free guidance.")] = 7.5,
    height: Height = 512,
    num_images: Annotated[int, typer.Option("--num-images-per-row", min=1, help="Panoramas per caption.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed makes other panoramas.")] = 0,
    image_format: Annotated[str, typer.Option("--format", help="jpeg or png")] = "jpeg",
    prefix: Prefix = None,
    suffix: Suffix = None,
    negative: Annotated[str | None, typer.Option("--negative", help="What the pictures should not show.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="What the rows say of their licence.")] = None,
    max_rejected: Annotated[
        float, typer.Option("--max-rejected", min=0.0, help="Share or count that may fail.")
    ] = 0.05,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make panoramas from captions by diffusion.  Writes images/ and panoramas.csv; for training, never evaluation.

    Example: hedwig synthesize runs/real/captions --model models/sd-base --out runs/synthesised
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig.pipelines.synthesis import LICENCE
    from hedwig.pipelines.synthesis import synthesize as make

    generator: dict[str, Any] = {
        "model": model,
        "controlnet": controlnet,
        "view_fov_deg": view_fov,
        "lora": lora,
        "num_steps": steps,
        "guidance": guidance,
        "height_px": height,
        "image_format": image_format,
        "seed": seed,
        "template": _template(prefix, suffix, negative),
    }
    with Progress() as progress:
        manifest = make(
            source,
            str(out),
            generator=generator,
            num_images_per_row=num_images,
            licence=licence or LICENCE,
            max_rejected=max_rejected,
            progress=lambda *counts: progress("synthesis", *counts),
        )
    listing = str(out / "panoramas.csv")
    counts = {"num_in": manifest.num_in, "num_out": manifest.num_out, "num_rejected": manifest.num_rejected}
    result = {
        "listing": listing,
        "card": card_beside(listing),
        **counts,
        "reasons": manifest.rejected_reasons,
        **manifest.details,
    }
    text = f"{manifest.num_out} of {manifest.num_in} panoramas made, {manifest.num_rejected} rejected: {listing}"
    if manifest.details["num_captions_cut"]:
        text += f"\n{manifest.details['num_captions_cut']} captions were longer than the prompt and were cut."
    show(result, text)


def _template(prefix: str | None, suffix: str | None, negative: str | None) -> Any:
    """The template with the words that were given, or None when none were."""
    from hedwig.diffusion.prompts import PromptTemplate

    words = {"prefix": prefix, "suffix": suffix, "negative": negative}
    given = {name: text for name, text in words.items() if text is not None}
    return PromptTemplate(**given) if given else None


def train_lora(
    captions: Annotated[str, typer.Argument(metavar="CAPTIONS", help="Captions table: runs/NAME/captions")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Folder for the adapters; checkpoints go to .training in it.")],
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Per step, over all workers.")] = 4,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-4,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the adapters.")] = 8,
    height: Height = 512,
    min_snr_gamma: Annotated[float, typer.Option("--min-snr-gamma", min=0.0, help="0 for none.")] = 5.0,
    caption_dropout: Annotated[float, typer.Option("--caption-dropout", min=0.0, max=1.0)] = 0.1,
    prefix: Prefix = None,
    suffix: Suffix = None,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Ray Train workers; 0: in this process.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="One GPU per worker.")] = False,
    run_name: Annotated[str, typer.Option("--run-name", help="The same name continues a run.")] = "lora",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the panorama model on one's own panoramas by LoRA.  Writes pytorch_lora_weights.safetensors.

    Example: hedwig train-lora runs/real/captions --model models/sd-base --out runs/lora --gpu
    """
    set_up(quiet=quiet, as_json=as_json)
    from contextlib import nullcontext

    from hedwig import storage
    from hedwig.config import ClusterConfig
    from hedwig.pipelines.cluster import ray_running
    from hedwig.training.diffusion import train_lora as train

    output = storage.resolve(str(out))
    with ray_running(ClusterConfig()) if workers else nullcontext():
        result = train(
            panoramas=captions,
            model=model,
            output=output,
            scratch=storage.join(output, ".training"),
            run_name=run_name,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            rank=rank,
            height_px=height,
            min_snr_gamma=min_snr_gamma or None,
            caption_dropout=caption_dropout,
            template=_template(prefix, suffix, None),
            gradient_checkpointing=checkpointing,
            num_workers=workers,
            use_gpu=gpu,
            seed=seed,
        )
    loss, epoch = result["train_loss"], result["epoch"]
    show(result, f"{result['file']}: {result['num_train']} panoramas, loss {loss:.4f} after epoch {epoch + 1}")
