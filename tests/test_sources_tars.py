"""Images in tars are read at their offset: exactly, with few bytes, and never another one's."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from hedwig import storage
from hedwig.sources import check_listing
from hedwig.sources.readers import listing_frame
from hedwig.sources.tars import is_member, read_member, read_webdataset, tar_index


def write_tar(path, members, **options):
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def sample(**columns):
    return json.dumps(columns).encode()


def payload(number, size=5000):
    return bytes((number * 31 + i) % 256 for i in range(size))


def test_a_webdataset_becomes_a_listing_whose_images_can_be_read(tmp_path):
    write_tar(
        tmp_path / "000.tar",
        {
            "p1.jpg": payload(1), "p1.json": sample(lat=48.5, lng=9.25, heading=90, country="DE", license="CC0"),
            "p2.json": sample(latitude="-33", longitude="151", pano_id="other", author="me"), "p2.png": payload(2),
            "p3.jpg": payload(3),
            "p4.json": sample(lat=1, lon=2),
            "p5.jpg": payload(5), "p5.json": b"{broken",
            "p6.cls": b"7",
        },
    )  # fmt: skip
    write_tar(tmp_path / "001.tar", {"./sub/q.v2.jpg": payload(9), "./sub/q.jpeg": payload(8)})
    table = read_webdataset(str(tmp_path))
    result = check_listing(listing_frame(table), image_root=str(tmp_path))
    rows = {row["pano_id"]: row for row in result.panoramas.to_pylist()}
    assert set(rows) == {"p1", "other", "p3", "sub/q"}
    assert (rows["p1"]["lat"], rows["p1"]["lon"], rows["p1"]["heading"]) == (48.5, 9.25, 90.0)
    assert (rows["p1"]["country"], rows["p1"]["licence"]) == ("DE", "CC0")
    assert (rows["other"]["lat"], rows["other"]["lon"]) == (-33.0, 151.0)
    assert rows["p3"]["split"] == "query"
    assert [read_member(rows[name]["image_uri"]) for name in ("p1", "other", "p3", "sub/q")] == [
        payload(1), payload(2), payload(3), payload(8),
    ]  # fmt: skip
    assert result.reasons == {"no image_uri": 1, "lat is not a number": 1}
    assert all(is_member(row["image_uri"]) for row in rows.values())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_name(tmp_path, form):
    names = ["short.jpg", "d" * 60 + "/" + "e" * 80 + ".jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".jpg", "straße/日本.jpg"]
    members = {name: payload(number, 700 * number + 1) for number, name in enumerate(names)}
    tar = write_tar(tmp_path / "t.tar", members, format=form)
    for name, (offset, size) in tar_index(tar).items():
        assert read_member(f"{tar}#{name}@{offset}+{size}") == members[name]
        assert read_member(f"{tar}#{name}") == members[name]
        assert read_member(f"tar://{tar}#{name}") == members[name]
    assert list(tar_index(tar)) == names


def test_only_the_member_is_read(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "big.tar", {f"{i}.jpg": payload(i, 100_000) for i in range(20)})
    address = read_webdataset(tar)["image_uri"].to_pylist()[13]
    real, reads = storage.filesystem, []

    class Counted:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def seek(self, place):
            self.stream.seek(place)

        def read(self, size):
            reads.append(size)
            return self.stream.read(size)

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def open_input_file(self, path):
            return Counted(self.inner.open_input_file(path))

    monkeypatch.setattr(storage, "filesystem", lambda path: (Watched(real(path)[0]), real(path)[1]))
    assert read_member(address) == payload(13, 100_000)
    assert reads == [512 + 100_000]


def test_a_tar_that_changed_gives_an_error_and_not_another_picture(tmp_path):
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": payload(1), "b.jpg": payload(2)})
    first, second = read_webdataset(tar)["image_uri"].to_pylist()
    write_tar(tmp_path / "t.tar", {"b.jpg": payload(2), "a.jpg": payload(1)})
    with pytest.raises(OSError, match=r"has 'b\.jpg' where 'a\.jpg' should be; it has changed"):
        read_member(first)
    write_tar(tmp_path / "t.tar", {"a.jpg": payload(1, 5001 + 512), "b.jpg": payload(2)})
    with pytest.raises(OSError, match="it has changed"):
        read_member(second)
    (tmp_path / "t.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:3000])
    with pytest.raises(OSError, match=r"has changed|cut short"):
        read_member(f"{tar}#a.jpg@512+5513")


def test_faults_are_named(tmp_path):
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": payload(1)})
    with pytest.raises(FileNotFoundError, match=r"no member 'b\.jpg'"):
        read_member(f"{tar}#b.jpg")
    with pytest.raises(FileNotFoundError, match="no tar at"):
        read_member(f"{tmp_path}/gone.tar#a.jpg@512+10")
    with pytest.raises(ValueError, match="addresses no member"):
        read_member(f"{tmp_path}/a.jpg")
    packed = write_tar(tmp_path / "z.tar", {"a.jpg": payload(1)}, mode="w:gz")
    with pytest.raises(OSError, match="damaged or compressed"):
        read_webdataset(packed)
    with pytest.raises(FileNotFoundError, match=r"No \.tar file"):
        read_webdataset(str(tmp_path / "empty"))
    for uri, expected in (("a.jpg", False), ("s3://b/x.tar", False), ("s3://b/x.tar#k.jpg", True), ("x.tar#k", True)):
        assert is_member(uri) is expected
