import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import MODELS, AutoencoderConfig, LPVAEConfig
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import abstract_params, bind, count_params
from zipir_jax.models.lp_vae import (
    Decoder,
    Encoder,
    decode,
    encode,
    from_diffused,
    macro_band,
    sample_posterior,
    to_diffused,
    unwhiten,
    whiten,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
PAPER = MODELS["paper"].lp_vae
STATISTICS = {
    "macro_mean": jnp.array([0.1, -0.2, 0.3]),
    "macro_std": jnp.array([0.5, 0.4, 0.8]),
    "latent_mean": jnp.linspace(-1, 1, 64),
    "latent_std": jnp.linspace(0.3, 3, 64),
}


def tiny_band(latent_channels, decoder_channels, scales, patch, unfold=False):
    return AutoencoderConfig(
        latent_channels=latent_channels,
        decoder_channels=decoder_channels,
        base_channels=4,
        multipliers=(1,) * scales,
        blocks_per_scale=1,
        patch=patch,
        unfold=unfold,
        pixel_channels=4,
        compute_dtype="float32",
    )


# The paper's stem and upsampling, and those of the default weights.
PLAIN = LPVAEConfig(coarse=tiny_band(9, 12, 4, 1), fine=tiny_band(52, 64, 6, 1))
PATCHED = LPVAEConfig(coarse=tiny_band(9, 12, 3, 2, unfold=True), fine=tiny_band(52, 64, 4, 4, unfold=True))
BOTH = pytest.mark.parametrize("config", [PLAIN, PATCHED], ids=["plain", "patched"])
BOTH_SIDES = pytest.mark.parametrize(("config", "axis"), [(PLAIN, 2), (PATCHED, 1)], ids=["plain", "patched"])


@pytest.fixture(name="make_params", scope="module")
def make_make_params(random_params):
    """`make_params(config)`: all groups of an LP-VAE, random."""
    return lambda config: {
        "statistics": STATISTICS,
        "coarse_encoder": random_params(Encoder, config.coarse, 0),
        "coarse_decoder": random_params(Decoder, config.coarse, 1),
        "fine_encoder": random_params(Encoder, config.fine, 2),
        "fine_decoder": random_params(Decoder, config.fine, 3),
    }


jitted_encode = jax.jit(encode, static_argnums=1)
jitted_decode = jax.jit(decode, static_argnums=1)


def random_image(height, width, seed=0, batch=1):
    return jax.random.uniform(jax.random.key(seed), (batch, height, width, 3), minval=-1.0)


def abstract_lp_vae(config):
    statistics = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), STATISTICS)
    return {
        "statistics": statistics,
        "coarse_encoder": abstract_params(Encoder, config.coarse),
        "coarse_decoder": abstract_params(Decoder, config.coarse),
        "fine_encoder": abstract_params(Encoder, config.fine),
        "fine_decoder": abstract_params(Decoder, config.fine),
    }


# --------------------------------------------------------------------------------------------------
# Which inputs one output sees, computed from the layers: intervals of indices, last layer first
# --------------------------------------------------------------------------------------------------


def encoder_reads(config, low, high):
    """First and last pixel that latents `low` to `high` of an encoder read, along one side."""
    low, high = low - 1, high + 1  # head
    for scale in reversed(range(len(config.multipliers))):
        low, high = low - 2 * config.blocks_per_scale, high + 2 * config.blocks_per_scale
        if scale:
            low, high = 2 * low - 1, 2 * high + 1  # strided 3x3 convolution
    low, high = low - 1, high + 1  # stem
    return low * config.patch, high * config.patch + config.patch - 1


