import json

import pytest

from hedwig import benchmark


def test_index_benchmark_measures_a_correct_search():
    figures = benchmark.index_benchmark(2000, 32, num_cells=20, num_rounds=1)
    assert figures["recall_at_1_in_cells"] >= 0.95
    assert figures["index_ms_per_query"] > 0


def test_preprocessing_benchmark_has_every_ratio():
    figures = benchmark.preprocessing_benchmark(benchmark._synthetic_panoramas(1), num_rounds=1)
    assert set(figures) >= {"decode_vs_pillow", "slice_vs_pillow", "preprocessing_vs_pillow"}
    assert all(value > 0 for value in figures.values())


@pytest.mark.slow
def test_the_command_prints_json(capsys):
    benchmark.main(["--json"])
    figures = json.loads(capsys.readouterr().out)
    assert all(value > 0 for group in figures.values() for value in group.values())
