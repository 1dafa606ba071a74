"""Run an experiment on the cluster:  ray job submit -- python ray_jobs/run.py experiments/hedwig.yaml [key=value ...]."""

import logging
import sys

from hedwig.config import load_experiment
from hedwig.pipelines import run_experiment

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_experiment(load_experiment(sys.argv[1], ["cluster.address=auto", *sys.argv[2:]]))
