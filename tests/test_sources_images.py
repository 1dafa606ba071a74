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
