"""Counts by hand against XLA's.

XLA leaves out what a convolution pays for its padding, and adds an operation for each element that a norm, an
activation or a resizing touches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from zipir_jax.config import MODELS, DiscriminatorConfig
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.dit import DiT
from zipir_jax.models.flops import (
    conv_flops,
    decoder_flops,
    decoder_head_flops,
    discriminator_flops,
    dit_flops,
    dit_read_flops,
    dit_step_flops,
    encode_flops,
    encoder_flops,
    peak_flops,
    pixel_decoder_flops,
)
from zipir_jax.models.layers import abstract_params, bind
from zipir_jax.models.lp_vae import Decoder, Encoder, encode
from zipir_jax.models.pixel_decoder import PixelDecoder

PAPER = MODELS["paper"].lp_vae
# The width of the paper with the switches of the small model. That itself is so narrow that what goes by element is
# 2 % of XLA's count.
FOLDED = dataclasses.replace(
    PAPER,
    coarse=dataclasses.replace(PAPER.coarse, patch=2, multipliers=(1, 2, 3), unfold=True, pixel_channels=48),
    fine=dataclasses.replace(
        PAPER.fine, patch=4, multipliers=(1, 1, 2, 3), blocks_per_scale=1, unfold=True, pixel_channels=48
    ),
)


def image(height, width, channels=3):
    return jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)


def xla_flops(module_class, config, *inputs):
    """Of the program as it is handed to the compiler, which may count otherwise what it rewrites."""
    params = abstract_params(module_class, config)
    forward = jax.jit(lambda params, *inputs: bind(module_class, config, params)(*inputs))
    return forward.lower(params, *inputs).cost_analysis()["flops"]


@pytest.mark.parametrize("config", [PAPER, FOLDED], ids=["paper", "folded"])
def test_the_lp_vae_costs_what_xla_counts(config):
    height, width = 2048, 1536
    photo = image(height, width)
    for band in (config.coarse, config.fine):
        latent = image(height // band.factor, width // band.factor, band.decoder_channels)
        assert encoder_flops(band, height, width) == pytest.approx(xla_flops(Encoder, band, photo), rel=0.004)
        # Three of four products of folded convolutions are by zeros, which are no work of the network's.
        zeros = 3 * decoder_head_flops(band, height, width) if band.patch > 1 else 0
        counted = xla_flops(Decoder, band, latent) - zeros
        assert decoder_flops(band, height, width) == pytest.approx(counted, rel=0.005)
    if config is FOLDED:  # of the pixels that enter, too
        zeros += 3 * sum(conv_flops(3, 3, 48 * 2**i, height * width // 4**i) for i in (0, 1))
    counted = xla_flops(PixelDecoder, config, latent, photo) - zeros
    assert pixel_decoder_flops(config, height, width) == pytest.approx(counted, rel=0.004)


def test_encoding_runs_both_encoders():
    params = {
        "statistics": {name: jnp.ones(3) for name in ("macro_mean", "macro_std")},
        "coarse_encoder": abstract_params(Encoder, PAPER.coarse),
        "fine_encoder": abstract_params(Encoder, PAPER.fine),
    }
    program = jax.jit(lambda params, image: encode(params, PAPER, image)).lower(params, image(1024, 1024))
    assert encode_flops(PAPER, 1024, 1024) == pytest.approx(program.cost_analysis()["flops"], rel=0.004)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_discriminator_costs_what_xla_counts(layers):
    config = DiscriminatorConfig(layers=layers)
    counted = xla_flops(PatchDiscriminator, config, image(1024, 512))
    assert discriminator_flops(config, 1024, 512) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("model", "changes", "text_tokens"),
    [
        ("paper", {"text_width": 0}, 0),
        ("paper", {}, 300),
        ("paper", {"lq_attention": "static"}, 300),
        ("paper", {"bias": True, "mlp_ratio": 2}, 20),
        ("dit_0p68b", {}, 0),
        ("dit_0p68b", {"lq_attention": "static"}, 0),
        ("dit_0p68b", {"patch": 2, "latent_channels": 16}, 0),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48)])
def test_the_dit_costs_what_xla_counts(monkeypatch, model, changes, text_tokens, height, width):
    # XLA counts the body of a scan once, so the layers are unrolled, and attention takes all queries at once. What the
    # last layer makes of static LQ tokens nobody reads: a scan makes it all the same, and here the barrier wants it.
    scan = functools.partial(jax.lax.scan, unroll=True)
    monkeypatch.setattr(jax.lax, "scan", lambda *args: jax.lax.optimization_barrier(scan(*args)))
    monkeypatch.setattr("zipir_jax.models.attention.LARGEST_LOGITS", 2**40)
    config = dataclasses.replace(MODELS[model].dit, layers=3, **changes)
    latent = image(height, width, config.latent_channels)
    timesteps = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = {}
    if config.text_width:
        text["text"] = jax.ShapeDtypeStruct((1, text_tokens, config.text_width), jnp.float32)
    params = abstract_params(DiT, config)

    def counted(method, *inputs, **kwargs):
        program = jax.jit(lambda p, *args, **kwargs: method(bind(DiT, config, p), *args, **kwargs))
        return program.lower(params, *inputs, **kwargs).cost_analysis()["flops"]

    # The softmax goes by element: the narrower the heads, the larger its share.
    size = (height, width, text_tokens)
    training = counted(DiT.__call__, latent, timesteps, latent, **text)
    assert dit_flops(config, *size) == pytest.approx(training, rel=0.01)
    condition = jax.eval_shape(
        lambda p, lq, **text: bind(DiT, config, p).read(lq, **text), params, latent, **text
    )
    step = counted(DiT.denoise, latent, timesteps, condition)
    assert dit_step_flops(config, *size) == pytest.approx(step, rel=0.01)
    # Where there is little to read, the casts of the kernels, which XLA counts, are a share of it.
    if text_tokens > 100 or config.lq_attention == "static":
        reading = counted(DiT.read, latent, **text)
        assert dit_read_flops(config, *size) == pytest.approx(reading, rel=0.01)


def test_the_papers_networks_cost_what_is_known():
    """In units of TFLOP: the paper's DiT takes 250 ms at 2048 px on an A100, whose peak is 312 TFLOP/s."""
    dit = MODELS["paper"].dit
    known = {1024: 8.4, 2048: 43.4, 4096: 332}
    for side, flops in known.items():
        assert dit_flops(dit, side // 32, side // 32, 256) / 1e12 == pytest.approx(flops, rel=0.02)
    static = dataclasses.replace(dit, lq_attention="static")
    for side, flops in {1024: 4.3, 2048: 21.6, 4096: 166, 8192: 1930}.items():
        assert dit_step_flops(static, side // 32, side // 32, 256) / 1e12 == pytest.approx(flops, rel=0.03)
    assert 0.4 < dit_flops(dit, 64, 64, 256) / 0.25 / peak_flops("NVIDIA A100-SXM4-80GB") < 0.6
    assert encoder_flops(PAPER.fine, 2048, 2048) / 1e12 == pytest.approx(16.5, rel=0.01)
    assert decoder_flops(PAPER.fine, 2048, 2048) / 1e12 == pytest.approx(31, rel=0.01)
    # E_c has the first four of E_f's six scales, on a sixteenth of the pixels.
    assert encoder_flops(PAPER.coarse, 512, 512) / 1e12 == pytest.approx(1.0, rel=0.01)


def test_sides_that_the_networks_refuse_are_refused():
    with pytest.raises(ValueError, match="height 333 is not a multiple of 32"):
        encoder_flops(PAPER.fine, 333, 512)
    with pytest.raises(ValueError, match="width 100 is not a multiple of 8"):
        decoder_flops(PAPER.coarse, 96, 100)
    with pytest.raises(ValueError, match="latent width 31 is not a multiple of the patch 2"):
        dit_flops(dataclasses.replace(MODELS["paper"].dit, patch=2), 32, 31)


def test_peaks_are_those_of_dense_products_and_unknown_ones_stay_unknown():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None
