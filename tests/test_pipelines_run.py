import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hedwig import storage
from hedwig.config import validate_experiment
from hedwig.panorama import PanoramaSlicer, Slicing
from hedwig.pipelines import plan
from hedwig.pipelines.chain import Chain, Step
from hedwig.pipelines.run import Run
from hedwig.schema import PANORAMAS
from hedwig.sources import ImageReader


def experiment(tmp_path, **settings):
    return validate_experiment({"output": str(tmp_path / "run"), **settings})


def test_the_plan_holds_what_the_experiment_needs(tmp_path):
    real = experiment(tmp_path, data={"panoramas": "x.csv"})
    assert plan(real) == ["panoramas", "caption", "embed", "geocells", "train", "index", "predict", "evaluate"]
    demo = experiment(
        tmp_path,
        data={"synthetic": {"num": 5}},
        encoder={"name": "viclip-tiny", "train": {}},
        evaluate={"baseline": {"name": "clip-tiny"}},
    )
    assert plan(demo)[:6] == ["synth", "panoramas", "caption", "frames", "encoder", "embed"]
    assert "baseline" in plan(demo)
    assert plan(demo, "embed", "geocells") == ["embed", "baseline", "geocells"]
    with pytest.raises(ValueError, match=r"no stage 'frames'"):
        plan(real, "frames")
    with pytest.raises(ValueError, match=r"Did you mean 'embed'\?"):
        plan(real, "embedd")
    with pytest.raises(ValueError, match="comes after"):
        plan(real, "train", "embed")


def test_an_artefact_is_made_once_and_again_when_anything_it_depends_on_changes(tmp_path):
    run = Run(experiment(tmp_path))
    folder, made = run.folder("geocells"), []

    def build(config, inputs):
        def call():
            made.append(1)
            storage.write_bytes(storage.join(folder, "x.bin"), b"x")
            return storage.publish(folder, kind="g", config=config, inputs=inputs, num_in=1, num_out=1)

        return call

    def make(config, inputs):
        run.make("geocells", "g", config, inputs, build(config, inputs))
        return len(made)

    assert make({"a": (1, 2)}, {}) == 1
    assert make({"a": [1, 2]}, {}) == 1  # a tuple is the list it will be read back as
    assert make({"a": [1, 3]}, {}) == 2
    assert make({"a": [1, 3]}, {"embeddings": "new"}) == 3
    storage.delete(storage.join(folder, "x.bin"))
    assert make({"a": [1, 3]}, {"embeddings": "new"}) == 4  # its file was gone
    assert run.resumed == ["geocells"]


def test_nothing_starts_when_all_is_up_to_date(tmp_path):
    starts = []
    run = Run(experiment(tmp_path), before_build=lambda: starts.append(1))
    folder = run.folder("index")

    def build():
        return storage.publish(folder, kind="i", config={}, inputs={}, num_in=0, num_out=0)

    run.make("index", "i", {}, {}, build)
    run.make("index", "i", {}, {}, build)
    assert starts == [1]


def test_a_missing_input_names_the_stage_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished embeddings in .*run the stage 'embed' first"):
        Run(experiment(tmp_path)).inputs("embed")


@pytest.mark.parametrize("mode", ["bearings", "wrap", "paper"])
def test_one_row_per_heading_becomes_frames_in_order(tmp_path, mode):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    for i, colour in enumerate(colours):
        Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(tmp_path / f"{i}.png")
    uris = [str(tmp_path / f"{i}.png") for i in range(4)]
    row = {"pano_id": "p", "projection": "bearings", "split": "train", "image_uri": uris[0], "bearing_uri": uris,
           "bearing_deg": [0.0, 90.0, 180.0, 270.0]}  # fmt: skip
    slicing = Slicing(mode=mode, num_frames=4, frame_px=16, height_px=64, stride_px=64)
    steps = [Step(ImageReader), Step(PanoramaSlicer, {"slicing": slicing})]
    schema = pa.schema([("pano_id", pa.string()), ("frames", pa.binary(4 * 16 * 16 * 3))])
    out = Chain(steps, schema)(pa.Table.from_pylist([row], schema=PANORAMAS))
    assert out["failure"].to_pylist() == [None]
    frames = np.frombuffer(out["frames"][0].as_py(), np.uint8).reshape(4, 16, 16, 3)
    middles = [tuple(int(v) for v in frame[8, 8]) for frame in frames]
    assert middles == colours


def test_a_bearing_that_cannot_be_read_fails_its_panorama_with_the_reason(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    uris = [str(tmp_path / "0.png"), str(tmp_path / "gone.png")]
    row = {"pano_id": "p", "projection": "bearings", "split": "train", "image_uri": uris[0], "bearing_uri": uris,
           "bearing_deg": [0.0, 180.0]}  # fmt: skip
    steps = [Step(ImageReader), Step(PanoramaSlicer, {"slicing": Slicing(mode="bearings", num_frames=2, frame_px=16)})]
    out = Chain(steps, pa.schema([("pano_id", pa.string())]))(pa.Table.from_pylist([row], schema=PANORAMAS))
    assert "gone.png" in out["failure"][0].as_py()
