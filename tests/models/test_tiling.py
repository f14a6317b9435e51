"""Tiles against the whole image, and counted halos against what layers really reach."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import AutoencoderConfig, LPVAEConfig
from zipir_jax.models.layers import bind
from zipir_jax.models.lp_vae import Decoder, Encoder, coarse_moments, decode, encode, fine_moments
from zipir_jax.models.pixel_decoder import PixelDecoder, pixel_decode
from zipir_jax.models.tiling import (
    Tiling,
    decoder_halo,
    encoder_halo,
    map_tiles,
    pixel_decoder_halo,
    spoilt_by_decoder,
    spoilt_by_encoder,
    tiled_scales,
)

pytestmark = pytest.mark.usefixtures("quick_compile")


def band(latent_channels, decoder_channels, scales, patch, blocks, unfold):
    return AutoencoderConfig(
        latent_channels=latent_channels,
        decoder_channels=decoder_channels,
        base_channels=4,
        multipliers=(1,) * scales,
        blocks_per_scale=blocks,
        patch=patch,
        unfold=unfold,
        pixel_channels=4,
        compute_dtype="float32",
    )


def lp_vae(coarse_scales, fine_scales, blocks, unfold):
    coarse = band(9, 12, coarse_scales, 2 ** (4 - coarse_scales), blocks, unfold)
    return LPVAEConfig(coarse=coarse, fine=band(52, 64, fine_scales, 2 ** (6 - fine_scales), blocks, unfold))


CONFIGS = {  # one has two blocks a scale, as each block takes its time to compile
    "paper": lp_vae(4, 6, 1, False),
    "small": lp_vae(3, 4, 2, True),
    "tiny": lp_vae(3, 4, 1, True),
    "enlarging": lp_vae(2, 5, 1, False),
}
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def cells_of(config):
    """The sizes of cell with which anything of E_f runs in tiles."""
    return [config.fine.patch * 2**scales for scales in range(1, len(config.fine.multipliers))]


# --------------------------------------------------------------------------------------------------
# Any local function
# --------------------------------------------------------------------------------------------------


def summed(x, reach):
    """What each pixel and its `reach` neighbours on both sides hold, zeros beyond the border."""
    for axis in (1, 2):
        padded = jnp.pad(x, [(reach * (i == axis),) * 2 for i in range(4)])
        size = x.shape[axis]
        x = sum(jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * reach + 1))
    return x


@pytest.mark.parametrize("cells", [(7, 11), (1, 9)])
@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (5, 11), (40, 40)])
@pytest.mark.parametrize("reach", [0, 2])
def test_windows_join_to_the_whole(cells, tile, reach):
    """Of arrays on two grids, to a third one; exactly, as the sums are of integers."""
    generator = np.random.default_rng(0)
    coarse, fine = (
        generator.integers(-9, 9, (2, cells[0] * n, cells[1] * n, 2)).astype(np.float32) for n in (1, 4)
    )

    def local(coarse, fine):
        return jnp.repeat(jnp.repeat(summed(coarse, reach), 2, 1), 2, 2) + summed(fine, reach)[:, ::2, ::2]

    run = jax.jit(lambda *arrays: map_tiles(local, arrays, cells, tile, reach))
    np.testing.assert_array_equal(run(coarse, fine), jax.jit(local)(coarse, fine))


def test_a_halo_one_cell_short_shows():
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 1))
    run = functools.partial(map_tiles, lambda x: summed(x, 2), [x], (9, 9), (3, 3))
    assert np.abs(run(2) - summed(x, 2)).max() < 1e-5
    assert np.abs(run(1) - summed(x, 2)).max() > 0.1


# --------------------------------------------------------------------------------------------------
# Halos: NaN beyond an edge of a window spreads to every row of it that reads what lies there
# --------------------------------------------------------------------------------------------------


def spoilt(run, axis, last, window, *sides):
    """Rows at the first or last edge of a window that are NaN in `run(*arrays)` once all beyond it is.

    sides: of each array, (pixels a cell, channels). Half of their cells along `axis` are the window.
    """

    def array(pixels, channels):
        shape = [1, 2 * pixels, 2 * pixels, channels]
        shape[axis] = 2 * window * pixels
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        beyond = np.arange(2 * window * pixels) // pixels
        np.moveaxis(values, axis, 0)[beyond >= window if last else beyond < window] = np.nan
        return values

    results = jax.tree.leaves(jax.jit(run)(*(array(*side) for side in sides)))
    counts = []
    for result in results:
        nan = np.isnan(result).any((0, 3 - axis, 3))
        assert nan.any() and not nan.all()
        half = len(nan) // 2
        counts.append(int(nan[:half].sum() if last else nan[half:].sum()))
    return counts


EDGES = pytest.mark.parametrize(("axis", "last"), [(1, False), (2, True)], ids=["top", "right"])


@EACH_CONFIG
@EDGES
def test_spoilt_rows_of_the_encoder_are_those_that_change(config, random_params, axis, last):
    params = random_params(Encoder, config.fine)
    scales = len(config.fine.multipliers)

    def run(image):
        encoder = bind(Encoder, config.fine, params)
        features = encoder.high_scales(image, scales)
        return features + [down(h) for down, h in zip(encoder.downs, features, strict=False)]

    counted = spoilt_by_encoder(config.fine, scales) + [
        encoder_halo(config.fine, k) for k in range(1, scales)
    ]
    found = spoilt(run, axis, last, 12, (config.fine.factor, 3))
    if last:  # a strided convolution reads one row less beyond
        assert all(c - 1 <= f <= c for f, c in zip(found, counted, strict=True))
    else:
        assert found == counted


@EACH_CONFIG
@EDGES
def test_spoilt_rows_of_the_decoders_are_those_that_change(config, random_params, axis, last):
    fine = config.fine
    params, pixel_params = random_params(Decoder, fine), random_params(PixelDecoder, config)
    for cell in cells_of(config):
        scales = tiled_scales(fine, cell)
        start = len(fine.multipliers) - scales

        def plain(h, start=start):
            decoder = bind(Decoder, fine, params)
            return decoder.head(decoder.high_scales(h, start))

        def pixel_aware(h, lq, start=start, scales=scales):
            network = bind(PixelDecoder, config, pixel_params)
            fuse = network.fuse(lq, network.extractor.high_scales(lq, scales), start)
            return network.head(network.decoder.high_scales(h, start, fuse))

        h = (1, fine.base_channels)
        assert spoilt(plain, axis, last, 12, h) == [spoilt_by_decoder(fine, scales)]
        [found] = spoilt(pixel_aware, axis, last, 12, h, (cell, 3))
        counted = spoilt_by_decoder(fine, scales, spoilt_by_encoder(fine, scales))
        assert found <= counted if last else found == counted
        # The halo holds them, and no cell more.
        assert decoder_halo(fine, scales) == -(-spoilt_by_decoder(fine, scales) // cell)
        assert pixel_decoder_halo(fine, scales) == -(-counted // cell)


# --------------------------------------------------------------------------------------------------
# The networks
# --------------------------------------------------------------------------------------------------

run_encode = jax.jit(encode, static_argnums=(1, 3))
run_decode = jax.jit(decode, static_argnums=(1, 3))
run_pixel_decode = jax.jit(pixel_decode, static_argnums=(1, 4))


@pytest.fixture(name="whole", scope="module")
def make_whole(random_params):
    """`whole(config, rows, columns)`: parameters, inputs of so many latent pixels, and the untiled results."""

    @functools.cache
    def whole(config, rows, columns):
        params = {
            "statistics": {"macro_mean": jnp.zeros(3), "macro_std": jnp.ones(3)},
            "coarse_encoder": random_params(Encoder, config.coarse, 0),
            "fine_encoder": random_params(Encoder, config.fine, 1),
            "fine_decoder": random_params(Decoder, config.fine, 2),
            "pixel_decoder": random_params(PixelDecoder, config, 3),
        }
        image = jax.random.uniform(jax.random.key(0), (1, 32 * rows, 32 * columns, 3), minval=-1.0)
        latent = jax.random.normal(jax.random.key(1), (1, rows, columns, 64))
        return params, image, latent, run_all(config, params, image, latent, None)

    return whole


def run_all(config, params, image, latent, tiling):
    return (
        run_encode(params, config, image, tiling),
        run_decode(params, config, latent, tiling),
        run_pixel_decode(params["pixel_decoder"], config, latent, image, tiling),
    )


@pytest.mark.parametrize(
    ("name", "rows", "columns", "tiles"),
    [
        ("tiny", 5, 7, [(8, 64, 96), (16, 32, 1024)]),
        ("small", 1, 17, [(32, 32, 32)]),
        ("paper", 3, 5, [(2, 50, 94), (4, 36, 44)]),
        ("paper", 11, 1, [(16, 64, 32)]),
        ("enlarging", 3, 5, [(4, 36, 60), (8, 8, 104)]),
    ],
)
def test_tiles_equal_the_whole(whole, name, rows, columns, tiles):
    params, image, latent, expected = whole(CONFIGS[name], rows, columns)
    assert all(np.abs(array).std() > 0.03 for array in expected)
    for cell, height, width in tiles:
        found = run_all(CONFIGS[name], params, image, latent, Tiling(cell, height, width))
        for result, whole_result in zip(found, expected, strict=True):
            np.testing.assert_allclose(result, whole_result, atol=1e-4, rtol=0)


def loops(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("scan[")


def test_both_encoders_run_in_tiles_where_their_pixels_are_smaller_than_a_cell(whole):
    config = CONFIGS["paper"]
    params, image, _, _ = whole(config, 3, 5)
    for cell, loops_of_fine, loops_of_coarse in ((1, 0, 0), (2, 1, 0), (4, 1, 0), (8, 1, 1), (32, 1, 1)):
        tiling = Tiling(cell, 32, 32)
        assert loops(lambda p, x, t=tiling: fine_moments(p, config, x, t), params, image) == loops_of_fine
        assert loops(lambda p, x, t=tiling: coarse_moments(p, config, x, t), params, image) == loops_of_coarse


def test_tilings_that_do_not_suit_are_refused(whole):
    config = CONFIGS["paper"]
    with pytest.raises(ValueError, match="cell 12 is not a power of two"):
        Tiling(12, 24, 24)
    with pytest.raises(ValueError, match="tile width 20 is not a multiple of the cell 8"):
        Tiling(8, 64, 20)
    with pytest.raises(ValueError, match="tile height 0 is not a multiple of the cell 8"):
        Tiling(8, 0, 24)
    params, image, latent, _ = whole(config, 3, 5)
    with pytest.raises(ValueError, match="cell 64 is larger than the 32 pixels of the lowest scale"):
        decode(params, config, latent, Tiling(64, 64, 64))
    with pytest.raises(ValueError, match="cell 64 is larger"):
        pixel_decode(params["pixel_decoder"], config, latent, image, Tiling(64, 64, 64))


def test_decoding_divided_by_height_equals_one_device():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    program = subprocess.run(
        [sys.executable, "-m", "tests.models.sharded_decode"], env=environment, capture_output=True, text=True
    )
    assert program.returncode == 0, program.stderr
    differences = [float(line) for line in program.stdout.split()]
    assert len(differences) == 6
    assert all(difference < 1e-4 for difference in differences)  # a NaN is not