def decoder_reads(config, low, high):
    """First and last latent that pixels `low` to `high` of a decoder read, along one side."""
    low, high = low - 1, high + 1  # last convolution
    for _ in range(config.patch.bit_length() - 1):
        low, high = enlarged_reads(low, high)
    for scale in reversed(range(len(config.multipliers))):
        low, high = low - 2 * config.blocks_per_scale, high + 2 * config.blocks_per_scale
        if scale and config.unfold:
            low, high = (low - 1) // 2, (high + 1) // 2  # bilinear, from the two nearest pixels
        elif scale:
            low, high = enlarged_reads(low, high)
    return low - 1, high + 1  # stem


def enlarged_reads(low, high):
    """What a 3x3 convolution after bilinear doubling reads: pixel i of a doubled line lies between i - 1 and i + 1
    halves."""
    return (low - 2) // 2, (high + 2) // 2


def lp_vae_reads(config, low, high):
    """First and last pixel that all bands of latents `low` to `high` read."""
    coarse_low, coarse_high = encoder_reads(config.coarse, low, high)
    fine_low, fine_high = encoder_reads(config.fine, low, high)
    return min(4 * coarse_low, fine_low), max(4 * coarse_high + 3, fine_high)


def touched(array, axis):
    """First and last index along `axis` at which an array is not exactly zero."""
    others = tuple(i for i in range(array.ndim) if i != axis)
    indices = np.nonzero(np.any(np.asarray(array) != 0, others))[0]
    return indices.min(), indices.max()


# --------------------------------------------------------------------------------------------------
# The paper's sizes
# --------------------------------------------------------------------------------------------------


def test_the_paper_dit_has_the_published_number_of_parameters():
    assert abs(count_params(abstract_params(DiT, MODELS["paper"].dit)) / 3.12e9 - 1) < 0.01
    assert abs(count_params(abstract_params(DiT, MODELS["dit_0p68b"].dit)) / 0.675e9 - 1) < 0.02


def test_the_paper_bands_have_the_published_shapes():
    params = abstract_lp_vae(PAPER)
    multipliers = {"coarse": (1, 2, 4, 4), "fine": (1, 2, 4, 4, 4, 4)}
    channels = {"coarse": (9, 12), "fine": (52, 64)}
    for band, scales in multipliers.items():
        encoder, decoder = params[f"{band}_encoder"], params[f"{band}_decoder"]
        widths = [128 * m for m in scales for _ in range(2)]  # two residual blocks a scale
        own, read = channels[band]

        def block_widths(network):
            return [network["blocks"][str(i)]["conv2"]["kernel"].shape for i in range(len(network["blocks"]))]

        assert block_widths(encoder) == [(3, 3, w, w) for w in widths]
        assert block_widths(decoder) == [(3, 3, w, w) for w in widths[::-1]]
        assert len(encoder["downs"]) == len(decoder["ups"]) == len(scales) - 1
        assert encoder["stem"]["kernel"].shape == (3, 3, 3, 128)
        assert encoder["head"]["kernel"].shape == (3, 3, 512, 2 * own)  # mean and log variance
        assert decoder["stem"]["kernel"].shape == (3, 3, read, 512)
        assert decoder["head_conv"]["kernel"].shape == (3, 3, 128, 3)


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_32_times_smaller_with_64_channels(name):
    config = MODELS[name].lp_vae
    params = abstract_lp_vae(config)
    image = jax.ShapeDtypeStruct((2, 96, 160, 3), jnp.float32)
    latent = jax.eval_shape(lambda params, image: encode(params, config, image), params, image)
    assert (latent.shape, latent.dtype) == ((2, 3, 5, 64), jnp.float32)
    restored = jax.eval_shape(lambda params, latent: decode(params, config, latent), params, latent)
    assert (restored.shape, restored.dtype) == (image.shape, jnp.float32)
    assert MODELS[name].dit.latent_channels == 64


# --------------------------------------------------------------------------------------------------
# Bands
# --------------------------------------------------------------------------------------------------


