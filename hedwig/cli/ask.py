"""Commands that ask a finished run: predict for images, serve for everybody, locate for whoever is served."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hedwig.cli import locate
from hedwig.cli.console import console, set_up

__all__ = ["register"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("predict", rich_help_panel="Ask")(predict)
    app.command("serve", rich_help_panel="Ask")(serve)
    locate.register(app)


def predict(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Panoramas: JPEG, PNG or WebP; paths or URIs.")
    ],
    run: Annotated[str, typer.Option("--run", help="Run folder.")] = "runs/demo",
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=50, help="Cells and neighbours to list.")] = 5,
    heading: Annotated[float | None, typer.Option(help="Degrees from north of the image's centre column.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads; 1 is what a served replica has.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per image.")] = False,
    geojson: Annotated[bool, typer.Option("--geojson", help="A GeoJSON FeatureCollection.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say where images were taken, with the evidence.  Reads a run folder.

    Example: hedwig predict panorama.jpg --run runs/demo
    """
    set_up(quiet=quiet, as_json=as_json)
    import torch

    from hedwig.retrieve import Hedwig

    torch.set_num_threads(threads)
    hedwig = Hedwig.load(run)
    features: list[dict[str, Any]] = []
    failed = 0
    for image in images:
        try:
            answer = hedwig.locate(image, top_k=top_k, heading=float("nan") if heading is None else heading)
        except (OSError, ValueError) as error:
            failed += 1
            typer.echo(f"Error: {image}: {error}", err=True)
            continue
        if geojson:
            features.append(answer.to_geojson())
        elif console.json:
            typer.echo(json.dumps({"image": image, **answer.to_dict()}))
        else:
            typer.echo(_text(image, answer.to_dict()))
    if geojson:
        typer.echo(json.dumps(_collection(features)))
    if failed:
        typer.echo(f"{failed} of {len(images)} images could not be located.", err=True)
        raise typer.Exit(3)


def _collection(parts: list[dict[str, Any]]) -> dict[str, Any]:
    features = [f for part in parts for f in (part["features"] if part["type"] == "FeatureCollection" else [part])]
    return {"type": "FeatureCollection", "features": features}


def _text(image: str, answer: dict[str, Any]) -> str:
    cells = zip(answer["cell_ids"], answer["cell_probs"], strict=True)
    near = zip(
        answer["neighbour_ids"],
        answer["neighbour_scores"],
        answer["neighbour_lat"],
        answer["neighbour_lon"],
        strict=True,
    )
    return "\n".join(
        [
            f"{image}: lat {answer['lat']:.5f}, lon {answer['lon']:.5f}, within {answer['radius_km']:.0f} km (90 %), "
            f"confidence {answer['confidence']:.3f}",
            "  geocells    " + ", ".join(f"{cell} ({prob:.3f})" for cell, prob in cells),
            "  neighbours  " + ", ".join(f"{name} ({score:.3f}) at {a:.3f}, {o:.3f}" for name, score, a, o in near),
        ]
    )


def serve(
    run: Annotated[str, typer.Argument(help="Run folder, e.g. runs/demo")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: serve.host of the run.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: serve.port of the run.")] = None,
    num_replicas: Annotated[int | None, typer.Option("--replicas", min=1, help="Copies of encoder and index.")] = None,
    proxy: Annotated[
        Literal["auto", "python", "haproxy"] | None,
        typer.Option(help="haproxy: faster, repeats what a lost replica took with it; on loopback the default."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow an address other than loopback, without keys.")
    ] = False,
    address: Annotated[
        str | None, typer.Option("--ray-address", help="An existing Ray cluster; default: a local Ray.")
    ] = None,
    write_config: Annotated[
        Path | None, typer.Option("--write-config", help="Write a file for `serve deploy`, and serve nothing.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Serve what is published of a run over HTTP until interrupted.  POST image bytes to /v1/locate.

    What is published later is served within seconds, without a start: hedwig publish RUN, hedwig rollback RUN.

    Example: hedwig serve runs/demo, then:
    curl -H 'Content-Type: image/jpeg' --data-binary @panorama.jpg http://127.0.0.1:8000/v1/locate
    """
    set_up(quiet=quiet)
    from hedwig import storage
    from hedwig.publishing import published_folder

    folder = published_folder(run)
    if storage.read_manifest(storage.join(folder, "index")) is None:
        raise FileNotFoundError(f"{run} holds no finished index; make one with: hedwig run EXPERIMENT output={run}")
    given = {"host": host, "port": port, "num_replicas": num_replicas, "proxy": proxy}
    settings = _serve_settings(folder) | {name: value for name, value in given.items() if value is not None}
    if write_config is not None:
        from hedwig.serving.deployable import deployable

        write_config.write_text(deployable(run, settings, insecure=insecure, name=str(write_config))[1])
        typer.echo(f"Wrote {write_config}; deploy it with: serve deploy {write_config}", err=True)
        return
    from hedwig.config import ClusterConfig
    from hedwig.pipelines import ray_running
    from hedwig.serving import start, start_ray, stop
    from hedwig.serving.deployment import needed

    if address is None:
        os.environ.pop("RAY_ADDRESS", None)
        cpus = needed(storage.resolve(run), settings, most=True)["CPU"]
        start_ray(settings["host"], settings.get("proxy", "auto"), num_cpus=cpus)
    with ray_running(ClusterConfig(address=address)):
        # Ray's own SIGTERM handler ends the process at once, and SIGINT is ignored in a shell's background.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            url = start(storage.resolve(run), insecure=insecure, **settings)
            typer.echo(f"Serving {Path(run)} at {url}  (API: {url}/openapi.json, stop with Ctrl-C)", err=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            typer.echo("Stopping: requests under way are finished.", err=True)
        finally:
            stop(ray_too=address is None)


def _serve_settings(run: str) -> dict[str, Any]:
    """The ``serve`` section of the experiment that made the run, or its defaults."""
    from hedwig import storage
    from hedwig.config import ServeConfig, parse_yaml, validate_experiment

    path = storage.join(storage.resolve(run), "experiment.yaml")
    if not storage.exists(path):
        return ServeConfig().model_dump()
    settings = parse_yaml(storage.read_bytes(path).decode(), where=path)
    return validate_experiment(settings, where=path).serve.model_dump()
