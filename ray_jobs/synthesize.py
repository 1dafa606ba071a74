"""Make panoramas from captions by diffusion on the cluster.

ray job submit -- python ray_jobs/synthesize.py s3://bucket/runs/real/captions --model sd-base --out /shared/made
"""

import sys

import ray

from hedwig.cli import main

if __name__ == "__main__":
    ray.init(address="auto")  # the command uses the Ray that runs already
    sys.argv.insert(1, "synthesize")
    main()
