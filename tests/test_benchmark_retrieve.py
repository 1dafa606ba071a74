"""The retrieval benchmark on a world of seconds: every method is there, and each finds what it should."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hedwig.benchmark import contenders
from hedwig.benchmark.retrieve import measure_retrieval
from hedwig.cli import app
from hedwig.index import exact_search

SIZE = {"num_vectors": 3000, "num_cells": 60, "dim": 32, "num_rounds": 1, "num_queries": 128}


def test_the_world_is_what_it_says() -> None:
    world = contenders.synthetic(4000, 32, 50, 4, 200)
    np.testing.assert_allclose(np.linalg.norm(world.vectors, axis=1), 1, atol=1e-6)
    assert all(len(set(row)) == 4 for row in world.asked.tolist())
    exact, _ = exact_search(world.queries, world.asked, world.vectors, world.cells, 1)
    np.testing.assert_array_equal(world.nearest, exact[:, 0])
    inside = [
        world.cells[row] in asked
        for row, asked in zip((world.queries @ world.vectors.T).argmax(1), world.asked, strict=True)
    ]
    assert 0.8 < np.mean(inside) < 0.98  # the classifier errs
    counts = np.bincount(world.cells, minlength=50)
    assert world.candidates == pytest.approx(counts[world.asked].sum(axis=1).mean())
    assert world.queries.dtype == world.vectors.dtype == np.float32


def test_every_method_is_measured_and_right() -> None:
    figures = measure_retrieval(**SIZE)
    recall = {(row["method"], row["batch"]): row["recall_at_1"] for row in figures.rows}
    methods = {method for method, _ in recall}
    ours = {f"hedwig {codec}" for codec in ("fp16", "fp32", "sq8", "pq")}
    theirs = {"numpy brute force", "faiss flat", "faiss IVF geocells fp16", "faiss IVFFlat geocells fp32"}
    theirs.add("faiss IVFFlat k-means")
    if importlib.util.find_spec("hnswlib") is None:
        assert figures.skipped == ["hnswlib: it is not installed"]
        assert methods == ours | theirs
    for method in ("hedwig fp32", "faiss IVFFlat geocells fp32"):
        assert all(recall[method, batch] == 1 for batch in (1, 64, 512))
    assert all(recall["hedwig fp16", batch] > 0.98 for batch in (1, 64, 512))
    assert recall["hedwig pq", 64] > 0.9
    assert recall["numpy brute force", 64] == recall["faiss flat", 64] < 1
    for row in figures.rows:
        assert row["qps"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    sizes = {row["method"]: row["bytes_per_vector"] for row in figures.rows}
    assert [sizes[f"hedwig {codec}"] for codec in ("fp32", "fp16", "sq8", "pq")] == [128, 64, 32, 4]
    assert figures.open_seconds > 0
    assert figures.refused_mb < 200
    assert len(figures.text().splitlines()) == 2 + len(figures.rows) + 3 + len(figures.skipped)


def test_the_command_prints_what_scripts_read() -> None:
    arguments = [
        "bench",
        "retrieve",
        "--vectors",
        "2000",
        "--cells",
        "40",
        "--dim",
        "16",
        "--probe",
        "3",
        "--rounds",
        "1",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ratio_to_brute_force"] > 0
    assert {"method", "batch", "qps", "p50_ms", "p99_ms", "bytes_per_vector", "recall_at_1"} <= set(found["rows"][0])
    assert {row["batch"] for row in found["rows"]} == {1, 64, 512}
