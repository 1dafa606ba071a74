import io
import tarfile

import numpy as np

from hedwig.sources import ImageReader


def column(*values):
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def test_bytes_lists_of_bytes_and_reasons(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode())
    uris = [str(tmp_path / n) for n in ("a", "b", "gone")]
    batch = {"image_uri": column(*uris), "bearing_uri": column(None, [str(tmp_path / "b"), str(tmp_path / "c")], None)}
    out = ImageReader(num_threads=2)(batch)
    assert out["image_bytes"][0] == b"a"
    assert out["image_bytes"][1] == [b"b", b"c"]
    assert out["failure"][0] is None
    assert out["failure"][2].startswith("image not found: ")


def test_members_of_tars_are_read_by_address_and_bad_ones_are_reasons(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"bytes"))
    uris = [f"{tmp_path}/shard.tar#a.jpg", f"{tmp_path}/shard.tar#none.jpg"]
    batch = {"image_uri": np.array(uris, dtype=object), "bearing_uri": np.array([None, None], dtype=object)}
    result = ImageReader()(batch)
    assert result["image_bytes"][0] == b"bytes"
    assert result["failure"][0] is None
    assert "none.jpg" in result["failure"][1]


def test_what_was_begun_before_is_fetched_once_and_can_be_forgotten(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    fetched = []

    class Counting(ImageReader):
        def _fetch(self, row):
            fetched.append(row[0])
            return super()._fetch(row)

    def batch(*names):
        return {"image_uri": column(*(str(tmp_path / n) for n in names)), "bearing_uri": column(*[None] * len(names))}

    reader = Counting(num_threads=1)
    reader.prefetch(batch("a", "b", "a"))
    reader.prefetch(batch("b", "c"))
    assert reader(batch("a", "b", "a"))["image_bytes"].tolist() == [b"a", b"b", b"a"]
    assert reader(batch("b", "c"))["image_bytes"].tolist() == [b"b", b"c"]
    assert sorted(fetched) == [str(tmp_path / n) for n in "aabbc"]
    reader.prefetch(batch("a"))
    reader.prefetch(batch())
    (tmp_path / "a").write_bytes(b"new")
    assert reader(batch("a"))["image_bytes"].tolist() == [b"new"]
