"""Commands about data before any model: read foreign data sets, put bearings together, look at image quality.

Each says how many rows went in, came out and were rejected, and keeps the rejected ones with their reasons in a file
beside the result. They run in this process, without Ray: their work is reading and resizing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hedwig.cli.console import DATA_REFUSED, Progress, set_up, show
from hedwig.cli.listings import (
    account,
    card_beside,
    file_name,
    folder_of,
    refuse_overwriting,
    rejection,
    relative,
    write_rows,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["register"]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Kind = Literal[
    "csv", "folder", "g3", "global-streetscapes", "gws15k", "im2gps3k", "kaggle", "osv5m", "webdataset", "yfcc4k"
]  # fmt: skip
_BATCH = 32
_BEARING_FILE = re.compile(r"(?P<pano>.+)[_/](?P<heading>-?\d+(?:\.\d+)?)\.(?:jpe?g|png|webp)", re.IGNORECASE)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("listing", rich_help_panel="Data")(listing)
    app.command("stitch", rich_help_panel="Data")(stitch)
    app.command("check-images", rich_help_panel="Data")(check_images)


def listing(
    kind: Annotated[Kind, typer.Argument(help="What is at PATH.")],
    path: Annotated[str, typer.Argument(help="The data set's table, folder or tar.")],
    out: Annotated[str, typer.Option("--out", help="Listing to write: .csv or .parquet.")],
    images: Annotated[str | None, typer.Option(help="Folder of the images, where it is not that of PATH.")] = None,
    source: Annotated[str | None, typer.Option(help="Source of rows that name none.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of rows that name none.")] = None,
    sha256: Annotated[bool, typer.Option(help="Read local images and write their digests.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a data set or a folder of photographs and write a checked listing of panoramas.

    Rows that cannot be used are kept with their reason beside it, in NAME.rejected.csv; a data card in NAME.card.html.

    Example: hedwig listing folder photos/ --licence "CC BY 4.0" --out panoramas.csv
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import storage
    from hedwig.sources import check_listing

    out = storage.resolve(out)
    if not out.lower().endswith((".csv", ".parquet")):
        raise typer.BadParameter(f"--out {out} must end with .csv or .parquet")
    rejected_at = os.path.splitext(out)[0] + ".rejected.csv"
    refuse_overwriting(storage.resolve(path), (out, rejected_at))
    frame = _rows_of(kind, path, images)
    for name, value in (("source", source), ("licence", licence)):
        if value is not None:
            frame[name] = [there or value for there in frame[name]]
    checked = check_listing(frame, image_root=images or folder_of(storage.resolve(path)), sha256=sha256)
    rows = checked.panoramas.drop_columns(["bearing_uri", "bearing_deg"]).to_pylist()
    for row in rows:
        row["image_uri"] = relative(row["image_uri"], folder_of(out))
    write_rows(out, rows, [n for n in checked.panoramas.column_names if n not in ("bearing_uri", "bearing_deg")])
    result = account(checked, len(rows), checked.rejected.to_pylist(), rejected_at)
    located = sum(row["lat"] is not None for row in rows)
    result |= {"listing": out, "card": card_beside(out), "num_located": located, "reasons": checked.reasons}
    reasons = "".join(f"\n  {count} x {reason}" for reason, count in checked.reasons.items())
    show(result, f"{len(rows)} of {checked.num_in} rows, {located} with a position: {out}{reasons}")
    if not rows:
        raise typer.Exit(DATA_REFUSED)


def stitch(
    path: Annotated[str, typer.Argument(metavar="LISTING|DIR", help="Rows of bearings, or PANO_HEADING.jpg files.")],
    out: Annotated[str, typer.Option("--out", help="Folder for panoramas.csv and images/.")],
    fov_deg: Annotated[
        float | None,
        typer.Option("--fov", help="Horizontal field of view, degrees; else the listing's fov_deg, or 90."),
    ] = None,
    pitch_deg: Annotated[float, typer.Option("--pitch", help="Elevation of the pictures' centres, degrees.")] = 0.0,
    height_px: Annotated[int, typer.Option("--height", min=16, max=4096, help="Rows of a panorama.")] = 512,
    projection: Annotated[Literal["equirectangular", "strip"], typer.Option(help="See above.")] = "equirectangular",
    heading_deg: Annotated[float, typer.Option("--heading", help="Heading of the centre column.")] = 0.0,
    feather_deg: Annotated[float, typer.Option("--feather", help="Blending on either side of a seam.")] = 10.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put the pictures of one place, one per heading, together into one panorama each.

    A listing has one row per picture, with pano_id and heading; a folder has files PANO_HEADING.jpg or
    PANO/HEADING.jpg. 'equirectangular' is the whole sphere, black where nothing was seen; 'strip' is the cylinder of
    all that every heading shows. Exit code 3 when something was rejected; a picture whose listing says another field of
    view than --fov is.

    Example: hedwig stitch streetview/panoramas.csv --out stitched/
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import storage
    from hedwig.panorama.stitcher import ViewStitcher
    from hedwig.sources import ImageReader, check_listing, read_listing

    path, out = storage.resolve(path), storage.resolve(out)
    target, rejected_at = storage.join(out, "panoramas.csv"), storage.join(out, "rejected.csv")
    refuse_overwriting(path, (target, rejected_at))
    if storage.is_folder(path) and not storage.list_files(path, suffix=".parquet"):
        frame, root = _bearings_in(path), path
    else:
        frame, root = read_listing(path), folder_of(path)
    checked = check_listing(frame, image_root=root, layout="bearings")
    inputs = {uri for uris in checked.panoramas["bearing_uri"].to_pylist() for uri in uris}
    for pano_id in checked.panoramas["pano_id"].to_pylist():
        if (image := storage.join(out, "images", f"{file_name(pano_id)}.jpg")) in inputs:
            raise ValueError(f"{image} is one of the pictures and would be overwritten; choose another --out.")
    stages = (
        ImageReader(),
        ViewStitcher(
            fov_deg=fov_deg, pitch_deg=pitch_deg, height_px=height_px, projection=projection,
            heading_deg=heading_deg, feather_deg=feather_deg,
        ),
    )  # fmt: skip
    rows, rejected = [], checked.rejected.to_pylist()
    for row, batch, reason in _through(stages, checked.panoramas, "stitch"):
        if reason is not None:
            rejected.append(rejection(row, "stitch", reason))
            continue
        data = batch["image_bytes"]
        name = f"images/{file_name(row['pano_id'])}.jpg"
        storage.write_bytes(storage.join(out, *name.split("/")), data)
        num_bearings = len(row.pop("bearing_uri"))
        row.pop("bearing_deg")
        made = {name: batch[name] for name in ("projection", "heading", "band_deg", "overlap_deg")}
        made |= {"sha256": hashlib.sha256(data).hexdigest(), "fov_deg": None}
        rows.append({**row, **made, "image_uri": name, "num_bearings": num_bearings})
    columns = [n for n in checked.panoramas.column_names if n not in ("bearing_uri", "bearing_deg")]
    write_rows(target, rows, [*columns, "band_deg", "overlap_deg", "num_bearings"])
    result = account(checked, len(rows), rejected, rejected_at)
    bands = sorted({row["band_deg"] for row in rows})
    text = f"{len(rows)} of {result['num_in']} stitched: {target}"
    if bands:
        text += (
            f"\nEvery heading shows {bands[0]:g} degrees around the horizon: slice with slicing.band_deg={bands[0]:g}."
        )
    show({**result, "listing": target, "card": card_beside(target), "band_deg": bands}, text)
    if rejected:
        raise typer.Exit(DATA_REFUSED)


def check_images(
    path: Annotated[str, typer.Argument(metavar="LISTING", help="Listing of panoramas or photographs.")],
    out: Annotated[str | None, typer.Option("--out", help="Folder for quality.csv and the rows worth keeping.")] = None,
    layout: Annotated[Literal["panoramas", "bearings"], typer.Option(help="One row per panorama or heading.")] = (
        "panoramas"
    ),
    min_sharpness: Annotated[float, typer.Option(help="Variance of the Laplacian at 512 px width.")] = 15.0,
    max_bits: Annotated[int, typer.Option(min=0, max=16, help="Bits in which near duplicates may differ.")] = 8,
    drop_duplicates: Annotated[bool, typer.Option(help="Reject all but the first of each group.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure every image of a listing: sharpness, exposure, emptiness, and which are the same picture.

    With --out: quality.csv (every row), panoramas.csv (rows worth keeping) and rejected.csv (the others, with reason).
    Exit code 3 when something was rejected.

    Example: hedwig check-images panoramas.csv --out checked/
    """
    set_up(quiet=quiet, as_json=as_json)
    from hedwig import storage
    from hedwig.panorama.quality import QualityFilter, QualityLimits
    from hedwig.sources import ImageReader, check_listing, read_listing

    path = storage.resolve(path)
    if out is not None:
        out = storage.resolve(out)
        refuse_overwriting(path, tuple(storage.join(out, f"{n}.csv") for n in ("panoramas", "quality", "rejected")))
    checked = check_listing(read_listing(path), image_root=folder_of(path), layout=layout)
    stages = (ImageReader(), QualityFilter(limits=QualityLimits(min_sharpness=min_sharpness)))
    numbers = QualityFilter.writes[:-2]
    panoramas, measured = [], []
    for row, batch, reason in _through(stages, checked.panoramas, "check"):
        panoramas.append(row)
        if reason is None:
            _digest(row, batch["image_bytes"])
        has_numbers = "sharpness" in batch
        measured.append(
            {
                "pano_id": row["pano_id"],
                **{name: float(f"{batch[name]:.4g}") if has_numbers else None for name in numbers},
                "perceptual_hash": int(batch["perceptual_hash"]) if has_numbers else 0,
                "roll_hash": int(batch["roll_hash"]) if has_numbers else 0,
                "reason": reason,
                "duplicate_of": None,
            }
        )
    _mark_duplicates(measured, panoramas, max_bits, drop_duplicates)
    rejected = checked.rejected.to_pylist()
    for row, found in zip(panoramas, measured, strict=True):
        if found["reason"] is not None:
            rejected.append(rejection(row, "quality", found["reason"]))
    kept = [row for row, found in zip(panoramas, measured, strict=True) if found["reason"] is None]
    rejected_at = card = None
    if out is not None:
        write_rows(storage.join(out, "quality.csv"), measured, list(measured[0]) if measured else ["pano_id"])
        write_rows(storage.join(out, "panoramas.csv"), *_as_listing(kept, checked.panoramas.column_names))
        rejected_at, card = storage.join(out, "rejected.csv"), card_beside(storage.join(out, "panoramas.csv"))
    result = account(checked, len(kept), rejected, rejected_at)
    num_duplicates = sum(found["duplicate_of"] is not None for found in measured)
    lines = [f"{'pano_id':<36} {'sharp':>7} {'bright':>6} {'entropy':>7} {'flat':>5}  remark"]
    lines += [_line(found) for found in measured]
    lines.append(f"{len(kept)} of {result['num_in']} kept, {num_duplicates} near duplicates.")
    show({**result, "card": card, "num_duplicates": num_duplicates, "images": measured}, "\n".join(lines))
    if rejected:
        raise typer.Exit(DATA_REFUSED)


