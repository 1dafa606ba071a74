"""Which folder a run works in: the run folder, or a version that grows beside the published one. No Ray, no models."""

import logging

import pytest

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.pipelines.run import Protected, Run
from hedwig.pipelines.versions import run_stages
from hedwig.publishing import find_garbage, publish, published_folder, read_pointer, rollback


def experiment(tmp_path, seed=0, **settings):
    return validate_experiment(
        {"output": str(tmp_path / "run"), "encoder": {"name": "viclip-tiny", "seed": seed}, **settings}
    )


built = []


def go(run, stages):
    """Two stages: embeddings depend on the seed, the index on the embeddings."""
    for stage in stages:
        config = {"seed": run.experiment.encoder.seed} if stage == "embed" else {}
        inputs = run.inputs("embed") if stage == "index" else {}

        def build(stage=stage, config=config, inputs=inputs):
            folder = run.folder(stage)
            storage.delete(folder)
            storage.write_bytes(storage.join(folder, "part-0.bin"), str(config).encode())
            built.append((stage, folder))
            return storage.publish(folder, kind=stage, config=config, inputs=inputs, num_in=1, num_out=1)

        run.make(stage, stage, config, inputs, build)


@pytest.fixture(autouse=True)
def _fresh():
    built.clear()


def test_before_anything_is_published_the_run_folder_is_written_to(tmp_path):
    run_stages(experiment(tmp_path), ["embed", "index"], go)
    run_stages(experiment(tmp_path, 1), ["embed", "index"], go)
    assert {folder for _, folder in built} == {str(tmp_path / "run" / "embeddings"), str(tmp_path / "run" / "index")}
    assert len(built) == 4


def test_a_new_model_grows_beside_the_published_one(tmp_path, caplog):
    output = str(tmp_path / "run")
    run_stages(experiment(tmp_path), ["embed", "index"], go)
    publish(output, lambda folder: None)
    built.clear()
    done = run_stages(experiment(tmp_path), ["embed", "index"], go)
    assert (built, done.resumed) == ([], ["embed", "index"])  # up to date: nothing grows
    assert not (tmp_path / "run" / "versions").exists()
    before = storage.manifest_digest(f"{output}/index")
    with caplog.at_level(logging.INFO):
        done = run_stages(experiment(tmp_path, 1), ["embed", "index"], go)
    assert "a new version grows in" in caplog.text
    second = f"{output}/versions/0002"
    assert [folder for _, folder in built] == [f"{second}/embeddings", f"{second}/index"]
    assert storage.manifest_digest(f"{output}/index") == before
    assert published_folder(output) == output
    assert done.experiment.captions.answers == f"{output}/answers/captions"  # paid answers are shared
    built.clear()
    run_stages(experiment(tmp_path, 1), ["embed", "index"], go)
    assert built == []  # the growing version is found again
    publish(output, lambda folder: None)
    assert published_folder(output) == second
    assert (tmp_path / "run" / "versions" / "0002" / "experiment.yaml").exists()
    # Back to the first: the same experiment is up to date in neither the withdrawn nor a new version's place.
    rollback(output)
    run_stages(experiment(tmp_path), ["embed", "index"], go)
    assert built == []
    assert [g.version for g in find_garbage(output)] == ["versions/0002"]


def test_what_is_the_same_is_taken_over_and_not_made(tmp_path):
    output = str(tmp_path / "run")
    run_stages(experiment(tmp_path), ["embed", "index"], go)
    publish(output, lambda folder: None)
    built.clear()
    run_stages(experiment(tmp_path), ["index"], go, force=True)
    assert built == [("index", f"{output}/versions/0002/index")]
    taken = storage.read_manifest(f"{output}/versions/0002/embeddings")
    assert taken == storage.read_manifest(f"{output}/embeddings")


def test_a_protected_run_writes_nothing(tmp_path):
    run = Run(experiment(tmp_path), protected=True)
    with pytest.raises(Protected, match="is published"):
        go(run, ["embed"])
    assert built == []
    assert read_pointer(str(tmp_path / "run")) is None


def test_an_outdated_artefact_is_made_again_though_settings_are_the_same(tmp_path):
    run = Run(experiment(tmp_path))
    go(run, ["embed"])
    config = {"seed": 0}

    def build():
        return storage.publish(run.folder("embed"), kind="embed", config=config, inputs={}, num_in=2, num_out=2)

    assert run.make("embed", "embed", config, {}, build, lambda folder: False).num_out == 1
    assert run.make("embed", "embed", config, {}, build, lambda folder: folder == run.folder("embed")).num_out == 2