def test_the_macro_band_is_the_normalised_mean_of_each_block():
    image = random_image(64, 96, batch=2)
    macro = macro_band(image, STATISTICS)
    assert macro.shape == (2, 2, 3, 3)
    means = np.asarray(image, np.float64)[1, 32:64, 64:96].mean((0, 1))
    expected = (means - np.asarray(STATISTICS["macro_mean"])) / np.asarray(STATISTICS["macro_std"])
    np.testing.assert_allclose(macro[1, 1, 2], expected, atol=1e-6)


def test_the_bands_stand_in_the_order_macro_coarse_fine(make_params):
    params, image = make_params(PATCHED), random_image(32, 64)
    latent = jitted_encode(params, PATCHED, image)
    assert latent.shape == (1, 1, 2, 64)
    np.testing.assert_allclose(latent[..., :3], macro_band(image, STATISTICS), atol=1e-6)
    for group, band in (("coarse_encoder", slice(3, 12)), ("fine_encoder", slice(12, 64))):
        other = params | {group: jax.tree.map(lambda p: p + 0.1, params[group])}
        changed = np.asarray(jitted_encode(other, PATCHED, image) != latent).all((0, 1, 2))
        assert changed[band].all()
        assert changed.sum() == changed[band].size


def test_the_coarse_band_sees_only_the_four_times_smaller_image(make_params):
    params, image = make_params(PATCHED), random_image(32, 32)
    checker = jnp.tile(jnp.array([[0.3, -0.3], [-0.3, 0.3]]), (16, 16))[
        None, :, :, None
    ]  # mean 0 in any 4 x 4
    difference = jitted_encode(params, PATCHED, image + checker) - jitted_encode(params, PATCHED, image)
    assert np.abs(difference[..., :12]).max() < 1e-5
    assert np.abs(difference[..., 12:]).max() > 1e-2


@BOTH
def test_sizes_that_are_no_multiple_of_32_are_refused(config):
    abstract = abstract_lp_vae(config)
    for (height, width), message in (
        ((96, 100), "width 100 is not a multiple of 32"),
        ((80, 96), "height 80 is not a multiple of 32"),
    ):
        image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda params, image: encode(params, config, image), abstract, image)


@pytest.mark.parametrize("field", ["coarse", "fine"])
def test_a_band_with_another_factor_is_refused(field):
    band = dataclasses.replace(getattr(PAPER, field), patch=2)
    message = f"the {field} band's patch 2 and {len(band.multipliers)} scales shrink {band.factor}x"
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(PAPER, **{field: band})


def test_the_patched_stem_folds_pixels_and_ends_at_full_resolution():
    encoder, decoder = (abstract_params(network, PATCHED.fine) for network in (Encoder, Decoder))
    assert encoder["stem"]["kernel"].shape == (3, 3, 3 * 4**2, 4)
    shapes = [layer["kernel"].shape for layer in decoder["enlarge"].values()]
    assert shapes == [(3, 3, 4, 8), (3, 3, 8, 4)]
    assert decoder["head_conv"]["kernel"].shape == (3, 3, 4, 3)
    assert not abstract_params(Decoder, PLAIN.fine).get("enlarge")
    features = jax.eval_shape(
        lambda params, latent: bind(Decoder, PATCHED.fine, params).features(latent),
        decoder,
        jax.ShapeDtypeStruct((1, 2, 3, 64), jnp.float32),
    )
    assert features.shape == (1, 32, 48, 4 * 4)  # 2 x 2 pixels folded


def test_encoder_features_end_each_scale():
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)

    def shapes(config):
        params = abstract_params(Encoder, config)
        features = jax.eval_shape(lambda p, image: bind(Encoder, config, p).features(image), params, image)
        return [feature.shape[1:] for feature in features]

    assert shapes(PAPER.fine) == [
        (64, 96, 128),
        (32, 48, 256),
        (16, 24, 512),
        (8, 12, 512),
        (4, 6, 512),
        (2, 3, 512),
    ]
    assert shapes(PATCHED.fine) == [(16, 24, 4), (8, 12, 4), (4, 6, 4), (2, 3, 4)]