def _rows_of(kind: str, path: str, images: str | None) -> pd.DataFrame:
    from hedwig.sources import read_listing
    from hedwig.sources.datasets import read_g3, read_global_streetscapes, read_kaggle, read_osv5m
    from hedwig.sources.folder import read_folder
    from hedwig.sources.protocols import read_protocol
    from hedwig.sources.readers import listing_frame
    from hedwig.sources.tars import read_webdataset

    if kind == "csv":
        return read_listing(path)
    if kind in ("folder", "webdataset"):
        if images is not None:
            raise typer.BadParameter(f"--images has no meaning for {kind}: the images are at PATH")
        return listing_frame(read_folder(path) if kind == "folder" else read_webdataset(path))
    if kind in ("gws15k", "im2gps3k", "yfcc4k"):
        return listing_frame(read_protocol(kind, path, images=images))
    readers: dict[str, Callable[..., pa.Table]] = {
        "g3": read_g3, "global-streetscapes": read_global_streetscapes, "kaggle": read_kaggle, "osv5m": read_osv5m,
    }  # fmt: skip
    return listing_frame(readers[kind](path, images=images))


def _bearings_in(folder: str) -> pd.DataFrame:
    """Rows of one image per heading from the names of the files in a folder."""
    from hedwig import storage
    from hedwig.sources.readers import listing_frame, listing_table

    found: dict[str, list[str]] = {"pano_id": [], "heading": [], "image_uri": []}
    for file in storage.list_files(folder, recursive=True):
        match = _BEARING_FILE.fullmatch(file[len(folder.rstrip("/")) + 1 :])
        if match is not None:
            found["pano_id"].append(match["pano"])
            found["heading"].append(match["heading"])
            found["image_uri"].append(file)
    if not found["pano_id"]:
        raise FileNotFoundError(
            f"{folder} holds neither PANO_HEADING.jpg nor PANO/HEADING.jpg, such as place7_090.jpg."
        )
    return listing_frame(listing_table(found, len(found["pano_id"])))


