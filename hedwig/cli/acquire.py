"""The command that fetches panoramas from a source of imagery, after showing its terms and what it will cost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedwig.cli.console import Progress, set_up, show

if TYPE_CHECKING:
    from hedwig.acquisition.offers import ImageSource

__all__ = ["register"]

TERMS_FILE = "terms.json"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("acquire", rich_help_panel="Data")(acquire)


def acquire(
    source: Annotated[str, typer.Argument(help="streetview, mapillary or panoramax")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.csv", help="A sampling plan: lat, lon, plan_id, region.")],
    out: Annotated[str, typer.Option("--out", help="Folder for images/, panoramas.csv, ATTRIBUTION.md, the manifest.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="You have read the source's terms; needed where images are billed.")
    ] = False,
    radius_m: Annotated[float, typer.Option(min=1, help="How far from a point a panorama may lie, in metres.")] = 50.0,
    per_point: Annotated[int, typer.Option(min=1, help="Most panoramas per point.")] = 1,
    per_second: Annotated[float, typer.Option(min=0.01, help="Most requests a second, retries included.")] = 10.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 16,
    headings: Annotated[int | None, typer.Option(min=1, max=36, help="streetview: bearings; default 8.")] = None,
    fov_deg: Annotated[float | None, typer.Option("--fov", help="streetview: field of view; default 90.")] = None,
    width_px: Annotated[int | None, typer.Option("--width", help="mapillary: 2048, or 0 for the original.")] = None,
    asset: Annotated[str | None, typer.Option(help="panoramax: hd, sd or thumb; default sd.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Another address of the same API.")] = None,
    usd_per_1000: Annotated[
        float | None, typer.Option("--price-per-1000", min=0, help="Price of 1000 images, to state the cost.")
    ] = None,
    max_usd: Annotated[float | None, typer.Option(min=0, help="Stop before this run spends more.")] = None,
    max_images: Annotated[int | None, typer.Option(min=0, help="Stop before this run fetches more.")] = None,
    max_rejected: Annotated[float, typer.Option(min=0, help="Share (< 1) or count of panoramas that may fail.")] = 0.05,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fetch the panoramas of a plan.  Resumable, never faster than asked, nothing requested twice.

    Keys: HEDWIG_STREETVIEW_KEY (and HEDWIG_STREETVIEW_SECRET to sign), HEDWIG_MAPILLARY_TOKEN; panoramax needs none.

    Example: hedwig acquire mapillary plan.csv --out data/mapillary --accept-terms
    """
    set_up(quiet=quiet, as_json=as_json)
    import pandas as pd

    from hedwig import storage
    from hedwig.acquisition.costs import estimate
    from hedwig.acquisition.fetching import image_source
    from hedwig.config import ClusterConfig
    from hedwig.pipelines.acquire import Acquisition
    from hedwig.pipelines.acquire import acquire as fetch
    from hedwig.pipelines.cluster import ray_running

    given = {"headings": headings, "fov_deg": fov_deg, "width_px": width_px, "asset": asset, "base_url": base_url}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    made = image_source(source, **options)
    if not plan.is_file():
        raise FileNotFoundError(f"No plan at {str(plan)!r}; make one with: hedwig plan regions|world|population")
    # Namibia's code is NA.
    points = pd.read_csv(plan, dtype={"plan_id": str, "region": str}, keep_default_na=False)
    if max_usd is not None:
        if not usd_per_1000:
            raise typer.BadParameter("--max-usd needs --price-per-1000 above 0")
        affordable = int(max_usd / usd_per_1000 * 1000)
        max_images = affordable if max_images is None else min(affordable, max_images)
    outlook = estimate(
        len(points) * per_point, source, headings=headings or 8, price_per_1000=usd_per_1000, requests_per_s=per_second
    )
    typer.echo(outlook.text(), err=True)
    _show_terms(storage.join(storage.resolve(out), TERMS_FILE), made, accept_terms)
    wanted = Acquisition(
        source=source, options=options, radius_m=radius_m, per_point=per_point, per_second=per_second,
        concurrency=concurrency, max_images=max_images, usd_per_1000=usd_per_1000, max_rejected=max_rejected,
    )  # fmt: skip
    with ray_running(ClusterConfig()), Progress() as progress:
        manifest = fetch(points, wanted, out, progress)
    d = manifest.details
    cost = "not stated (--price-per-1000)" if d["cost_usd"] is None else f"{d['cost_usd']:.2f} USD"
    text = (
        f"{manifest.num_out} panoramas ({d['num_images']} images) for {d['num_points']} points, "
        f"{d['num_points_without_panorama']} points without one, {manifest.num_rejected} rejected; "
        f"{d['num_requests']} requests in all, cost {cost}: {storage.join(out, 'panoramas.csv')}"
    )
    result = {"num_in": manifest.num_in, "num_out": manifest.num_out, "num_rejected": manifest.num_rejected, **d}
    show({**result, "listing": storage.join(out, "panoramas.csv"), "seconds": manifest.seconds}, text)
    if d["num_left_by_quota"]:
        typer.echo(f"{d['num_left_by_quota']} rows are left: the quota or the bound is spent. Run it again.", err=True)
        raise typer.Exit(3)


def _show_terms(record: str, source: ImageSource, accepted: bool) -> None:
    """Show the terms before the first use; where images are billed, go on only when they are accepted."""
    from hedwig import storage

    if storage.exists(record):
        known = json.loads(storage.read_bytes(record))
        if known.get("source") == source.name and known.get("terms") == source.terms:
            return
    typer.echo(f"Terms of {source.name}: {source.terms}", err=True)
    if source.paid and not accepted:
        if not sys.stdin.isatty():
            raise typer.BadParameter("images are billed: read the terms above, and repeat with --accept-terms")
        typer.confirm("Images are billed. Do you accept these terms?", abort=True, err=True)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = {"source": source.name, "terms": source.terms, "shown_at": moment, "accepted": accepted or source.paid}
    storage.write_bytes(record, (json.dumps(entry, indent=1, ensure_ascii=False) + "\n").encode())
