import hashlib
import io
import tarfile

import numpy as np
import pytest

from hedwig.schema import PANORAMAS, REJECTED
from hedwig.sources import check_listing, read_listing


def listing(tmp_path, *rows, header="pano_id,lat,lon,heading,projection,split,image_uri"):
    path = tmp_path / "l.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return read_listing(str(path))


def check(tmp_path, *rows, layout="panoramas", **kwargs):
    return check_listing(listing(tmp_path, *rows, **kwargs), image_root=str(tmp_path), layout=layout)


def test_every_row_is_either_usable_or_kept_with_its_reason(tmp_path):
    checked = check(
        tmp_path,
        "a,48.1,11.5,370,,,a.jpg",
        "b,91,0,,,,b.jpg",
        "c,10,-181,,,,c.jpg",
        "d,x,5,,,,d.jpg",
        "e,5,,,,,e.jpg",
        "f,0,0,,,,f.jpg",
        "g,1,2,,,,",
        "h,1,2,,fisheye,,h.jpg",
        "a,2,2,,,,i.jpg",
        "j,1,2,,,holdout,j.jpg",
        "k,,,,,,k.jpg",
    )
    assert checked.num_in == 11
    assert checked.panoramas.schema == PANORAMAS
    assert checked.rejected.schema == REJECTED
    assert checked.panoramas["pano_id"].to_pylist() == ["a", "k"]
    first, query = checked.panoramas.to_pylist()
    assert first["heading"] == 10.0  # 370° is 10°
    assert first["projection"] == "equirectangular"
    assert first["image_uri"] == str(tmp_path / "a.jpg")
    assert (query["split"], query["lat"]) == ("query", None)
    reasons = dict(zip(checked.rejected["row"].to_pylist(), checked.rejected["reason"].to_pylist(), strict=True))
    assert reasons[1].startswith("lat out of range: 91")
    assert reasons[2].startswith("lon out of range: -181")
    assert reasons[3] == "lat is not a number: 'x'"
    assert reasons[4].startswith("only one of lat and lon")
    assert "exactly 0" in reasons[5]
    assert reasons[6] == "no image_uri"
    assert reasons[7].startswith("unknown projection: 'fisheye'")
    assert reasons[8].startswith("duplicate pano_id: 'a' is also row 0")
    assert reasons[9].startswith("unknown split: 'holdout'")
    assert checked.reasons["lat out of range"] == 1
    assert sum(checked.reasons.values()) == 9


def test_missing_ids_come_from_the_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.jpg").write_bytes(b"one")
    (tmp_path / "c.jpg").write_bytes(b"two")
    checked = check(tmp_path, ",1,2,,,,a.jpg", ",1,3,,,,b.jpg", ",1,4,,,,c.jpg", ",1,5,,,,gone.jpg")
    assert checked.panoramas.num_rows == 2  # b has a's content, so a's id
    assert len(set(checked.panoramas["pano_id"].to_pylist())) == 2
    assert sorted(checked.reasons) == ["duplicate pano_id", "unreadable image"]
    assert checked.num_in == 4


def test_bearings_become_one_panorama(tmp_path):
    rows = [f"p,1,2,{h},,,{h}.jpg" for h in (90, 0, 270, 180)]
    checked = check(tmp_path, *rows, "q,1,2,0,,,q.jpg", "q,1,2,0,,,q2.jpg", "r,1,2,,,,r.jpg", layout="bearings")
    p, q = checked.panoramas.to_pylist()
    assert p["bearing_deg"] == [0, 90, 180, 270]
    assert [u.rsplit("/", 1)[1] for u in p["bearing_uri"]] == ["0.jpg", "90.jpg", "180.jpg", "270.jpg"]
    assert p["projection"] == "bearings"
    # four 90° images from -45° to 315°: the strip's centre column looks to 135°
    assert p["heading"] == pytest.approx(135)
    assert q["bearing_deg"] == [0]
    assert checked.num_images == 5
    assert set(checked.reasons) == {"duplicate heading", "no heading"}


def test_bearings_that_disagree_about_the_place_are_rejected_together(tmp_path):
    checked = check(tmp_path, "p,1,2,0,,,a.jpg", "p,1,9,90,,,b.jpg", "q,1,2,0,,,c.jpg", layout="bearings")
    assert checked.panoramas["pano_id"].to_pylist() == ["q"]
    assert checked.reasons == {"rows of one pano_id disagree about the position": 2}


def test_a_bearing_layout_without_ids_is_refused(tmp_path):
    with pytest.raises(ValueError, match="groups rows by pano_id"):
        check(tmp_path, ",1,2,0,,,a.jpg", layout="bearings")


def test_the_real_listing_is_accounted_for(shared):
    frame = read_listing(str(shared / "data" / "real_images.csv"))
    checked = check_listing(frame, image_root=str(shared / "data"))
    assert checked.panoramas.num_rows + checked.rejected.num_rows == 284
    splits = np.array(checked.panoramas["split"].to_pylist())
    assert int((splits == "query").sum()) == 39


def test_an_image_in_a_tar_gives_its_id_and_its_digest(tmp_path):
    data = b"an image"
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        info = tarfile.TarInfo("p.jpg")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(data).hexdigest()
    row = check(tmp_path, ",1,2,,,,0.tar#p.jpg").panoramas.to_pylist()[0]
    assert (row["pano_id"], row["sha256"]) == (digest[:22], digest)


def test_digests_of_local_images_are_read_when_asked_for_and_stated_ones_kept(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    rows = ("a,1,2,a.jpg,", "b,1,2,a.jpg,abc", "c,1,2,gone.jpg,", "d,1,2,s3://bucket/d.jpg,")
    frame = listing(tmp_path, *rows, header="pano_id,lat,lon,image_uri,sha256")
    digest = hashlib.sha256(b"one").hexdigest()
    made = check_listing(frame, image_root=str(tmp_path), sha256=True).panoramas
    assert made["sha256"].to_pylist() == [digest, "abc", None, None]
    assert check_listing(frame, image_root=str(tmp_path)).panoramas["sha256"].to_pylist() == [None, "abc", None, None]


def test_the_field_of_view_and_the_origin_are_kept(tmp_path):
    header = "pano_id,lat,lon,heading,image_uri,fov_deg,made_from"
    checked = check(
        tmp_path, "a,1,2,0,a.jpg,90,o", "b,1,2,0,b.jpg,,", "c,1,2,0,c.jpg,wide,", "d,1,2,0,d.jpg,400,", header=header
    )
    assert checked.panoramas["fov_deg"].to_pylist() == [90.0, None]
    assert checked.panoramas["made_from"].to_pylist() == ["o", None]
    assert list(checked.reasons) == ["fov_deg is not a number", "fov_deg out of range"]
    rows = ("a,1,2,0,a.jpg,90,", "a,1,2,90,b.jpg,90,", "b,1,2,0,c.jpg,90,", "b,1,2,90,d.jpg,60,")
    bearings = check(tmp_path, *rows, header=header, layout="bearings")
    assert bearings.panoramas["fov_deg"].to_pylist() == [90.0]
    assert bearings.reasons == {"rows of one pano_id disagree about fov_deg": 2}
