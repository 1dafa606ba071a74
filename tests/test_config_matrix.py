"""A matrix is every combination of its axes, and wrong ones are named."""

import pytest

from hedwig.config import ConfigError, load_matrix

TEXT = """
name: m
output: runs/m
base: {data: {panoramas: listing.csv}, training: {epochs: 3, tau_km: 50}}
axes:
  Model: {CLIP: {encoder: {name: clip-tiny}}, "Vi CLIP!": {encoder: {name: viclip-tiny}}}
  Seed: {a: {training: {seed: 1}}, b: {training: {seed: 2}}}
exclude: [{Model: CLIP, Seed: b}]
"""


def write(tmp_path, text):
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    return path


def test_combinations_in_order_with_their_settings(tmp_path):
    matrix = load_matrix(write(tmp_path, TEXT), ["base.training.epochs=9"])
    assert [cell.labels for cell in matrix.cells] == [
        {"Model": "CLIP", "Seed": "a"},
        {"Model": "Vi CLIP!", "Seed": "a"},
        {"Model": "Vi CLIP!", "Seed": "b"},
    ]
    assert [cell.experiment.output for cell in matrix.cells] == [
        "runs/m/clip-a",
        "runs/m/vi-clip-a",
        "runs/m/vi-clip-b",
    ]
    last = matrix.cells[-1].experiment
    assert (last.encoder.name, last.training.seed, last.training.tau_km) == ("viclip-tiny", 2, 50)
    assert {cell.experiment.training.epochs for cell in matrix.cells} == {9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("base:", "bse:"), "unknown key 'bse'"),
        (("exclude: [{Model: CLIP, Seed: b}]", "exclude: [{Model: clip}]"), "Model=clip, which no axis has"),
        (("Seed: b}]", "Seed: [b, c]}]"), "Seed=c, which no axis has"),
        (("Seed: b}]", "Seed: []}]"), "exclude names no label of Seed"),
        (("{seed: 2}", "{sed: 2}"), "training.sed"),
        (("Seed: {a:", "Seed: {A: {}, a:"), "the same folder"),
        (("axes:", "tables: [2]\naxes:"), "no table 2"),
    ],
)
def test_errors_name_the_place(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_matrix(write(tmp_path, TEXT.replace(*change)))


def test_a_list_of_labels_leaves_out_every_combination_of_them(tmp_path):
    seeds = "Seed: {a: {training: {seed: 1}}, b: {training: {seed: 2}}, 3: {training: {seed: 3}}}"
    text = TEXT.replace("Seed: {a: {training: {seed: 1}}, b: {training: {seed: 2}}}", seeds)
    text = text.replace("{Model: CLIP, Seed: b}", "{Model: [CLIP, Vi CLIP!], Seed: [b, 3]}, {Model: [CLIP]}")
    assert [cell.labels for cell in load_matrix(write(tmp_path, text)).cells] == [{"Model": "Vi CLIP!", "Seed": "a"}]
