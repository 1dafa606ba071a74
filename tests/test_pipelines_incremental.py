"""Re-embedding: a changed panorama is computed again, the others are taken over, and what is published stays.

The rows flow through the chain in this process: what Ray adds to it is tested with `hedwig.pipelines.rows`.
"""

import os
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.pipelines import rows, run_experiment
from hedwig.pipelines.chain import Chain
from hedwig.pipelines.measured import Meter, measured_record
from hedwig.publishing import publish, published_folder
from hedwig.vectors import read_vectors

NUM = 12


@pytest.fixture
def experiment(tmp_path):
    """A listing of small panoramas of noise, an encoder that needs nothing, and no captions."""
    rng = np.random.default_rng(0)
    for i in range(NUM):
        pixels = rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
        os.utime(tmp_path / f"{i}.jpg", ns=(1, 10**18 + i))
    write_listing(tmp_path)

    def settings(**changes):
        return validate_experiment(
            {
                "output": str(tmp_path / "run"),
                "data": {"panoramas": str(tmp_path / "listing.csv"), "split": {"method": "column"}},
                "encoder": {"name": "viclip-tiny"},
                "captions": {"source": "none"},
                "training": {"use_text": False},
                "embed": {"rows_per_block": 8, "batch_size": 4},
                **changes,
            }
        )

    return settings


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch):
    def measured_run(task, ids, done, staged, on_progress):
        meter, chain = Meter(), Chain(task.steps, task.schema)
        table = storage.read_table(task.source)
        table = table.filter(pc.is_in(table["pano_id"], pa.array(sorted(ids - done))))
        for start in range(0, table.num_rows, 8):
            out = chain(table.slice(start, 8))
            storage.write_table(storage.join(staged.staging, f"{start}.parquet"), out)
            meter.add(chain.spent)
        return measured_record(meter.totals(), 1.0, 1)

    monkeypatch.setattr(rows, "_measured_run", measured_run)
    monkeypatch.setattr("hedwig.pipelines.experiment.ray_running", lambda cluster: nullcontext())


def write_listing(folder, **changed):
    lines = [f"p{i:02d},{i},{changed.get(f'p{i:02d}', 2)},{i}.jpg,train" for i in range(NUM)]
    (folder / "listing.csv").write_text("\n".join(["pano_id,lat,lon,image_uri,split", *lines]) + "\n")


def table_of(folder):
    return storage.read_table(storage.join(str(folder), "embeddings"))


def until_embed(experiment, **options):
    return run_experiment(experiment, last="embed", **options)


def details(folder):
    return storage.read_manifest(storage.join(str(folder), "embeddings")).details


def test_only_what_changed_is_computed(experiment, tmp_path):
    run = tmp_path / "run"
    until_embed(experiment())
    before = table_of(run)
    first = details(run)
    assert (first["measured"]["rows"], first["measured"]["bytes_in"]) == (
        NUM, sum((tmp_path / f"{i}.jpg").stat().st_size for i in range(NUM)),
    )  # fmt: skip
    assert set(first["measured"]["wall_s"]) == {"ImageStamper", "ImageReader", "PanoramaSlicer", "Embedder"}
    Image.new("RGB", (128, 64), "red").save(tmp_path / "7.jpg")
    assert until_embed(experiment()).made == {}  # the listing is believed, unless one asks
    done = until_embed(experiment(), check_images="stamps")
    assert set(done.made) == {"embed"}
    again = details(run)
    assert (again["reused"], again["measured"]["rows"]) == (NUM - 1, 1)
    after = table_of(run)
    assert after["pano_id"].equals(before["pano_id"])
    same = (read_vectors(after, "image_embedding") == read_vectors(before, "image_embedding")).all(axis=1)
    assert np.flatnonzero(~same).tolist() == [7]
    assert after["content_hash"].to_pylist()[7] != before["content_hash"].to_pylist()[7]
    assert until_embed(experiment(), check_images="stamps").made == {}
    assert not os.listdir(run / ".earlier")
    # A place that is corrected changes no vector: nothing is computed.
    write_listing(tmp_path, p03=3.5)
    until_embed(experiment())
    assert (details(run)["reused"], "measured" in details(run)) == (NUM, False)
    assert table_of(run)["lon"].to_pylist()[3] == 3.5

    # Published: another model grows beside it, and data that change are taken from what is published.
    publish(str(run), lambda folder: None)
    digest = storage.manifest_digest(str(run / "embeddings"))
    second = run / "versions" / "0002"
    until_embed(experiment(encoder={"name": "viclip-tiny", "seed": 1}))
    assert "reused" not in details(second)  # no earlier table has these weights
    assert storage.manifest_digest(str(run / "embeddings")) == digest
    Image.new("RGB", (128, 64), "blue").save(tmp_path / "9.jpg")
    until_embed(experiment(), check_images="contents")
    assert (details(second)["reused"], details(second)["measured"]["rows"]) == (NUM - 1, 1)
    assert published_folder(str(run)) == str(run)
