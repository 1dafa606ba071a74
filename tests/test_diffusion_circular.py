"""The wrap of a panorama: the blend's formula, decoding around it against a twin that is periodic by construction."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_diffusion import tiny_vae

from hedwig.diffusion.circular import (
    CircularBlend,
    blend_wrap,
    circular_decode,
    close_wrap,
    extend_wrap,
    num_extra_columns,
    seam_step,
)


class LocalDecoder:
    """A decoder that sees 3 latent columns and rows on each side, zero beyond the border, and doubles the size."""

    def __init__(self, *, periodic: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(3, 4, 7, 7, generator=generator) / 14
        self.periodic = periodic
        self.config = SimpleNamespace(scaling_factor=0.5)
        self.dtype = torch.float32

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        assert not return_dict
        padded = torch.nn.functional.pad(latents, (3, 3, 0, 0), mode="circular" if self.periodic else "constant")
        image = torch.nn.functional.conv2d(torch.nn.functional.pad(padded, (0, 0, 3, 3)), self.kernel)
        return (image.repeat_interleave(2, 2).repeat_interleave(2, 3),)


def latents(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


def test_blending_is_the_published_formula_for_any_width():
    for width, extra in ((128, 4), (64, 2), (32, 1), (24, 1), (132, 4)):
        assert num_extra_columns(width) == extra
        z = extend_wrap(latents(8, width), extra)
        assert z.shape[-1] == width + extra
        assert torch.equal(z[..., width:], z[..., :extra])
        z[..., width:] += 1
        twin = z.clone()
        for x in range(extra):  # in place and column by column, as published
            twin[..., x] = twin[..., -extra + x] * (1 - x / extra) + twin[..., x] * (x / extra)
        assert torch.allclose(blend_wrap(z, extra), twin, atol=1e-6)
        assert torch.equal(close_wrap(z, extra), blend_wrap(z, extra)[..., :width])
        # The first column is now what followed the last one.
        assert torch.equal(close_wrap(z, extra)[..., 0], z[..., width])
        step = CircularBlend(extra)(None, 0, None, {"latents": z, "prompt_embeds": "kept"})
        assert torch.equal(step["latents"], blend_wrap(z, extra))
        assert step["prompt_embeds"] == "kept"
    for extra in (0, 5):
        with pytest.raises(ValueError, match="cannot be blended"):
            blend_wrap(latents(2, 8), extra)


def test_decoding_around_the_wrap_is_near_the_periodic_decoder_and_plain_decoding_is_not():
    z = latents(16, 64)
    exact = LocalDecoder(periodic=True).decode(z / 0.5, return_dict=False)[0]
    plain = LocalDecoder().decode(z / 0.5, return_dict=False)[0]
    around = circular_decode(LocalDecoder(), z)
    assert around.shape == (2, 3, 32, 128)
    error, plain_error = (around - exact).abs(), (plain - exact).abs()
    # Nothing differs where no border is near; at the wrap plain decoding is wrong by about the picture's own spread.
    assert error[..., 32:-6].max() < 1e-5
    assert plain_error[..., [0, -1]].mean() > 0.3 * exact.std()
    # What the right border of the repeated quarter spoils is faded out; what is left of it is small.
    assert error[..., 0].max() < 1e-5
    assert error[..., :32].mean() < 0.1 * plain_error[..., :6].mean()


def test_row_tiles_of_full_width_make_the_same_picture():
    z = latents(40, 32)
    whole = circular_decode(LocalDecoder(), z, tile_rows=64)
    tiled = circular_decode(LocalDecoder(), z, tile_rows=16, overlap=0.5)
    assert tiled.shape == whole.shape == (2, 3, 80, 64)
    inner = (whole - tiled).abs().mean() / whole.std()
    assert inner < 0.12  # each tile's own border, faded over half a tile
    assert (whole - tiled)[:, :, :16].abs().max() < 1e-5  # the first tile's beginning is untouched
    assert torch.allclose(circular_decode(LocalDecoder(), z, tile_rows=40), whole)
    with pytest.raises(ValueError, match="overlap 1"):
        circular_decode(LocalDecoder(), z, overlap=1.0)
    with pytest.raises(ValueError, match="width 3"):
        circular_decode(LocalDecoder(), z[..., :3])


def test_a_real_autoencoder_is_shift_equivariant_at_the_wrap_only_when_decoded_around_it():
    vae, z = tiny_vae(), latents(16, 64, 1)
    shift = 24  # columns; the old wrap comes to lie inside
    with torch.inference_mode():
        around, moved = circular_decode(vae, z), circular_decode(vae, torch.roll(z, shift, -1))
        plain = vae.decode(z / vae.config.scaling_factor, return_dict=False)[0]
        moved_plain = vae.decode(torch.roll(z, shift, -1) / vae.config.scaling_factor, return_dict=False)[0]
    spread = float(plain.std())
    at_wrap = [*range(16), *range(-16, 0)]
    moved, moved_plain = torch.roll(moved, -8 * shift, -1), torch.roll(moved_plain, -8 * shift, -1)
    equivariance = float((around - moved)[..., at_wrap].abs().mean()) / spread
    plain_equivariance = float((plain - moved_plain)[..., at_wrap].abs().mean()) / spread
    assert equivariance < 0.15
    assert equivariance < 0.5 * plain_equivariance
    # Away from the wrap both decoders make the same picture, but for the statistics of the normalisation layers.
    assert float((around - plain)[..., 128:-64].abs().mean()) / spread < 0.1


def test_seam_step_is_the_mean_step_across_and_inside():
    image = np.zeros((2, 4, 3), dtype=np.uint8)
    image[:] = np.array([0, 10, 20, 30], dtype=np.uint8)[None, :, None]
    assert seam_step(image) == (30.0, 10.0, 3.0)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 256, 3), dtype=np.uint8)
    assert seam_step(noise).ratio == pytest.approx(1.0, abs=0.05)
    twin = np.mean([abs(int(a) - int(b)) for a, b in zip(noise[:, 0].ravel(), noise[:, -1].ravel(), strict=True)])
    assert seam_step(noise).wrap == pytest.approx(twin)
    assert seam_step(np.full((4, 8, 3), 7, dtype=np.uint8)).ratio == 1.0
    with pytest.raises(ValueError, match=r"\(4, 2, 3\)"):
        seam_step(np.zeros((4, 2, 3), dtype=np.uint8))
