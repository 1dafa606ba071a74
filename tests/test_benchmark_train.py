"""The training benchmark on a few rows: its figures fit together, and both loops read the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hedwig import storage
from hedwig.benchmark.train import bare_epoch, measure_training, synthetic_table
from hedwig.training import train_geolocator
from hedwig.vectors import read_vectors


def test_figures_fit_together():
    threads = torch.get_num_threads()
    figures = measure_training(
        train_geolocator, num_rows=700, dim=12, num_cells=9, num_workers=0, num_epochs=3, batch_size=64
    )
    assert torch.get_num_threads() == threads
    assert figures.ratio_to_bare_loop == pytest.approx(figures.bare_epoch_seconds / figures.epoch_seconds)
    assert figures.ratio_to_bare_loop_cpu == pytest.approx(figures.bare_epoch_cpu_seconds / figures.epoch_cpu_seconds)
    assert figures.rows_per_s == pytest.approx(700 / figures.epoch_seconds)
    assert 3 * figures.epoch_seconds < 3 * figures.total_seconds
    assert (figures.num_rows, figures.num_cells, figures.dim) == (700, 9, 12)
    assert figures.to_dict().keys() >= {"ratio_to_bare_loop", "epoch_seconds", "rows_per_s"}
    assert f"Ray Train at {figures.ratio_to_bare_loop:.2f} of it" in figures.text()
    with pytest.raises(ValueError, match="even dim"):
        measure_training(train_geolocator, dim=7)
    with pytest.raises(ValueError, match="1 threads for 2 workers"):
        measure_training(train_geolocator, num_workers=2)


def test_the_table_holds_what_the_bare_loop_reads(tmp_path):
    rows, cells = synthetic_table(str(tmp_path), num_rows=300, dim=8, num_cells=5)
    table = storage.read_table(str(tmp_path / "embeddings"))
    order = np.argsort(table["pano_id"].to_pylist())
    for name, values in (("image", rows.image), ("text", rows.text)):
        got = read_vectors(table, f"{name}_embedding")[order]
        np.testing.assert_array_equal(got, values.numpy())
        assert torch.allclose(values.norm(dim=1), torch.ones(300))
    assert cells.assign(rows.lat, rows.lon).tolist() == rows.cell_ids.tolist()
    assert len(np.unique(rows.cell_ids)) == 5
    wall, cpu = bare_epoch(rows, cells, 64)
    assert cpu > 0
    assert wall > 0
