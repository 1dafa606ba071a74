"""Serve a run on the cluster.

ray job submit -- python ray_jobs/serve.py s3://bucket/runs/hedwig [replicas].
"""

import sys
import time

import ray

from hedwig.serving import start

if __name__ == "__main__":
    ray.init(address="auto")
    print(start(sys.argv[1], num_replicas=int(sys.argv[2]) if len(sys.argv) > 2 else 1), flush=True)  # noqa: T201
    while True:
        time.sleep(3600)