def _through(
    stages: tuple[Any, ...], table: pa.Table, what: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any], str | None]]:
    """Each row of `table`, what the stages made of it, and why it failed or None; small batches, in order."""
    import numpy as np

    with Progress() as progress:
        for start in range(0, table.num_rows, _BATCH):
            rows = table.slice(start, _BATCH).to_pylist()
            batch: dict[str, Any] = {}
            for name in table.column_names:
                column = np.empty(len(rows), dtype=object)
                for place, row in enumerate(rows):
                    column[place] = row[name]
                batch[name] = column
            reasons: list[str | None] = [None] * len(rows)
            made: list[dict[str, Any]] = [{} for _ in rows]
            alive = np.arange(len(rows))
            for stage in stages:
                if not len(alive):
                    break
                batch = stage(batch)
                failure = batch.pop("failure", np.full(len(alive), None, dtype=object))
                for place, index in enumerate(alive):
                    made[index] = {name: column[place] for name, column in batch.items()}
                    reasons[index] = None if failure[place] is None else str(failure[place])
                good = np.array([reason is None for reason in failure], dtype=bool)
                batch = {name: column[good] for name, column in batch.items()}
                alive = alive[good]
            yield from zip(rows, made, reasons, strict=True)
            progress(what, start + len(rows), table.num_rows)


