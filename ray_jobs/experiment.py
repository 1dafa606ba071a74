"""Run a matrix of experiments on the cluster.

ray job submit -- python ray_jobs/experiment.py experiments/paper_us.yaml output=s3://bucket/runs/paper-us
"""

import sys

import ray

from hedwig.cli import main

if __name__ == "__main__":
    ray.init(address="auto")  # the command uses the Ray that runs already
    sys.argv.insert(1, "experiment")
    main()
