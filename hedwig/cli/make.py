"""Commands that make artefacts: the whole run, each stage of it, the demo, and embedding a listing on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hedwig.cli.console import Progress, set_up, show
from hedwig.cli.geocells import geocells_app
from hedwig.cli.summary import stage_figures, summary_lines

if TYPE_CHECKING:
    from hedwig.config import Experiment
    from hedwig.pipelines import Run

__all__ = ["register"]

ExperimentFile = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="Experiment file, e.g. experiments/demo.yaml")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, e.g. training.epochs=10")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, how much and how long; do nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Make the artefacts anew even when they are up to date.")]

# Command -> (stage, what it does): each runs one stage on the artefacts that are there.
STAGE_COMMANDS = {
    "caption": ("caption", "Write one caption per panorama.  Reads panoramas/, writes captions/."),
    "train": (
        "train",
        "Train projection and geocell classifier.  Reads embeddings/ and geocells/, writes geolocator/.",
    ),
    "index": ("index", "Build the retriever's index.  Reads embeddings/ and geolocator/, writes index/."),
}


CheckImages = Annotated[
    bool, typer.Option("--check-images", help="Look for images that changed since, by size and time.")
]
Rehash = Annotated[bool, typer.Option("--rehash", help="Look for images that changed since, by reading all of them.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("run", rich_help_panel="Make")(run)
    app.command("demo", rich_help_panel="Make")(demo)
    app.command("embed", rich_help_panel="Make")(embed)
    for name, (stage, text) in STAGE_COMMANDS.items():
        app.command(name, rich_help_panel="Make", help=text)(_stage_command(stage))
    text = "The geocells of an experiment.  Reads embeddings/, writes geocells/."
    geocells_app.command("run", help=text)(_stage_command("geocells"))


def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to run.")] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    check_images: CheckImages = False,
    rehash: Rehash = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run an experiment end to end; what is up to date is not done again, and only changed panoramas are embedded.

    Where a version is published, a new one grows beside it; see hedwig publish.

    Example: hedwig run experiments/real.yaml data.panoramas=listing.csv output=runs/mine
    """
    from hedwig.config import load_experiment

    set_up(quiet=quiet, as_json=as_json)
    x = load_experiment(experiment, overrides or ())
    _run(x, first, last, force=force, dry_run=dry_run, check_images=_look(check_images, rehash))


def _look(check_images: bool, rehash: bool) -> Literal["stamps", "contents"] | None:
    return "contents" if rehash else "stamps" if check_images else None


def _run(
    x: Experiment,
    first: str | None = None,
    last: str | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    check_images: Literal["stamps", "contents"] | None = None,
) -> Run | None:
    from hedwig.pipelines import run_experiment, use_storage
    from hedwig.pipelines.estimate import estimate

    if dry_run:
        use_storage(x.storage.model_dump())
        outlook = estimate(x, first, last)
        show(outlook, "\n".join(f"{name:<18} {value}" for name, value in outlook.items()))
        return None
    with Progress() as progress:
        done = run_experiment(x, first=first, last=last, force=force, progress=progress, check_images=check_images)
    _show_run(done)
    return done


def _show_run(done: Run) -> None:
    from hedwig import storage
    from hedwig.report import console_table

    output = storage.resolve(done.experiment.output)
    result: dict[str, Any] = {"output": output, "made": done.made, "resumed": done.resumed}
    figures = stage_figures(done)
    result["stages"] = figures
    text = f"Artefacts: {output}"
    report = storage.join(output, "report", "report.json")
    if storage.read_manifest(done.folder("evaluate")) is not None:
        record = json.loads(storage.read_bytes(report))
        result["methods"], result["report"] = record["methods"], report
        if record["methods"]:
            evaluation = {"methods": record["methods"], **(record["evaluation"] or {})}
            table = console_table(evaluation, synthetic=record["synthetic"], encoder_note=record["encoder_note"])
            text = f"{table}\n\n{text}"
        text += f"\nReport:    {storage.join(output, 'report', 'report.html')}"
    if figures:
        text += "\n\n" + "\n".join(summary_lines(figures))
    show(result, text)


