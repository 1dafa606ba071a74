import json
import subprocess
import sys

import pytest

from hedwig import benchmark
from hedwig.benchmark.encoder import encoder_benchmark
from hedwig.benchmark.preprocessing import preprocessing_benchmark, synthetic_panoramas
from hedwig.benchmark.table import table_benchmark


def test_preprocessing_benchmark_has_every_ratio():
    figures = preprocessing_benchmark(synthetic_panoramas(1), num_rounds=1)
    assert set(figures) >= {"decode_vs_pillow", "slice_vs_pillow", "preprocessing_vs_pillow"}
    assert all(value > 0 for value in figures.values())


def test_encoder_and_table_benchmarks_compare_equals():
    figures = encoder_benchmark(batch_size=2, num_rounds=1)
    assert figures["min_cosine"] > 0.99
    for dtype in ("float32", "float16"):
        figures = table_benchmark(500, 32, dtype=dtype, num_rounds=1)
        assert figures["equal"] == 1
        assert 0.5 < figures["bytes_ratio_to_list"] < 1.5


def test_text_has_a_line_per_figure():
    text = benchmark.ratios_text({"first": {"a": 1.0, "b": 12345.678}, "second": {"c": 0.5}})
    assert [line.split() for line in text.splitlines()] == [
        ["first"],
        ["a", "1"],
        ["b", "1.235e+04"],
        ["second"],
        ["c", "0.5"],
    ]


def test_it_is_a_command():
    done = subprocess.run([sys.executable, "-m", "hedwig.benchmark", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.slow
def test_the_command_prints_json(capsys):
    benchmark.main(["--json"])
    figures = json.loads(capsys.readouterr().out)
    assert all(value > 0 for group in figures.values() for value in group.values())
