"""What cameras write about position, direction, time and projection, read from headers alone."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from hedwig.sources import check_listing
from hedwig.sources.folder import describe_image, read_folder
from hedwig.sources.readers import listing_frame

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {}>{}</rdf:Description></rdf:RDF></x:xmpmeta>'


def photo(path, size=(64, 48), gps=None, exif=None, artist=None, xmp=None):
    tags = Image.Exif()
    if artist is not None:
        tags[0x013B] = artist
    for ifd, values in ((0x8825, gps), (0x8769, exif)):
        tags.get_ifd(ifd).update(values or {})
    buffer = io.BytesIO()
    extra = {} if xmp is None else {"xmp": xmp.encode()}
    # A colour per file, for ids are derived from the content.
    colour = tuple(sum(path.name.encode()) * k % 256 for k in (1, 3, 7))
    Image.new("RGB", size, colour).save(buffer, "JPEG", exif=tags.tobytes(), **extra)
    path.write_bytes(buffer.getvalue())
    return str(path)


def place(lat_ref="N", lon_ref="E", **more):
    return {1: lat_ref, 2: (48.0, 30.0, 36.0), 3: lon_ref, 4: (9.0, 15.0, 0.0), **more}


def test_position_direction_time_and_author(tmp_path):
    path = photo(
        tmp_path / "a.jpg",
        gps=place("S", "W") | {16: "T", 17: 271.5},
        exif={0x9003: "2023:08:23 10:30:40", 0x9011: "+02:00"},
        artist="A. Nyone",
    )
    assert describe_image(path) == {
        "image_uri": path,
        "lat": pytest.approx(-48.51),
        "lon": pytest.approx(-9.25),
        "heading": pytest.approx(271.5),
        "captured_at": "2023-08-23T10:30:40+02:00",
        "author": "A. Nyone",
        "projection": "perspective",
    }


def test_what_is_not_sure_is_left_out(tmp_path):
    magnetic = describe_image(photo(tmp_path / "m.jpg", gps=place() | {16: "M", 17: 10.0}))
    assert "heading" not in magnetic
    assert magnetic["lat"] == pytest.approx(48.51)
    no_ref = describe_image(photo(tmp_path / "r.jpg", gps={2: (48.0, 30.0, 36.0), 3: "E", 4: (9.0, 15.0, 0.0)}))
    assert no_ref["lat"] is None
    plain = describe_image(photo(tmp_path / "p.jpg", exif={0x9003: "0000:00:00 00:00:00"}))
    assert (plain["lat"], plain["captured_at"], plain["author"]) == (None, None, None)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe1 no")
    assert describe_image(str(tmp_path / "broken.jpg")) == {"image_uri": str(tmp_path / "broken.jpg")}


@pytest.mark.parametrize("as_elements", [False, True])
def test_photo_sphere_metadata_goes_first(tmp_path, as_elements):
    def xmp(**properties):
        if as_elements:
            return XMP.format("", "".join(f"<GPano:{k}>{v}</GPano:{k}>" for k, v in properties.items()))
        return XMP.format(" ".join(f'GPano:{k}="{v}"' for k, v in properties.items()), "")

    whole = xmp(ProjectionType="equirectangular", PoseHeadingDegrees="350.0", FullPanoWidthPixels=128,
                CroppedAreaImageWidthPixels=128)  # fmt: skip
    row = describe_image(photo(tmp_path / "w.jpg", (128, 40), gps=place() | {16: "T", 17: 10.0}, xmp=whole))
    assert (row["projection"], row["heading"]) == ("equirectangular", 350.0)
    # The right quarter of a turn whose centre looks to 350: its own centre looks 135 degrees further.
    part = xmp(ProjectionType="equirectangular", PoseHeadingDegrees="350", FullPanoWidthPixels=512,
               CroppedAreaImageWidthPixels=128, CroppedAreaLeftPixels=384)  # fmt: skip
    row = describe_image(photo(tmp_path / "q.jpg", (128, 40), xmp=part))
    assert (row["projection"], row["heading"]) == ("perspective", pytest.approx(125.0))


def test_without_metadata_the_aspect_ratio_decides(tmp_path):
    assert describe_image(photo(tmp_path / "s.jpg", (200, 100)))["projection"] == "equirectangular"
    assert describe_image(photo(tmp_path / "t.jpg", (190, 100)))["projection"] == "perspective"


def test_a_folder_becomes_a_checked_listing(tmp_path):
    (tmp_path / "sub").mkdir()
    photo(tmp_path / "b.jpg", gps=place())
    photo(tmp_path / "sub" / "a.JPG")
    (tmp_path / "notes.txt").write_text("48.5, 9.2")
    (tmp_path / "c.png").write_bytes(b"not an image")
    table = read_folder(str(tmp_path))
    assert table["image_uri"].to_pylist() == [str(tmp_path / n) for n in ("b.jpg", "c.png", "sub/a.JPG")]
    result = check_listing(listing_frame(table), image_root=str(tmp_path))
    assert result.panoramas["split"].to_pylist() == ["train", "query", "query"]
    ids = result.panoramas["pano_id"].to_pylist()
    assert all(len(pano_id) == 22 for pano_id in ids)  # from the content: a name may tell the place
    assert len(set(ids)) == 3
    with pytest.raises(FileNotFoundError, match="No image"):
        read_folder(str(tmp_path / "none"))


def test_the_real_photographs_have_lost_their_exif_and_are_queries(shared):
    table = read_folder(str(shared / "data" / "mapillary_sample"))
    assert table.num_rows == 25
    assert table["lat"].null_count == 25
    kinds = table["projection"].to_pylist()
    assert kinds.count("equirectangular") == 9  # by their ratio; as listed by hand


def test_a_sphere_that_is_not_cropped_about_the_horizon_is_rejected(tmp_path):
    def crop(name, top, shown):
        xmp = XMP.format(
            'GPano:ProjectionType="equirectangular" GPano:FullPanoWidthPixels="128" GPano:FullPanoHeightPixels="64" '
            'GPano:CroppedAreaImageWidthPixels="128" GPano:CroppedAreaLeftPixels="0" '
            f'GPano:CroppedAreaTopPixels="{top}" GPano:CroppedAreaImageHeightPixels="{shown}"',
            "",
        )
        return photo(tmp_path / name, (128, shown), gps=place(), xmp=xmp)

    assert describe_image(crop("centred.jpg", 16, 32))["projection"] == "equirectangular"
    crop("sky.jpg", 0, 32)
    checked = check_listing(listing_frame(read_folder(str(tmp_path))), image_root=str(tmp_path))
    assert checked.panoramas["projection"].to_pylist() == ["equirectangular"]
    assert checked.rejected["reason"].to_pylist() == [
        "unknown projection: 'sphere cropped to 0.0 to 90.0 degrees of elevation, not about the horizon'."
    ]
