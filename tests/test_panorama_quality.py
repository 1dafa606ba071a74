"""What shows nothing is refused with its reason, what is merely dark, flat or dull is not."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from hedwig.panorama import decode_image
from hedwig.panorama.quality import Quality, QualityFilter, QualityLimits, image_quality, quality_fault
from hedwig.panorama.resample import resize
from hedwig.synthetic import render_panorama


def jpeg(pixels, quality=90):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def street(width=512, seed="a"):
    row = {"pano_id": seed, "lat": 48.0, "lon": 9.0, "heading": 0.0, "country": "DE", "captured_at": "2023-06-01"}
    return render_panorama(row, width=width)


def no_imagery():
    """Like the tile that Street View's API answers with where there is no picture."""
    tile = Image.new("RGB", (640, 640), (228, 226, 222))
    text = "Sorry, we have no imagery here."
    ImageDraw.Draw(tile).text((170, 310), text, fill=(120, 120, 120), font=ImageFont.load_default(20))
    return np.array(tile)


def batch_of(items):
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return {"image_bytes": column, "pano_id": np.array([f"p{i}" for i in range(len(items))], dtype=object)}


def test_the_numbers_are_their_definitions():
    """A slow twin on an image of the fixed width, where nothing is resized."""
    image = np.random.default_rng(0).integers(13, 256, (40, 512, 3), dtype=np.uint8)
    found = image_quality(image)
    grey = [[0.299 * int(r) + 0.587 * int(g) + 0.114 * int(b) for r, g, b in row] for row in image]
    flat = [value for row in grey for value in row]
    laplacian = [
        grey[i - 1][j] + grey[i + 1][j] + grey[i][j - 1] + grey[i][j + 1] - 4 * grey[i][j]
        for i in range(1, 39)
        for j in range(1, 511)
    ]
    shares = [sum(int(value) == level for value in flat) / len(flat) for level in range(256)]
    assert found.sharpness == pytest.approx(np.var(laplacian), rel=1e-4)
    assert found.brightness == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert found.entropy_bits == pytest.approx(-sum(s * math.log2(s) for s in shares if s), abs=1e-3)
    assert found.flatness == pytest.approx(max(sum(shares[i : i + 5]) for i in range(252)), abs=1e-3)
    assert found.dark_share == pytest.approx(sum(shares[:17]), abs=1e-3)
    assert found.bright_share == pytest.approx(sum(shares[250:]), abs=1e-3)
    assert found.red_share == pytest.approx(1 / 3, abs=0.01)


def test_sharpness_does_not_depend_on_the_size_and_falls_with_blur():
    image = street(1024)
    sharp = image_quality(image).sharpness
    assert image_quality(resize(image, 384, 768)).sharpness == pytest.approx(sharp, rel=0.15)
    blurred = [image_quality(ndimage.gaussian_filter(image, (s, s, 0))).sharpness for s in (1, 2, 4)]
    assert sharp > 2 * blurred[0] > 4 * blurred[1] > 8 * blurred[2]


def test_padding_of_a_stitched_panorama_does_not_count():
    whole = street()
    padded = whole.copy()
    padded[:64], padded[192:] = 0, 0
    found, expected = image_quality(padded), image_quality(whole[64:192])
    assert found.brightness == pytest.approx(expected.brightness, rel=0.02)
    assert found.dark_share == pytest.approx(expected.dark_share, abs=0.02)
    assert quality_fault(image_quality(np.zeros((64, 512, 3), np.uint8)), QualityLimits()).startswith("underexposed")


def test_the_filter_names_every_fault_and_passes_the_rest():
    good = street()
    blue = np.stack([good[..., 0] // 20, good[..., 1] // 2 + 60, good[..., 2] // 2 + 90], axis=-1)
    images = {
        None: good,
        "blank or no imagery": no_imagery(),
        "blurred": ndimage.gaussian_filter(good, (6, 6, 0)),
        "underexposed": (good // 20).astype(np.uint8),
        "overexposed": np.clip(good.astype(int) // 4 + 235, 0, 255).astype(np.uint8),
        "no red light": blue,
    }
    result = QualityFilter()(batch_of([jpeg(image) for image in images.values()]))
    for failure, reason in zip(result["failure"], images, strict=True):
        assert (failure is None) if reason is None else failure.startswith(reason)
    assert result["failure"][1].split(":")[0] == "blank or no imagery"  # what the counts of reasons group by
    assert set(QualityFilter.writes) <= set(result)
    assert result["entropy_bits"][1] < 1
    assert result["flatness"][1] > 0.95
    assert result["pano_id"].tolist() == [f"p{i}" for i in range(6)]
    assert result["perceptual_hash"].dtype == np.uint64


def test_limits_are_arguments():
    item = [jpeg(street())]
    assert QualityFilter()(batch_of(item))["failure"][0] is None
    strict = QualityFilter(limits=QualityLimits(min_sharpness=1e6))(batch_of(item))
    assert strict["failure"][0].startswith("blurred: variance of Laplacian")
    assert "the limit is 1e+06" in strict["failure"][0]
    lax = QualityLimits(max_flatness=2, min_entropy_bits=0, min_sharpness=0)
    assert QualityFilter(limits=lax)(batch_of([jpeg(no_imagery())]))["failure"][0] is None
    with pytest.raises(ValueError, match="min_sharpness is nan"):
        QualityLimits(min_sharpness=math.nan)


def test_bearings_are_judged_one_by_one_and_damage_is_a_reason():
    good, tile = jpeg(street()), jpeg(no_imagery())
    result = QualityFilter(num_threads=1)(batch_of([[good, good], [good, good, tile, good], good[:300], None, []]))
    failures = result["failure"].tolist()
    assert failures[0] is None
    assert failures[1].startswith("blank or no imagery")
    assert failures[1].endswith("(image 3 of 4)")
    assert "cut short" in failures[2]
    assert "must be bytes" in failures[3]
    assert failures[4] == "The row has no image."
    threaded = QualityFilter(num_threads=3)(batch_of([[good, good], [good, good, tile, good], good[:300], None, []]))
    assert threaded["failure"].tolist() == failures
    assert np.array_equal(threaded["sharpness"], result["sharpness"])


def test_no_real_image_is_refused(shared):
    """All 39 panoramas of Poly Haven, all of Mapillary, and every fifth sign photo; the rest was looked at once."""
    with open(shared / "data" / "real_images.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows = [row for row in rows if not row["pano_id"].startswith("sign")] + rows[::5]
    worst = Quality(np.inf, 0, 0, 0, np.inf, 0, 1)
    for row in rows:
        quality = image_quality(decode_image((shared / "data" / row["image_uri"]).read_bytes()))
        assert quality_fault(quality, QualityLimits()) is None, row["pano_id"]
        worst = quality if quality.sharpness < worst.sharpness else worst
    assert worst.sharpness == pytest.approx(22.5, abs=0.5)  # a cloudless sky: 1.5 times the default limit
