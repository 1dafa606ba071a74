"""Measure this cluster: slicing, storage, search, training and the embedding job, each beside its reference.

ray job submit -- python ray_jobs/benchmark.py                              # all, with their own sizes
ray job submit -- python ray_jobs/benchmark.py pipeline --model viclip-l14 --device cuda --gpus 1

What trains and embeds is placed by Ray, so its temporary folder (TMPDIR) must be one that all nodes see.
"""

import sys

from hedwig.cli import app

PLACED_BY_RAY = ("train", "pipeline")
ALL = ("slice", "storage", "retrieve", *PLACED_BY_RAY)

if __name__ == "__main__":
    name, *options = sys.argv[1:] or [""]
    for command in [name] if name else ALL:
        where = ["--address", "auto"] if command in PLACED_BY_RAY else []
        app(["bench", command, *where, *options, "--json"], standalone_mode=False)