def _stage_command(stage: str) -> Any:
    def command(
        experiment: ExperimentFile,
        overrides: Overrides = None,
        force: Force = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        from hedwig.config import load_experiment

        set_up(quiet=quiet, as_json=as_json)
        _run(load_experiment(experiment, overrides or ()), stage, stage, force=force)

    return command


def embed(
    listing: Annotated[str, typer.Argument(help="Panorama listing (.csv, .parquet, folder), or an experiment .yaml")],
    overrides: Overrides = None,
    model: Annotated[
        str, typer.Option("--model", help="viclip-*, clip-*, open_clip:ARCH, timm:ARCH, transformers:LABEL")
    ] = "",
    weights: Annotated[
        str | None, typer.Option("--weights", help="File, folder or fetched name; random weights without.")
    ] = None,
    fusion: Annotated[str, typer.Option("--fusion", help="auto, viclip, mean, max_sim or attention")] = "auto",
    num_frames: Annotated[int, typer.Option("--frames", min=1, max=64, help="Frames per panorama.")] = 8,
    long_captions: Annotated[str, typer.Option("--long-captions", help="truncate or chunks")] = "truncate",
    out: Annotated[str, typer.Option("--out", help="Folder of the embedding table; local, s3:// or gs://")] = "",
    captions: Annotated[str, typer.Option("--captions", help="template or none")] = "template",
    layout: Annotated[str, typer.Option("--layout", help="panoramas, or bearings: one row per heading")] = "panoramas",
    check_images: CheckImages = False,
    rehash: Rehash = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Embed the panoramas of a listing into one table; what is there already is not embedded again.

    With --fusion max_sim or attention the table also holds frame_embeddings: the vector of every frame.

    Settings may be changed as in an experiment, e.g. embed.num_actors=4 cluster.address=auto.

    Example: hedwig embed listing.csv --model viclip-tiny --out runs/embeddings
    """
    from hedwig.config import load_experiment, override, validate_experiment
    from hedwig.storage import join, resolve

    set_up(quiet=quiet, as_json=as_json)
    if listing.endswith((".yaml", ".yml")):
        _run(load_experiment(listing, overrides or ()), "embed", "embed", check_images=_look(check_images, rehash))
        return
    if not out or not model:
        raise typer.BadParameter("a listing needs --model NAME and --out DIR")
    out = resolve(out)
    from hedwig.pipelines.embed import embed_listing

    # Rejected rows are counted and kept, never fatal, unless an override says so: this command makes no experiment.
    settings: dict[str, Any] = {
        "name": "embed",
        "output": join(out, ".work"),
        "data": {"panoramas": listing, "layout": layout, "split": {"method": "column"}, "max_rejected": 0.999999},
        "slicing": {"num_frames": num_frames},
        "encoder": {"name": model, "weights": weights, "fusion": fusion, "long_captions": long_captions},
        "captions": {"source": captions},
        # Only the table is made: what a head or an index would say to these vectors does not matter here.
        "training": {"use_text": False},
        "index": {"embedding": "image"},
    }
    for assignment in overrides or ():
        override(settings, assignment)
    x = validate_experiment(settings, where="The command line")
    with Progress() as progress:
        manifest = embed_listing(x, out, progress, check_images=_look(check_images, rehash))
    counts = f"{manifest.num_out} of {manifest.num_in} panoramas, {manifest.num_rejected} rejected"
    if reused := manifest.details.get("reused", 0):
        counts += f", {reused} as before"
    result = {"output": out, "num_in": manifest.num_in, "num_out": manifest.num_out, "num_reused": reused}
    show({**result, "num_rejected": manifest.num_rejected, "reasons": manifest.rejected_reasons}, f"{out}: {counts}")


def demo(
    overrides: Overrides = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole job on a synthetic world, with a served answer at the end; minutes on two cores, no download."""
    from hedwig.cli.demo import serve_one_answer
    from hedwig.config import load_experiment

    set_up(quiet=quiet, as_json=as_json)
    done = _run(load_experiment(_experiment_file("demo"), overrides or ()), force=force)
    if done is not None:
        serve_one_answer(done.experiment)


def _experiment_file(name: str) -> Path:
    for folder in (Path("experiments"), Path(__file__).parents[2] / "experiments"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise FileNotFoundError(f"experiments/{name}.yaml is not here; run this in a clone of the repository.")