def test_half_precision_stays_inside_the_networks(make_params):
    config = LPVAEConfig(
        coarse=dataclasses.replace(PATCHED.coarse, compute_dtype="bfloat16"),
        fine=dataclasses.replace(PATCHED.fine, compute_dtype="bfloat16"),
    )
    params, image = make_params(PATCHED), random_image(32, 64)
    half, full = jitted_encode(params, config, image), jitted_encode(params, PATCHED, image)
    assert half.dtype == jitted_decode(params, config, half).dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.2)
    assert np.abs(half - full).max() > 1e-4  # it was indeed computed in half precision
    np.testing.assert_array_equal(half[..., :3], full[..., :3])  # the macro band has no network


# --------------------------------------------------------------------------------------------------
# Strict locality: what tiling, streaming and spatial sharding rest on
# --------------------------------------------------------------------------------------------------


@BOTH_SIDES
def test_a_latent_sees_exactly_its_receptive_field(config, axis, make_params):
    low, high = lp_vae_reads(config, 0, 0)
    latents = 2 * (-low // 32 + 1) + 1
    middle = latents // 2
    low, high = low + 32 * middle, high + 32 * middle
    assert 0 < low < high < 32 * latents - 1  # both ends lie inside the picture
    image = random_image(*((32 * latents, 32) if axis == 1 else (32, 32 * latents)))

    @jax.jit
    @functools.partial(jax.grad, argnums=1)
    def gradient(params, image):
        return jnp.take(encode(params, config, image), middle, axis).sum()

    assert touched(gradient(make_params(config), image), axis) == (low, high)


@BOTH_SIDES
def test_a_pixel_sees_exactly_its_receptive_field_of_latents(config, axis, make_params):
    latents, pixel = 25, 32 * 12 + 13
    low, high = decoder_reads(config.fine, pixel, pixel)
    assert 0 < low < high < latents - 1
    shape = (1, latents, 1, 64) if axis == 1 else (1, 1, latents, 64)
    latent = jax.random.normal(jax.random.key(1), shape)

    @jax.jit
    @functools.partial(jax.grad, argnums=1)
    def gradient(params, latent):
        return jnp.take(decode(params, config, latent), pixel, axis).sum()

    assert touched(gradient(make_params(config), latent), axis) == (low, high)


@BOTH
def test_one_changed_pixel_changes_only_what_sees_it(config, make_params):
    image = random_image(32, 32 * 40)
    column = 32 * 20 + 5

    def reconstruct(image):
        latent = jitted_encode(make_params(config), config, image)
        return latent, jitted_decode(make_params(config), config, latent)

    before, after = reconstruct(image), reconstruct(image.at[:, 7, column].add(-1.0))
    latent_low, latent_high = touched(after[0] - before[0], 2)
    fields = [lp_vae_reads(config, i, i) for i in range(40)]
    seeing = [i for i, (low, high) in enumerate(fields) if low <= column <= high]
    assert seeing[0] <= latent_low <= 20 <= latent_high <= seeing[-1]
    assert 0 < seeing[0] < seeing[-1] < 39
    pixel_low, pixel_high = touched(after[1] - before[1], 2)
    assert decoder_reads(config.fine, pixel_low, pixel_low)[1] >= seeing[0]
    assert decoder_reads(config.fine, pixel_high, pixel_high)[0] <= seeing[-1]
    assert pixel_low <= column <= pixel_high


@BOTH
def test_a_tile_with_its_halo_has_the_latents_and_pixels_of_the_whole(config, make_params):
    params, image = make_params(config), random_image(32, 32 * 40)
    latent = jitted_encode(params, config, image)
    low, high = lp_vae_reads(config, 20, 21)
    first, last = low // 32, high // 32 + 1
    tile = jitted_encode(params, config, image[:, :, 32 * first : 32 * last])
    np.testing.assert_allclose(tile[:, :, 20 - first : 22 - first], latent[:, :, 20:22], atol=1e-5)

    restored = jitted_decode(params, config, latent)
    low, high = decoder_reads(config.fine, 32 * 20, 32 * 22 - 1)
    tile = jitted_decode(params, config, latent[:, :, low : high + 1])
    inner = tile[:, :, 32 * (20 - low) : 32 * (22 - low)]
    np.testing.assert_allclose(inner, restored[:, :, 32 * 20 : 32 * 22], atol=1e-5)
    assert np.abs(restored).max() > 0.01


@BOTH
def test_shifting_the_image_by_32_pixels_shifts_the_latent_by_one(config, make_params):
    params, image = make_params(config), random_image(32, 32 * 40)
    latent = jitted_encode(params, config, image)
    shifted = jitted_encode(params, config, jnp.roll(image, 32, 2))
    low, high = lp_vae_reads(config, 0, 1)
    inner = np.arange(
        -low // 32 + 1, 40 - high // 32
    )  # latents that see no border, before and after the shift
    assert len(inner) > 4
    np.testing.assert_allclose(shifted[:, :, inner + 1], latent[:, :, inner], atol=1e-5)
    assert np.abs(shifted[:, :, inner] - latent[:, :, inner]).max() > 0.01


# --------------------------------------------------------------------------------------------------
# The latent as a random variable
# --------------------------------------------------------------------------------------------------


def test_whitening_gives_unit_latents_and_can_be_undone():
    noise = jax.random.normal(jax.random.key(0), (4, 16, 16, 64))
    latent = noise * STATISTICS["latent_std"] + STATISTICS["latent_mean"]
    white = whiten(latent, STATISTICS)
    np.testing.assert_allclose(white, noise, atol=1e-5)
    np.testing.assert_allclose(unwhiten(white, STATISTICS), latent, atol=1e-5)


def test_what_is_diffused_is_the_latent_or_its_difference_from_the_lq_latent():
    latent, lq = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 64))
    np.testing.assert_array_equal(to_diffused(latent, lq, STATISTICS), latent)
    np.testing.assert_array_equal(from_diffused(latent, lq, STATISTICS), latent)
    statistics = STATISTICS | {"residual_std": jnp.linspace(0.1, 2, 64)}
    diffused = to_diffused(latent, lq, statistics)
    np.testing.assert_allclose(diffused[..., 0], (latent - lq)[..., 0] / 0.1, rtol=1e-5)
    np.testing.assert_allclose(from_diffused(diffused, lq, statistics), latent, atol=1e-5)


def test_draws_of_the_posterior_have_its_mean_and_variance():
    mean = jnp.broadcast_to(jnp.array([-1.0, 0.0, 2.0]), (1, 100, 100, 3))
    log_variance = jnp.broadcast_to(jnp.log(jnp.array([0.25, 1.0, 4.0])), mean.shape)
    draws = sample_posterior(jax.random.key(0), mean, log_variance)
    np.testing.assert_allclose(draws.mean((0, 1, 2)), [-1, 0, 2], atol=0.08)
    np.testing.assert_allclose(draws.std((0, 1, 2)), [0.5, 1, 2], rtol=0.03)


def test_the_log_variance_is_clipped_to_what_float32_can_hold(make_params):
    params = make_params(PATCHED)["coarse_encoder"]
    head = params["head"] | {"bias": np.array([0] * 9 + [1e4] * 4 + [-1e4] * 5, np.float32)}
    encode_band = jax.jit(bind(Encoder, PATCHED.coarse, params | {"head": head}).__call__)
    mean, log_variance = encode_band(random_image(8, 8))
    assert mean.shape == log_variance.shape == (1, 1, 1, 9)
    np.testing.assert_array_equal(log_variance[0, 0, 0], [20] * 4 + [-30] * 5)
