"""Names that stay in Arrow against a plain array of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hedwig.index.names import Names

WORDS = [f"pano-{n}" for n in range(1000)] + ["", "Zürich", "东京"]


@pytest.mark.parametrize(
    "column", [pa.array(WORDS), pa.chunked_array([WORDS[:7], [], WORDS[7:]]), pa.array(["x", *WORDS])[1:]]
)
def test_names_read_like_an_array(column: pa.ChunkedArray) -> None:
    names, plain = Names(column), np.array(WORDS, dtype=object)
    assert len(names) == len(WORDS)
    assert list(names) == names.tolist() == WORDS
    np.testing.assert_array_equal(np.asarray(names), plain)
    rng = np.random.default_rng(0)
    for which in (
        3,
        -1,
        np.int64(1001),
        slice(5, 9),
        slice(None),
        rng.integers(-1003, 1003, (40, 20)),
        plain == "Zürich",
        np.array([], dtype=int),
    ):
        np.testing.assert_array_equal(names[which], plain[which])
    assert isinstance(names[0], str)
    assert (names == plain).all()
    assert names.at(np.array([[-1, 1002]])).tolist() == [[None, "东京"]]
    assert names.at(np.full(300, -1)).tolist() == [None] * 300
    for wrong in (1003, -1004, [0, 1003]):
        with pytest.raises(IndexError, match="1003 names"):
            names[wrong]


def test_lookup_finds_the_last_of_equal_names() -> None:
    names = Names(pa.array(["a", "b", "a", "c"]))
    assert names.lookup(["c", "nobody", "a"]).tolist() == [3, -1, 2]
    assert Names(pa.array([], pa.string())).lookup(["a"]).tolist() == [-1]
    assert names.lookup([]).tolist() == []
