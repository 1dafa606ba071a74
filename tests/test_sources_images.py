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
