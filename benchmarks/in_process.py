"""hedwig's embedding path without Ray: the chain of stages that an actor of `hedwig embed` runs, batch after batch.

One process reads the listing in batches, runs ImageReader, PanoramaSlicer and Embedder on each, and writes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa

from hedwig.embed import Embedder
from hedwig.models.encoder import encoder_spec
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import FAILURE, Chain, Step
from hedwig.schema import PANORAMAS, embeddings_schema
from hedwig.sources import ImageReader
from hedwig.storage import write_table


def main(arguments: list[str] | None = None) -> None:
    """Embed a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder of .jpg panoramas")
    parser.add_argument("out", type=Path, help="folder of the table")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture")
    parser.add_argument("--weights", required=True, help="file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="panoramas at once")
    parser.add_argument("--threads", type=int, default=1, help="decoding and torch threads")
    asked = parser.parse_args(arguments)
    rows = [
        {"pano_id": path.stem, "projection": "equirectangular", "split": "train", "image_uri": str(path)}
        for path in sorted(asked.images.glob("*.jpg"))
    ]
    table = pa.Table.from_pylist(rows, schema=PANORAMAS)
    for name, kind in (("caption", pa.string()), ("caption_num_tokens", pa.int32())):
        table = table.append_column(name, pa.nulls(len(rows), kind))
    name = f"open_clip:{asked.model}"
    spec = encoder_spec(name)
    encoder = {
        "encoder_name": name,
        "weights": asked.weights,
        "quick_gelu": asked.model.endswith("quickgelu"),
        "dtype": asked.dtype,
        "device": asked.device,
        "batch_size": asked.batch,
        "num_threads": asked.threads,
    }
    steps = [
        Step(ImageReader, {"num_threads": max(4, asked.threads)}),
        Step(PanoramaSlicer, {"slicing": Slicing(frame_px=spec.frame_px), "num_threads": asked.threads}),
        Step(Embedder, encoder),
    ]
    chain = Chain(steps, embeddings_schema(spec.image_dim, spec.text_dim))
    done = pa.concat_tables([chain(table.slice(i, asked.batch)) for i in range(0, len(rows), asked.batch)])
    reasons = [reason for reason in done[FAILURE].to_pylist() if reason is not None]
    if reasons:
        raise ValueError(f"{len(reasons)} of {len(rows)} panoramas failed: {reasons[0]}")
    write_table(str(asked.out / "part-0.parquet"), done.drop_columns([FAILURE]))


if __name__ == "__main__":
    main()
