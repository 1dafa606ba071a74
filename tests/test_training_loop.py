"""What is asked of Ray Train for a number of workers; that it then trains is in the tests of what is trained."""

from __future__ import annotations

import pytest

from hedwig.training import loop


class Asked(Exception):
    """Instead of a fit."""


@pytest.mark.parametrize(
    ("options", "num_workers", "resources"),
    [
        ({"num_workers": 4}, 4, {"CPU": 1}),
        ({"num_workers": 4, "min_workers": 1}, (1, 4), {"CPU": 1}),
        ({"num_workers": 4, "min_workers": 4, "cpus_per_worker": 3}, 4, {"CPU": 3}),
        ({"num_workers": 2, "min_workers": 1, "use_gpu": True}, (1, 2), {"GPU": 1}),
    ],
)
def test_workers_asked_for(options, num_workers, resources, tmp_path, monkeypatch):
    def trainer(worker, *, scaling_config, train_loop_config, **rest):
        raise Asked(scaling_config, train_loop_config)

    monkeypatch.setattr(loop, "TorchTrainer", trainer)
    monkeypatch.setattr(loop.ray, "put", lambda payload: payload)
    settings = {"use_gpu": False, **options}
    with pytest.raises(Asked) as caught:
        loop.run(lambda s: None, {"a": 1}, payload=7, scratch=str(tmp_path), run_name="r", **settings)
    scaling, config = caught.value.args
    assert scaling.num_workers == num_workers
    assert scaling.elasticity_enabled == isinstance(num_workers, tuple)
    assert scaling.resources_per_worker == resources
    assert config["num_threads"] == (None if settings["use_gpu"] else resources["CPU"])
    assert (config["a"], loop.payload_of(config)) == (1, 7)


@pytest.mark.parametrize("min_workers", [0, 3])
def test_fewer_than_none_or_more_than_all_are_refused(min_workers, tmp_path):
    with pytest.raises(ValueError, match=rf"min_workers must be 1 to num_workers \(2\), got {min_workers}"):
        loop.run(
            lambda s: None, {}, payload=0, scratch=str(tmp_path), run_name="r", num_workers=2, use_gpu=False,
            min_workers=min_workers,
        )  # fmt: skip


def test_the_schedule_rises_then_falls_to_nothing():
    rates = [loop.schedule(step, 100, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
