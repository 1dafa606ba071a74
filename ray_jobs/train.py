"""Run the stage 'train' of an experiment:  ray job submit -- python ray_jobs/train.py experiments/hedwig.yaml [key=value ...]."""

import logging
import sys

from hedwig.config import load_experiment
from hedwig.pipelines import run_experiment

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    experiment = load_experiment(sys.argv[1], ["cluster.address=auto", *sys.argv[2:]])
    run_experiment(experiment, first="train", last="train")
