"""Measure this cluster: slicing, storage of vectors, and the embedding job beside its bare model loop.

ray job submit -- python ray_jobs/benchmark.py [--model viclip-l14 --device cuda --gpus 1 ...]
"""

import sys

from hedwig.cli import app

if __name__ == "__main__":
    for command in (["slice"], ["storage"], ["pipeline", "--address", "auto", *sys.argv[1:]]):
        app(["bench", *command, "--json"], standalone_mode=False)
