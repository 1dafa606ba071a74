"""Run the stage 'baseline' of an experiment.

ray job submit -- python ray_jobs/baseline.py experiments/hedwig.yaml [key=value ...]
"""

import sys

from hedwig.pipelines import run_job

if __name__ == "__main__":
    run_job(sys.argv[1:], stage="baseline")