def _mark_duplicates(
    measured: list[dict[str, Any]], panoramas: list[dict[str, Any]], max_bits: int, drop: bool
) -> None:
    """Fill ``duplicate_of``: the first of the same picture, or of panoramas the same one turned."""
    import numpy as np

    from hedwig.panorama.duplicates import duplicate_groups, near_duplicates

    usable = [i for i, found in enumerate(measured) if found["reason"] is None]
    sphere = [i for i in usable if panoramas[i]["projection"] == "equirectangular"]
    pairs = []
    for rows, name in ((usable, "perceptual_hash"), (sphere, "roll_hash")):
        hashes = np.array([measured[i][name] for i in rows], dtype=np.uint64)
        pairs.append(np.array(rows, dtype=np.int64)[near_duplicates(hashes, max_bits)[0]].reshape(-1, 2))
    first = duplicate_groups(np.concatenate(pairs), len(measured))
    for index, found in enumerate(measured):
        if first[index] != index:
            found["duplicate_of"] = measured[first[index]]["pano_id"]
            if drop:
                found["reason"] = f"near duplicate: of {found['duplicate_of']!r}"
        for name in ("perceptual_hash", "roll_hash"):
            found[name] = f"{found[name]:016x}"


def _digest(row: dict[str, Any], images: Any) -> None:
    """Fill ``sha256``, or ``bearing_sha256`` of a row in bearings, from the bytes that were read."""
    if row["bearing_uri"]:
        row["bearing_sha256"] = [hashlib.sha256(image).hexdigest() for image in images]
    else:
        row["sha256"] = hashlib.sha256(images).hexdigest()


def _as_listing(rows: list[dict[str, Any]], names: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Kept rows as a listing again: one row per panorama, or per heading where it came in bearings."""
    listed = []
    for row in rows:
        if row["bearing_uri"]:
            names_of_one = ("image_uri", "heading", "sha256")
            images = zip(row["bearing_uri"], row["bearing_deg"], row["bearing_sha256"], strict=True)
            listed += [{**row, "projection": None, **dict(zip(names_of_one, one, strict=True))} for one in images]
        else:
            listed.append(row)
    return listed, [name for name in names if name not in ("bearing_uri", "bearing_deg")]


def _line(found: dict[str, Any]) -> str:
    remark = found["reason"] or (f"same as {found['duplicate_of']}" if found["duplicate_of"] else "")
    if found["sharpness"] is None:
        return f"{found['pano_id']:<36} {'':>28}  {remark}"
    numbers = f"{found['sharpness']:>7.0f} {found['brightness']:>6.0f} {found['entropy_bits']:>7.1f}"
    return f"{found['pano_id']:<36} {numbers} {found['flatness']:>5.2f}  {remark}".rstrip()
