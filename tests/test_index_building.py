"""Builds past the memory: byte for byte those in memory, for any order and any cut of the batches."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_world import DIM, NUM_CELLS, digests, references, some_queries

from hedwig.index import GeocellIndex

COLUMNS = ("vectors", "cell_ids", "pano_ids", "lat", "lon")


def cut(data: dict[str, Any], order: Any, num: int) -> Any:
    for some in np.array_split(order, num):
        yield tuple([data[c][n] for n in some] if c == "pano_ids" else data[c][some] for c in COLUMNS)


@pytest.mark.parametrize("codec", ["fp16", "fp32", "sq8", "pq"])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_any_order_and_any_cut_give_the_same_bytes(tmp_path: Path, codec: Any, num_frames: int) -> None:
    data, rng = references(5000 if num_frames == 1 else 700), np.random.default_rng(9)
    data["pano_ids"][3], data["pano_ids"][4] = "Zürich", "东京"
    if num_frames > 1:
        data["vectors"] = np.stack([data["vectors"], rng.permutation(data["vectors"])], axis=1)
    whole = GeocellIndex.build(**data, num_cells=NUM_CELLS, codec=codec)
    whole.save(tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    order = rng.permutation(len(data["lat"]))
    shuffled = {n: [v[i] for i in order] if n == "pano_ids" else v[order] for n, v in data.items()}
    GeocellIndex.build(**shuffled, num_cells=NUM_CELLS, codec=codec).save(tmp_path / "shuffled")
    assert digests(tmp_path / "shuffled") == wanted
    for num, memory_bytes in ((1, 1 << 30), (7, 1 << 30), (7, 40_000)):  # the last one sorts in many buckets
        folder = tmp_path / f"{num}-{memory_bytes}"
        streamed = GeocellIndex.build_streamed(
            cut(data, rng.permutation(order), num), folder, num_cells=NUM_CELLS, codec=codec, memory_bytes=memory_bytes
        )
        assert digests(folder) == wanted
        assert list(streamed.pano_ids) == sorted(
            data["pano_ids"], key=lambda p: (data["cell_ids"][data["pano_ids"].index(p)], p)
        )
    queries, cells = some_queries(10)
    for a, b in zip(whole.search(queries, cells, 4), streamed.search(queries, cells, 4), strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path) -> None:
    """40 MB of vectors arrive and less than 10 MB are ever held; FAISS and Arrow hold nothing of them."""
    rng, num, dim = np.random.default_rng(0), 2000, 512

    def batches() -> Any:
        for batch in range(10):
            names = [f"{batch}-{n}" for n in range(num)]
            vectors = rng.standard_normal((num, dim), dtype=np.float32)
            yield vectors, rng.integers(0, 50, num), names, np.zeros(num), np.zeros(num)

    tracemalloc.start()
    try:
        index = GeocellIndex.build_streamed(batches(), tmp_path, memory_bytes=2 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(index) == 20_000
    assert peak < 2.5 * num * dim * 4 + 8e6  # a batch, its halves, and the names
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_wrong_streams_are_refused(tmp_path: Path) -> None:
    data = references(40)
    one = next(cut(data, np.arange(40), 1))
    with pytest.raises(ValueError, match=r"unique.*occur more than once"):
        GeocellIndex.build_streamed([one, one], tmp_path)
    with pytest.raises(ValueError, match="no batch"):
        GeocellIndex.build_streamed([], tmp_path)
    with pytest.raises(ValueError, match="batch has vectors of the shape"):
        GeocellIndex.build_streamed([one, (np.zeros((1, DIM + 1)), [0], ["x"], [0.0], [0.0])], tmp_path)
    with pytest.raises(ValueError, match="fp16"):
        GeocellIndex.build_streamed([one], tmp_path, codec="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "index.json").exists()
    empty = GeocellIndex.build_streamed([(np.empty((0, 4)), np.empty(0, int), [], [], [])], tmp_path, num_cells=3)
    assert (len(empty), empty.num_cells) == (0, 3)
