"""SIGKILL of `hedwig run` at random moments, again and again, then the same command: no row lost, none twice.

Slow (several minutes): .venv/bin/pytest -m slow tests/test_kill_anytime.py
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_end_to_end import NUM, TINY, environment

from hedwig import storage


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, seed):
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(TINY.replace("OUT", str(tmp_path / "run")))
    command = [sys.executable, "-c", "from hedwig.cli import main; main()", "run", str(experiment), "--quiet"]
    rng, num_kills = random.Random(seed), 0
    for _ in range(12):
        driver = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + rng.uniform(5, 40)
        while time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.1)
        if driver.poll() is not None:
            break
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        num_kills += 1
    assert num_kills >= 3
    subprocess.run(command, env=environment(), check=True, timeout=1200)
    ids = [f"synth-3-{i:06d}" for i in range(NUM)]
    for name in ("panoramas", "captions", "embeddings", "baseline"):
        manifest = storage.read_manifest(str(tmp_path / "run" / name))
        assert manifest is not None
        assert (manifest.num_in, manifest.num_out, manifest.num_rejected) == (NUM, NUM, 0)
        assert storage.read_table(str(tmp_path / "run" / name), ["pano_id"])["pano_id"].to_pylist() == ids
    assert storage.read_manifest(str(tmp_path / "run" / "report")) is not None
