"""Speed on synthetic input: ratios of hedwig's fast paths to their plain twins, and what an encoder reaches.

    make bench          (or: python -m hedwig.benchmark --json, or: hedwig bench all --json)

Machines are noisy and differ, so every figure is measured interleaved with its twin in the same process and given as a
ratio. Nothing here asserts a speed; `tests/` asserts that both ways agree. One module per question; a new one joins
`ratios` if it is a ratio that belongs into ``make bench``, and becomes a command of ``hedwig bench`` if it is asked
alone.
"""

from __future__ import annotations

import argparse
import json
import sys

__all__ = ["main", "ratios", "ratios_text"]

Ratios = dict[str, dict[str, float]]


def ratios() -> Ratios:
    """Every benchmark that compares a fast path with its plain twin: figures by title."""
    import torch

    from hedwig.benchmark.encoder import encoder_benchmark
    from hedwig.benchmark.preprocessing import preprocessing_benchmark, synthetic_panoramas
    from hedwig.benchmark.retrieve import measure_retrieval
    from hedwig.benchmark.table import table_benchmark

    torch.set_num_threads(1)
    return {
        "preprocessing of 2048 x 1024 synthetic panoramas": preprocessing_benchmark(synthetic_panoramas(4)),
        "viclip-tiny forward, one thread": encoder_benchmark(),
        "search among 100,000 x 256 in 1,000 cells, one thread": measure_retrieval(
            num_vectors=100_000, num_cells=1000, dim=256, num_rounds=3
        ).ratios(),
        "Parquet vectors 50,000 x 768, float32": table_benchmark(),
        "Parquet vectors 50,000 x 768, float16": table_benchmark(dtype="float16"),
    }


def ratios_text(results: Ratios) -> str:
    """One line per figure, for readers."""
    lines = []
    for title, figures in results.items():
        lines.append(title)
        lines += [f"  {name:<30} {value:,.4g}" for name, value in figures.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print every ratio; ``--json`` for machines."""
    parser = argparse.ArgumentParser(prog="python -m hedwig.benchmark", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    results = ratios()
    sys.stdout.write((json.dumps(results, indent=1) if options.json else ratios_text(results)) + "\n")
