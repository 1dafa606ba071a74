"""Fetch the panoramas of a sampling plan: plan -> offers -> images, a listing, and a record of what it cost.

Two tables on Ray, each row exactly once: what the source has around every planned point, then the images of the
panoramas chosen. Between them the driver chooses: nearest first, no panorama twice. One actor asks by default, because
a source's rate is a promise and one process keeps hundreds of requests a second under way; several share the rate. The
listing is what `hedwig run` reads; a point without a panorama is counted in the manifest, it is not a rejected row.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

from hedwig import storage
from hedwig.acquisition.fetching import QUOTA, Fetcher, Finder, image_source
from hedwig.acquisition.offers import Offer
from hedwig.answers import AnswerStore
from hedwig.config import EmbedConfig
from hedwig.geocells import Geography
from hedwig.pipelines.chain import Step
from hedwig.pipelines.rows import RowsTask, enforce_max_rejected, map_rows

__all__ = ["Acquisition", "acquire"]

WORK = ".acquisition"
LISTING_COLUMNS = (
    "pano_id", "lat", "lon", "heading", "fov_deg", "projection", "captured_at", "sequence", "image_uri", "source",
    "licence", "author", "sha256", "plan_id", "region",
)  # fmt: skip
OFFERS = pa.schema([("pano_id", pa.string()), ("split", pa.string()), ("offers", pa.string())])
IMAGES = pa.schema(
    [
        ("pano_id", pa.string()),
        ("split", pa.string()),
        ("offer", pa.string()),
        ("plan_id", pa.string()),
        ("region", pa.string()),
        ("image_uris", pa.list_(pa.string())),
        ("sha256s", pa.list_(pa.string())),
        ("num_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Acquisition:
    """What is to be fetched, from whom and how politely.

    Attributes:
        source: 'streetview', 'mapillary' or 'panoramax'.
        options: of the source, such as headings or base_url; never a key.
        radius_m: how far from a planned point a panorama may lie, in metres.
        per_point: most panoramas per planned point.
        per_second: most requests a second, of all actors together.
        concurrency: requests under way in one actor.
        max_attempts: how often one request is made at most.
        max_images: most images that this run asks for, repetitions counted; None for no bound. With a bound one
            process asks.
        usd_per_1000: price of 1000 images; None: cost is not stated.
        num_actors: processes that ask.
        max_rejected: share (< 1) or count (>= 1) of points and panoramas that may fail; a spent quota is no failure.
    """

    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    radius_m: float = 50.0
    per_point: int = 1
    per_second: float = 10.0
    concurrency: int = 16
    max_attempts: int = 6
    max_images: int | None = None
    usd_per_1000: float | None = None
    num_actors: int = 1
    max_rejected: float = 0.05


def acquire(
    plan: pd.DataFrame, wanted: Acquisition, out: str, progress: Callable[[str, int, int], None] | None = None
) -> storage.Manifest:
    """Fetch what `plan` asks for into `out`; the same call goes on where a killed one stopped.

    Args:
        plan: ``lat, lon`` in degrees, and ``plan_id``, ``region`` if there.
        wanted: from whom and how.
        out: folder for ``images/``, ``panoramas.csv``, ``ATTRIBUTION.md`` and the manifest.
        progress: called with (stage, rows done, rows in all).

    Raises:
        TooManyRejected: more points or panoramas failed than allowed; what came is in the listing all the same, and
            is not asked for again.
        PermissionError: the source needs a key that the environment does not hold.
    """
    started = time.monotonic()
    out = storage.resolve(out)
    source = image_source(wanted.source, **wanted.options)  # before Ray starts: a missing key is said at once
    config = {k: v for k, v in asdict(wanted).items() if k in ("source", "options", "radius_m", "per_point")}
    config = json.loads(json.dumps({**config, "digest": source.digest}))
    points = _plan_table(plan)
    inputs = {"plan": storage.fingerprint("plan", {}, {"rows": _digest(points)})}
    _refuse_another_source(out, config)
    there = storage.read_manifest(out)
    wanted_print = storage.fingerprint("acquisition", config, inputs)
    if there is not None and there.fingerprint == wanted_print and there.num_rejected == 0:
        return there
    storage.delete(storage.join(out, storage.MANIFEST))
    work = storage.join(out, WORK)
    storage.delete(storage.join(work, "plan"))
    storage.write_table(storage.join(work, "plan", "part-0.parquet"), points)

    def flow(name: str, rows: str, step: Step, schema: pa.Schema, inputs: dict[str, str]) -> storage.Manifest:
        task = RowsTask(
            kind=name, source=storage.join(work, rows), folder=storage.join(work, name), steps=[step], schema=schema,
            config=config, inputs=inputs, pool=_pool(wanted), max_rejected=math.inf,  # judged at the end
        )  # fmt: skip
        return map_rows(task, None if progress is None else lambda *counts: progress(name, *counts))

    asking = {
        "source": wanted.source, "options": dict(wanted.options), "folder": out,
        "per_second": wanted.per_second / wanted.num_actors, "concurrency": wanted.concurrency,
        "max_attempts": wanted.max_attempts,
    }  # fmt: skip
    found = flow("offers", "plan", Step(Finder, {**asking, "radius_m": wanted.radius_m}), OFFERS, inputs)
    rejected, num_rejected = Counter(found.rejected_reasons), found.num_rejected
    chosen, num_empty = IMAGES.empty_table(), 0
    if found.num_out:
        chosen, num_empty = _choose(storage.join(work, "offers"), points, wanted.per_point)
    listing = pd.DataFrame(columns=list(LISTING_COLUMNS))
    if chosen.num_rows:
        storage.delete(storage.join(work, "chosen"))
        storage.write_table(storage.join(work, "chosen", "part-0.parquet"), chosen)
        fetch = Step(Fetcher, {**asking, "max_images": _allowed(out, wanted)})
        images = flow("images", "chosen", fetch, IMAGES, {"offers": _digest(chosen)})
        rejected.update(images.rejected_reasons)
        num_rejected += images.num_rejected
        listing = _listing(storage.join(work, "images")) if images.num_out else listing
    storage.write_bytes(storage.join(out, "panoramas.csv"), listing.to_csv(index=False, lineterminator="\n").encode())
    storage.write_bytes(storage.join(out, "ATTRIBUTION.md"), _attribution(listing, source.terms).encode())
    if len(listing):
        from hedwig.acquisition.card import write_card

        write_card(storage.join(out, "panoramas.csv"), geography=Geography.default())
    num_out = int(listing["pano_id"].nunique())
    details = {
        "num_points": points.num_rows,
        "num_points_without_panorama": num_empty,
        "num_images": len(listing),
        "num_left_by_quota": rejected[QUOTA],
        "licences": dict(Counter(listing["licence"]).most_common()),
        **_spending(out, source.paid, wanted.usd_per_1000),
    }
    manifest = storage.publish(
        out, kind="acquisition", config=config, inputs=inputs, num_in=num_out + num_rejected, num_out=num_out,
        num_rejected=num_rejected, rejected_reasons=dict(rejected), details=details,
        seconds=time.monotonic() - started, skip=("images/", "answers/"),
    )  # fmt: skip
    failed = Counter({reason: count for reason, count in rejected.items() if reason != QUOTA})
    enforce_max_rejected(
        "acquisition", failed.total(), num_out + failed.total(), wanted.max_rejected, failed,
        where=f"{work}/*/rejected/", setting="max_rejected",
    )  # fmt: skip
    return manifest


def _refuse_another_source(out: str, config: Mapping[str, Any]) -> None:
    """One folder holds the answers, the listing and the account of one source."""
    there = storage.read_manifest(out)
    if there is not None and there.config.get("source") not in (None, config["source"]):
        raise ValueError(f"{out} holds panoramas of {there.config['source']}; give {config['source']} its own --out.")


def _allowed(out: str, wanted: Acquisition) -> int | None:
    """Images that may ever have been asked for in this folder when this run ends."""
    if wanted.max_images is None:
        return None
    spent = AnswerStore(storage.join(out, "answers")).total()
    return int(spent.get("num_image_attempts", 0)) + wanted.max_images


def _pool(wanted: Acquisition) -> EmbedConfig:
    num_actors = 1 if wanted.max_images is not None else wanted.num_actors
    return EmbedConfig(num_actors=num_actors, num_cpus=1.0, batch_size=64, rows_per_block=256)


def _plan_table(plan: pd.DataFrame) -> pa.Table:
    missing = [name for name in ("lat", "lon") if name not in plan.columns]
    if missing:
        raise ValueError(f"The plan lacks {', '.join(missing)}; it has {', '.join(map(str, plan.columns))}.")
    if plan.empty:
        raise ValueError("The plan has no points.")
    ids = plan["plan_id"].astype(str) if "plan_id" in plan else pd.Series([f"{i:07d}" for i in range(len(plan))])
    doubled = ids[ids.duplicated()]
    if len(doubled):
        raise ValueError(f"The plan_id {doubled.iloc[0]!r} stands in the plan more than once.")
    regions = plan["region"].tolist() if "region" in plan else [None] * len(plan)
    lat, lon = plan["lat"].astype(float), plan["lon"].astype(float)
    bad = ~(lat.between(-90, 90) & lon.between(-180, 180))
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise ValueError(f"Row {row} of the plan lies at lat {lat.iloc[row]}, lon {lon.iloc[row]}: not on Earth.")
    columns = {
        "pano_id": pa.array(ids.tolist(), pa.string()),
        "split": pa.array(["train"] * len(plan), pa.string()),
        "lat": pa.array(lat.to_numpy()),
        "lon": pa.array(lon.to_numpy()),
        "region": pa.array([str(name) if isinstance(name, str) and name else None for name in regions], pa.string()),
    }
    return pa.table(columns)


def _digest(table: pa.Table) -> str:
    return storage.fingerprint("rows", {}, {"csv": table.to_pandas().to_csv(index=False)})


def _choose(folder: str, points: pa.Table, per_point: int) -> tuple[pa.Table, int]:
    """The panoramas to fetch, at most `per_point` for a point and none twice, and how many points have none."""
    offered = storage.read_table(folder)
    regions = dict(zip(points["pano_id"].to_pylist(), points["region"].to_pylist(), strict=True))
    taken: set[str] = set()
    rows: list[dict[str, Any]] = []
    num_empty = 0
    for plan_id, text in zip(offered["pano_id"].to_pylist(), offered["offers"].to_pylist(), strict=True):
        offers = [offer for offer in json.loads(text) if offer["pano_id"] not in taken][:per_point]
        num_empty += not offers
        for offer in offers:
            taken.add(offer["pano_id"])
            place = {"plan_id": plan_id, "region": regions[plan_id]}
            text = json.dumps(offer, ensure_ascii=False)
            rows.append({"pano_id": offer["pano_id"], "split": "train", "offer": text, **place})
    schema = pa.schema([IMAGES.field(name) for name in ("pano_id", "split", "offer", "plan_id", "region")])
    return pa.Table.from_pylist(rows, schema=schema), num_empty


def _listing(folder: str) -> pd.DataFrame:
    """One row per image; the images of one panorama share its pano_id (``data.layout=bearings``)."""
    table = storage.read_table(folder)
    rows = []
    for row in table.to_pylist():
        offer = Offer.of(json.loads(row["offer"]))
        for number, (uri, digest) in enumerate(zip(row["image_uris"], row["sha256s"], strict=True)):
            heading = offer.bearings_deg[number] if offer.bearings_deg else offer.heading
            values = {**offer.to_dict(), **row, "heading": heading, "image_uri": uri, "sha256": digest}
            rows.append({name: values[name] for name in LISTING_COLUMNS})
    return pd.DataFrame(rows, columns=list(LISTING_COLUMNS))


def _attribution(listing: pd.DataFrame, terms: str) -> str:
    """Whom to credit, by licence, with the source's terms."""
    text = io.StringIO()
    text.write(f"# Attribution\n\n{terms}\n")
    for (source, licence), rows in listing.groupby(["source", "licence"], sort=True):
        text.write(f"\n## {source}, {licence}: {rows['pano_id'].nunique()} panoramas\n\n")
        authors = Counter(rows.drop_duplicates("pano_id")["author"].fillna("unknown"))
        for author, count in sorted(authors.items()):
            text.write(f"- {author}: {count}\n")
    return text.getvalue()


def _spending(out: str, paid: bool, usd_per_1000: float | None) -> dict[str, Any]:
    """What was asked and paid for in this folder, by all runs together."""
    total = AnswerStore(storage.join(out, "answers")).total()
    # Every complete answer is billed; of the repeated attempts nobody knows, so they are counted apart.
    num_images = int(total.get("num_images", 0))
    usd = None if usd_per_1000 is None else round(num_images * usd_per_1000 / 1000, 6)
    return {
        "num_requests": int(total.get("num_requests", 0)),
        "num_paid_images": num_images if paid else 0,
        "num_repeated_attempts": max(0, int(total.get("num_image_attempts", 0)) - num_images) if paid else 0,
        "num_bytes": int(total.get("num_bytes", 0)),
        "cost_usd": usd if paid else 0.0,
    }
