import os
import tarfile

import numpy as np

from hedwig.sources.stamps import ImageStamper, image_stamps


def test_a_stamp_changes_with_size_and_time_and_with_nothing_else(tmp_path):
    image = tmp_path / "a.jpg"
    image.write_bytes(b"12345")
    os.utime(image, ns=(1, 2_000_000_007))
    first = image_stamps([(str(image), None)])
    assert first == ["5:2000000007"]
    os.utime(image, ns=(99, 2_000_000_007))  # was only read
    assert image_stamps([(str(image), None)]) == first
    image.write_bytes(b"12346")
    assert image_stamps([(str(image), None)]) != first
    os.utime(image, ns=(1, 2_000_000_007))
    assert image_stamps([(str(image), None)]) == first  # this is what --rehash is for


def test_bearings_have_the_stamps_of_all_and_none_when_one_is_missing(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * (number + 1))
        os.utime(tmp_path / f"{number}.jpg", ns=(1, 1000 + number))
    three = [str(tmp_path / f"{number}.jpg") for number in range(3)]
    assert image_stamps([(three[0], three), (three[0], [*three, str(tmp_path / "gone.jpg")]), (three[1], [])]) == [
        "1:1000;2:1001;3:1002", None, "2:1001",
    ]  # fmt: skip


def test_a_member_has_the_stamp_of_its_tar(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(tmp_path / "a.jpg", "a.jpg")
    tar = str(tmp_path / "shard.tar")
    assert image_stamps([(f"{tar}#a.jpg", None)]) == image_stamps([(tar, None)])


def test_the_stage_leaves_missing_images_to_the_reader(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    uris = np.array([str(tmp_path / "a.jpg"), str(tmp_path / "gone.jpg"), str(tmp_path)], dtype=object)
    batch = ImageStamper()({"image_uri": uris, "bearing_uri": np.full(3, None, dtype=object)})
    assert batch["image_stamp"][0].startswith("1:")
    assert batch["image_stamp"].tolist()[1:] == [None, None]
    assert "failure" not in batch


def test_stamps_taken_before_are_those_that_are_told(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    rows = {"image_uri": np.array([str(tmp_path / "a")], dtype=object), "bearing_uri": np.full(1, None, dtype=object)}
    stamper = ImageStamper()
    stamper.prefetch(rows)
    (tmp_path / "a").write_bytes(b"longer")
    assert stamper(rows)["image_stamp"][0].startswith("1:")
    assert stamper(rows)["image_stamp"][0].startswith("6:")
    stamper.prefetch(rows)
    stamper.prefetch({name: values[:0] for name, values in rows.items()})
    (tmp_path / "a").write_bytes(b"short")
    assert stamper(rows)["image_stamp"][0].startswith("5:")
