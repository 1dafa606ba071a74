"""EXIF, XMP and file names never reach a model: the same pixels give the same bits, whatever is written around them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hedwig.captions import TemplateCaptioner
from hedwig.embed import Embedder
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines.chain import Chain, Step
from hedwig.schema import PANORAMAS, embeddings_schema
from hedwig.sources import ImageReader
from hedwig.vectors import read_vectors

XMP = b'http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta xmlns:x="adobe:ns:meta/"><r GPSLatitude="48.1"/></x:xmpmeta>'


def exif(lat, lon):
    tags = Image.Exif()
    gps = tags.get_ifd(0x8825)
    gps[1], gps[2] = "N" if lat >= 0 else "S", (abs(lat), 0.0, 0.0)
    gps[3], gps[4] = "E" if lon >= 0 else "W", (abs(lon), 0.0, 0.0)
    tags[0x010E] = f"taken at {lat}, {lon}"
    return tags.tobytes()


def with_segment(jpeg, payload):
    """The same JPEG with an APP1 segment after its first marker; not one pixel is encoded again."""
    return jpeg[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("firewall")
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (128, 256, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=95)
    jpeg = buffer.getvalue()
    files = {
        "plain.jpg": jpeg,
        "true.jpg": with_segment(jpeg, exif(48.0, 11.0)),
        "false.jpg": with_segment(jpeg, exif(-33.0, 151.0)),
        "xmp.jpg": with_segment(jpeg, XMP),
        "48.1374_N_11.5755_E_Munich_Germany.jpg": jpeg,
    }
    rows = []
    for i, (name, data) in enumerate(files.items()):
        (folder / name).write_bytes(data)
        rows.append(
            {"pano_id": f"p{i}", "lat": 10.0 * i, "lon": 5.0 * i, "heading": 90.0, "projection": "equirectangular",
             "country": ["DE", "AU", None, "FR", "US"][i], "split": "train", "image_uri": str(folder / name)}
        )  # fmt: skip
    steps = [
        Step(ImageReader),
        Step(PanoramaSlicer, {"slicing": Slicing(frame_px=64, align_north=True)}),
        Step(TemplateCaptioner, {"align_north": True}),
        Step(Embedder, {"encoder_name": "viclip-tiny", "batch_size": 8}),
    ]
    dim = 128
    chain = Chain(steps, embeddings_schema(dim, dim))
    out = chain(pa.Table.from_pylist(rows, schema=PANORAMAS))
    assert out["failure"].null_count == len(rows), out["failure"]
    return out, chain, rows


def test_the_files_differ_and_the_embeddings_do_not(table):
    out, _, rows = table
    assert len({Path(row["image_uri"]).read_bytes() for row in rows}) == 4
    for name in ("image_embedding", "text_embedding"):
        vectors = read_vectors(out, name)
        assert np.array_equal(vectors, np.broadcast_to(vectors[0], vectors.shape)), name
    assert len(set(out["caption"].to_pylist())) == 1


def test_alone_or_in_company_gives_the_same_bits(table):
    out, chain, rows = table
    alone = chain(pa.Table.from_pylist(rows[2:3], schema=PANORAMAS))
    assert alone["image_embedding"].to_pylist()[0] == out["image_embedding"].to_pylist()[2]


def test_other_pixels_do_differ(table, tmp_path):
    out, chain, rows = table
    Image.fromarray(np.full((128, 256, 3), 90, np.uint8)).save(tmp_path / "grey.jpg")
    grey = chain(pa.Table.from_pylist([{**rows[0], "image_uri": str(tmp_path / "grey.jpg")}], schema=PANORAMAS))
    assert grey["image_embedding"].to_pylist()[0] != out["image_embedding"].to_pylist()[0]
