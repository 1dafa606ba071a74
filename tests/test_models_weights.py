"""Checksums of weights files, and modules built without being initialised first. The rest: tests of the models."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from hedwig.models.weights import build_loaded, check_sha256, read_state_dict, settings_digest


def test_the_right_checksum_passes(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "some.pth")
    right = hashlib.sha256((tmp_path / "some.pth").read_bytes()).hexdigest()
    assert torch.equal(read_state_dict(tmp_path / "some.pth", right)["a"], torch.ones(2))
    check_sha256(tmp_path / "some.pth", right.upper())


def test_another_checksum_names_both_and_the_file_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not even a weights file")
    found = hashlib.sha256(b"not even a weights file").hexdigest()
    with pytest.raises(ValueError, match=rf"model\.safetensors' was not opened.*{found}, expected {'ab' * 32}"):
        read_state_dict(tmp_path, "AB" * 32)
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_state_dict(tmp_path, found)
    with pytest.raises(ValueError, match="64 hexadecimal digits, got 'b8cca3fd'"):
        read_state_dict(tmp_path, "b8cca3fd")


class WithTable(nn.Module):
    """Has a buffer that is computed and not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_buffers_that_are_not_stored_are_computed() -> None:
    state = WithTable().state_dict()
    before = torch.get_rng_state()
    built = build_loaded(WithTable, state, origin="here")
    assert torch.equal(torch.get_rng_state(), before)
    assert built.table.tolist() == [0, 1, 2]
    assert torch.equal(built.layer.weight, state["layer.weight"])
    with pytest.raises(ValueError, match=r"'here' do not fit WithTable: 1 missing: layer\.bias"):
        build_loaded(WithTable, {"layer.weight": state["layer.weight"]}, origin="here")


def test_a_module_that_can_be_completed_is_built_once() -> None:
    made = []

    def build() -> WithTable:
        made.append(WithTable())
        return made[-1]

    def complete(module: WithTable) -> None:
        module.table = torch.zeros(3)

    built = build_loaded(build, WithTable().state_dict(), origin="here", complete=complete)
    assert len(made) == 1
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))


def test_settings_beside_the_weights_have_a_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "source.json").write_text("{}")
    (tmp_path / "README.md").write_text("no setting")
    assert settings_digest(tmp_path) is None
    seen = {None}
    for name in ("preprocessor_config.json", "merges.txt", "spiece.model"):
        for content in ("a", "b"):
            (tmp_path / name).write_text(content)
            seen.add(settings_digest(tmp_path))
    assert len(seen) == 7
    (tmp_path / "source.json").write_text("fetched again")
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert settings_digest(tmp_path / "model.safetensors") in seen
