"""The same picture has nearly the same hash, other pictures have not; and pairs are found without comparing all."""

from __future__ import annotations

import csv
import io
import itertools
import time

import numpy as np
import pytest
from PIL import Image

from hedwig.panorama import decode_image
from hedwig.panorama.duplicates import duplicate_groups, near_duplicates, perceptual_hash, roll_hash
from hedwig.panorama.resample import resize
from hedwig.synthetic import render_panorama


def differing(left, right):
    return int(np.bitwise_count(left ^ right))


def street(name, width=512):
    lat, lon = {"a": (48.0, 9.0), "b": (-33.0, 151.0), "c": (1.3, 103.8), "d": (64.1, -21.9)}[name]
    row = {"pano_id": name, "lat": lat, "lon": lon, "heading": 0.0, "country": None, "captured_at": "2023-06-01"}
    return render_panorama(row, width=width)


def recompressed(image, quality=50):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def altered(image):
    yield recompressed(image)
    yield resize(image, image.shape[0] // 2, image.shape[1] // 2)
    yield (image * 0.85 + 5).astype(np.uint8)


@pytest.mark.parametrize("hashed", [perceptual_hash, roll_hash])
def test_a_picture_keeps_its_hash_and_others_have_another(hashed):
    streets = [street(name) for name in "abcd"]
    for image in streets:
        for other in altered(image):
            assert differing(hashed(image), hashed(other)) <= 6
    for left, right in itertools.combinations(streets, 2):
        assert differing(hashed(left), hashed(right)) > 8


def test_only_the_roll_hash_knows_a_turned_panorama():
    image = street("a")
    for shift in (1, 77, 200, 256, 411):
        turned = np.ascontiguousarray(np.roll(image, shift, axis=1))
        assert differing(roll_hash(image), roll_hash(turned)) <= 3
        assert differing(roll_hash(image), roll_hash(recompressed(turned, 60))) <= 6
    half = np.ascontiguousarray(np.roll(image, 256, axis=1))
    assert differing(perceptual_hash(image), perceptual_hash(half)) > 8


def test_panoramas_of_one_drive_are_not_the_same_picture(shared):
    with open(shared / "data" / "real_images.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["projection"] == "equirectangular"]
    images = [decode_image((shared / "data" / row["image_uri"]).read_bytes()) for row in rows]
    hashes = np.array([roll_hash(image) for image in images])
    assert len(near_duplicates(hashes, 12)[0]) == 0  # 48 panoramas, 9 of them metres apart
    turned = np.array([roll_hash(np.ascontiguousarray(np.roll(i, i.shape[1] // 3, axis=1))) for i in images])
    assert np.bitwise_count(hashes ^ turned).max() <= 6


def planted(num, seed=0):
    """Random hashes; some repeat, some are a few bits from another one."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    tenth = num // 10
    hashes[tenth : 2 * tenth] = hashes[:tenth]
    for row in range(2 * tenth, 4 * tenth):
        near = hashes[row - 2 * tenth]
        for bit in rng.choice(64, int(rng.integers(1, 18)), replace=False):
            near ^= np.uint64(1 << int(bit))
        hashes[row] = near
    return hashes


@pytest.mark.parametrize("max_bits", [0, 1, 2, 7, 8, 12, 16])
def test_pairs_are_those_of_comparing_all(max_bits):
    hashes = planted(600)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    first = {int(np.flatnonzero(row == 0)[0]) for row in bits}
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(600), 2)
        if bits[i, j] <= max_bits and i in first and (j in first or bits[i, j] == 0)
    }
    pairs, found = near_duplicates(hashes, max_bits)
    assert set(map(tuple, pairs.tolist())) == expected
    assert np.array_equal(found, bits[pairs[:, 0], pairs[:, 1]])
    # Whatever is left out hangs together through the first of its equals: the groups are those of all pairs.
    everything = np.argwhere(np.triu(bits <= max_bits, 1))
    assert np.array_equal(duplicate_groups(pairs, 600), duplicate_groups(everything, 600))


def test_a_hundred_thousand_take_seconds_and_equal_ones_stay_linear():
    hashes = np.random.default_rng(1).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:70_000] = hashes[7]  # empty tiles
    hashes[99_999] = hashes[3] ^ np.uint64(0b1011 << 40)
    started = time.process_time()
    pairs, bits = near_duplicates(hashes, 8)
    assert time.process_time() - started < 30
    assert (bits == 0).sum() == 20_000
    assert [3, 99_999] in pairs.tolist()


def test_groups_and_faults():
    assert duplicate_groups(np.array([[1, 4], [4, 5], [0, 2]]), 6).tolist() == [0, 1, 0, 3, 1, 1]
    assert duplicate_groups(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]
    assert near_duplicates(np.array([], np.uint64))[0].shape == (0, 2)
    with pytest.raises(ValueError, match="uint64"):
        near_duplicates(np.array([1, 2]))
    with pytest.raises(ValueError, match="max_bits is 17"):
        near_duplicates(np.array([1], np.uint64), 17)
