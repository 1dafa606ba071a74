import inspect
import json

import pytest
import yaml

from hedwig import config
from hedwig.config import ConfigError, load_experiment, load_matrix, parse_yaml, validate_experiment


def write(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def test_unknown_keys_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"Unknown key 'trainin'. Did you mean 'training'\?"):
        validate_experiment({"output": "x", "trainin": {}})
    with pytest.raises(ConfigError, match=r"Unknown key 'encoder.train.epoch'. Did you mean 'epochs'?"):
        validate_experiment({"output": "x", "encoder": {"train": {"epoch": 1}}})


def test_every_wrong_key_gets_a_line():
    with pytest.raises(ConfigError) as error:
        validate_experiment({"training": {"epochs": "5", "learning_rate": -1}})
    text = str(error.value)
    assert "3 error(s)" in text
    assert "Missing key 'output'." in text
    assert "training.epochs: Input should be a valid integer, got '5'." in text
    assert "training.learning_rate" in text


def test_overrides_pass_the_same_validation(tmp_path):
    path = write(tmp_path, "output: runs/a\ntraining: {epochs: 3}\n")
    x = load_experiment(path, ["training.learning_rate=1e-3", "data.synthetic.num=5", "slicing.headings_deg=[0, 90]"])
    assert x.training.epochs == 3
    assert x.training.learning_rate == 0.001
    assert x.data.synthetic is not None
    assert x.data.synthetic.num == 5
    assert x.slicing.headings_deg == (0.0, 90.0)
    with pytest.raises(ConfigError, match=r"Unknown key 'training.epoch'"):
        load_experiment(path, ["training.epoch=3"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load_experiment(path, ["training.epochs"])
    with pytest.raises(ConfigError, match="is a value, not a section"):
        load_experiment(path, ["output.deeper=1"])


def test_presets_lie_beneath_the_file():
    paper = validate_experiment({"output": "x", "preset": "paper"})
    assert (paper.slicing.mode, paper.training.loss, paper.geocells.num_cells) == ("paper", "ce", 100)
    changed = validate_experiment({"output": "x", "preset": "paper", "training": {"epochs": 9}})
    assert (changed.training.epochs, changed.training.loss) == (9, "ce")


def test_an_experiment_is_frozen_and_survives_a_round_trip():
    x = validate_experiment({"output": "x"})
    with pytest.raises(ValueError, match="frozen"):
        x.name = "other"
    again = validate_experiment(yaml.safe_load(yaml.safe_dump(x.model_dump(mode="json"))))
    assert again == x


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", "aliases"),
        ("a: 1\na: 2", "given twice"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("[" * 20000, "nested too deeply"),
        ("a: [1", "not valid YAML"),
        ("a: " + "x" * 1_000_001, "larger than"),
    ],
)
def test_hostile_yaml_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, where="f")


def test_a_missing_file_and_a_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="No experiment file"):
        load_experiment(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="holds list"):
        load_experiment(write(tmp_path, "- 1\n"))


def test_every_shipped_experiment_is_valid(pytestconfig):
    files = sorted((pytestconfig.rootpath / "experiments").glob("*.yaml"))
    assert {f.stem for f in files} >= {"demo", "real", "paper-us", "paper-world", "pigeon", "hedwig"}
    for file in files:
        if "\naxes:" in file.read_text():
            assert len(load_matrix(file).cells) > 1
        else:
            assert load_experiment(file).name == file.stem


def test_the_schema_is_json_and_forbids_unknown_keys():
    text = json.dumps(config.json_schema())
    assert '"additionalProperties": false' in text


def test_sections_and_constructors_cannot_drift():
    from hedwig.panorama import Slicing
    from hedwig.retrieve import Retriever
    from hedwig.training import train_encoder, train_geolocator

    def arguments(function):
        return set(inspect.signature(function).parameters)

    assert set(config.SlicingConfig.model_fields) | {"frame_px"} == arguments(Slicing)
    assert set(config.RetrieveConfig.model_fields) <= arguments(Retriever.__init__)
    assert set(config.TrainingConfig.model_fields) <= arguments(train_geolocator)
    assert set(config.EncoderTrainingConfig.model_fields) <= arguments(train_encoder)
