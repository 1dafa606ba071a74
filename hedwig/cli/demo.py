"""The end of the demo: the run is served, asked over HTTP about a panorama it has never seen, and shut down again."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING, Any

import typer

from hedwig.cli.console import console

if TYPE_CHECKING:
    from hedwig.config import Experiment

__all__ = ["serve_one_answer"]

logger = logging.getLogger(__name__)


def serve_one_answer(x: Experiment) -> None:
    """Serve the run on a free loopback port and print its answer, which is kept and shown again by the next demo."""
    from hedwig import storage

    run = storage.resolve(x.output)
    kept = storage.join(run, "served_answer.json")
    digest = storage.manifest_digest(storage.join(run, "predictions"))
    answer: dict[str, Any] | None = None
    if storage.exists(kept):
        answer = json.loads(storage.read_bytes(kept))
        if answer is None or answer.get("predictions") != digest:
            answer = None
        else:
            logger.info("serve     up to date: the answer of %s is kept in %s", answer["question"], kept)
    if answer is None:
        answer = {"predictions": digest, **_ask(x, run)}
        storage.write_bytes(kept, (json.dumps(answer, indent=1) + "\n").encode())
    if not console.json:
        typer.echo(_text(answer, x.output))


def _ask(x: Experiment, run: str) -> dict[str, Any]:
    from hedwig import storage
    from hedwig.geo import haversine_km
    from hedwig.pipelines import ray_running
    from hedwig.serving import Client, start

    rows = storage.read_table(
        storage.join(run, "panoramas"), ["pano_id", "lat", "lon", "heading", "split", "image_uri"]
    )
    query = next(row for row in rows.to_pylist() if row["split"] == "test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ray_running(x.cluster):  # its end is the service's end
        url = start(run, port=port)
        image = storage.read_bytes(query["image_uri"])
        with Client(url) as client:
            answer = client.locate(image, heading=query["heading"]).model_dump()
    error_km = float(haversine_km(query["lat"], query["lon"], answer["lat"], answer["lon"]))
    return {"question": query["image_uri"], "truth": query, "url": url, "answer": answer, "error_km": error_km}


def _text(kept: dict[str, Any], output: str) -> str:
    answer, truth = kept["answer"], kept["truth"]
    near = ", ".join(f"{name} ({score:.2f})" for name, score in zip(
        answer["neighbour_ids"][:3], answer["neighbour_scores"][:3], strict=True))  # fmt: skip
    return "\n".join(
        [
            "",
            f"Served answer (POST {kept['url']}/v1/locate, synthetic panorama {truth['pano_id']}, held out):",
            f"  lat {answer['lat']:.3f}, lon {answer['lon']:.3f} within {answer['radius_km']:.0f} km; "
            f"confidence {answer['confidence']:.2f}; truth {truth['lat']:.3f}, {truth['lon']:.3f}: "
            f"{kept['error_km']:.0f} km off",
            f"  nearest references: {near}",
            f"Serve it yourself:  hedwig serve {output}",
        ]
    )
