"""What may be taken over from an earlier table: decided row by row, on hand-made tables."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hedwig import storage
from hedwig.pipelines.reuse import Earlier, find_earlier, images_changed, take_over
from hedwig.schema import PANORAMAS, vector_field
from hedwig.sources.stamps import image_stamps
from hedwig.vectors import read_vectors, vector_array

READ = ("image_uri", "bearing_uri", "projection", "heading", "bearing_deg")
WRITTEN = ("content_hash", "image_stamp", "vector")
SCHEMA = (
    PANORAMAS.append(pa.field("content_hash", pa.string()))
    .append(pa.field("image_stamp", pa.string()))
    .append(vector_field("vector", 4))
)
NUM = 12


@pytest.fixture
def images(tmp_path):
    for i in range(NUM):
        (tmp_path / f"{i}.jpg").write_bytes(f"image {i}".encode())
        os.utime(tmp_path / f"{i}.jpg", ns=(1, 1_000_000_000 + i))
    return tmp_path


def source(images, **changes):
    rows = [
        {"pano_id": f"p{i:02d}", "lat": float(i), "lon": 0.0, "projection": "equirectangular", "split": "train",
         "image_uri": str(images / f"{i}.jpg"), "heading": None if i % 2 else 10.0 * i}
        for i in range(NUM)
    ]  # fmt: skip
    for name, (row, value) in changes.items():
        rows[row][name] = value
    return pa.Table.from_pylist(rows, schema=PANORAMAS)


def write_earlier(images, folder, per_file=5):
    table = source(images)
    uris = table["image_uri"].to_pylist()
    hashes = [hashlib.sha256(Path(uri).read_bytes()).hexdigest()[:32] for uri in uris]
    vectors = np.arange(NUM * 4, dtype=np.float32).reshape(NUM, 4)
    table = table.append_column("content_hash", pa.array(hashes))
    table = table.append_column("image_stamp", pa.array(image_stamps([(u, None) for u in uris])))
    table = table.append_column(SCHEMA.field("vector"), vector_array(vectors, SCHEMA.field("vector")))
    for number, start in enumerate(range(0, NUM, per_file)):
        storage.write_table(f"{folder}/part-{number}.parquet", table.slice(start, per_file).cast(SCHEMA))
    storage.publish(
        str(folder), kind="vectors", config={"model": 1}, inputs={"rows": "a", "weights": "w"}, num_in=NUM, num_out=NUM
    )
    return vectors


def taken(images, table, **options):
    earlier = Earlier(str(images / "old"), READ, WRITTEN, **options)
    return take_over(earlier, table, str(images / "new"), SCHEMA)


def test_everything_is_taken_over_as_it_is(images):
    vectors = write_earlier(images, images / "old")
    assert len(taken(images, source(images))) == NUM
    table = storage.read_table(str(images / "new"))
    assert table.schema.remove_metadata().names == SCHEMA.names
    np.testing.assert_array_equal(read_vectors(table, "vector"), vectors)
    names = sorted(os.listdir(images / "new"))
    assert len(names) == 3
    assert all(name.startswith("part-kept-") for name in names)
    inodes = [{os.stat(images / place / name).st_ino for name in os.listdir(images / place) if name.startswith("part")}
              for place in ("old", "new")]  # fmt: skip
    assert inodes[0] == inodes[1]  # not even copied


def test_one_changed_image_is_the_only_one_left_out(images):
    vectors = write_earlier(images, images / "old")
    (images / "7.jpg").write_bytes(b"another image")
    assert images_changed(str(images / "old"), rehash=False)
    kept = taken(images, source(images))
    assert {f"p{i:02d}" for i in range(NUM)} - kept == {"p07"}
    table = storage.read_table(str(images / "new"))
    np.testing.assert_array_equal(read_vectors(table, "vector"), np.delete(vectors, 7, axis=0))


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"heading": (4, 41.0)}, {"p04"}),
        ({"heading": (5, 0.0)}, {"p05"}),  # it was unknown
        ({"projection": (3, "perspective")}, {"p03"}),
        ({"bearing_deg": (2, [0.0, 90.0])}, {"p02"}),
        ({"pano_id": (1, "new")}, {"new"}),
        ({"lat": (6, 55.0)}, set()),  # no stage reads where it is
        ({"split": (6, "test")}, set()),
    ],
)
def test_what_the_stages_read_decides(images, changes, lost):
    write_earlier(images, images / "old")
    table = source(images, **changes)
    kept = taken(images, table)
    assert set(table["pano_id"].to_pylist()) - kept == lost
    result = storage.read_table(str(images / "new"))
    now = table.filter(pa.array([i in kept for i in table["pano_id"].to_pylist()])).sort_by("pano_id")
    assert result["lat"].to_pylist() == now["lat"].to_pylist()  # places and splits are those of today
    assert result["split"].to_pylist() == now["split"].to_pylist()


def test_the_listing_may_say_that_an_image_is_another(images):
    write_earlier(images, images / "old")
    true = hashlib.sha256((images / "3.jpg").read_bytes()).hexdigest()
    os.utime(images / "3.jpg", ns=(5, 5))  # touched: its stamp says nothing, its sha256 says that it is the same
    assert "p03" in taken(images, source(images, sha256=(3, true)))
    assert "p04" not in taken(images, source(images, sha256=(4, "0" * 64)))


def test_rehash_believes_contents_and_nothing_else(images):
    write_earlier(images, images / "old")
    (images / "2.jpg").write_bytes(b"image Z")  # the same size, and its clock set back: no stamp tells
    os.utime(images / "2.jpg", ns=(1, 1_000_000_002))
    (images / "moved.jpg").write_bytes((images / "5.jpg").read_bytes())
    os.utime(images / "6.jpg", ns=(7, 7))
    table = source(images, image_uri=(5, str(images / "moved.jpg")))
    everything = set(table["pano_id"].to_pylist())
    assert everything - taken(images, table) == {"p05", "p06"}
    assert images_changed(str(images / "old"), rehash=True)
    for path in (images / "new").iterdir():
        path.unlink()
    assert everything - taken(images, table, rehash=True) == {"p02"}
    result = storage.read_table(str(images / "new"))
    assert result["image_uri"].to_pylist()[4] == str(images / "moved.jpg")
    assert result["image_stamp"].to_pylist()[5] == f"{len(b'image 6')}:7"  # stamps are those of today


def test_only_the_same_settings_and_models_are_earlier_work(images):
    write_earlier(images, images / "old")
    folders = [str(images / "none"), str(images / "old")]
    asked = {"kind": "vectors", "config": {"model": 1}, "inputs": {"rows": "b", "weights": "w"}, "source": "rows"}
    assert find_earlier(folders, **asked) == str(images / "old")
    assert find_earlier(folders, **{**asked, "kind": "others"}) is None
    assert find_earlier(folders, **{**asked, "config": {"model": 2}}) is None
    assert find_earlier(folders, **{**asked, "inputs": {"rows": "a", "weights": "v"}}) is None
    assert find_earlier(folders, **{**asked, "inputs": {"rows": "a"}}) is None


def test_vectors_of_another_size_are_not_taken(images):
    write_earlier(images, images / "old")
    wider = SCHEMA.set(SCHEMA.get_field_index("vector"), vector_field("vector", 8))
    earlier = Earlier(str(images / "old"), READ, WRITTEN)
    assert take_over(earlier, source(images), str(images / "new"), wider) == set()
