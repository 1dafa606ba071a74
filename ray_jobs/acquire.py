"""Fetch imagery of a plan on the cluster; keys come from the nodes' environment.

ray job submit -- python ray_jobs/acquire.py mapillary s3://bucket/plan.csv --out s3://bucket/mapillary --accept-terms
"""

import sys

import ray

from hedwig.cli import main

if __name__ == "__main__":
    ray.init(address="auto")  # the command uses the Ray that runs already
    sys.argv.insert(1, "acquire")
    main()
