"""Costs counted by hand against XLA's reports, without the library whose memory these leave out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from zipir_jax.config import MODELS, LPVAEConfig
from zipir_jax.models.flops import encode_flops
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.lp_vae import Decoder, Encoder, decode, encode
from zipir_jax.models.memory import (
    choose_tiling,
    decode_cost,
    encode_cost,
    pixel_decode_cost,
    resident_bytes,
)
from zipir_jax.models.pixel_decoder import PixelDecoder, pixel_decode
from zipir_jax.models.tiling import Tiling

SMALL, PAPER = MODELS["small"].lp_vae, MODELS["paper"].lp_vae
COSTS = encode_cost, decode_cost, pixel_decode_cost


def thin(dtype):
    """The paper's, a quarter as wide: weights would show beside the images of a test."""
    bands = {
        name: dataclasses.replace(getattr(PAPER, name), base_channels=32, compute_dtype=dtype)
        for name in ("coarse", "fine")
    }
    return LPVAEConfig(**bands)


def reported(cost, config, side, tiling):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, side // 32, side // 32, 64), jnp.float32)
    if cost is pixel_decode_cost:
        arguments = abstract_params(PixelDecoder, config), latent, image
        program = jax.jit(lambda params, latent, lq: pixel_decode(params, config, latent, lq, tiling))
    elif cost is decode_cost:
        arguments = {"fine_decoder": abstract_params(Decoder, config.fine)}, latent
        program = jax.jit(lambda params, latent: decode(params, config, latent, tiling))
    else:
        statistics = {name: jax.ShapeDtypeStruct((3,), jnp.float32) for name in ("macro_mean", "macro_std")}
        params = {
            "statistics": statistics,
            "coarse_encoder": abstract_params(Encoder, config.coarse),
            "fine_encoder": abstract_params(Encoder, config.fine),
        }
        arguments = params, image
        program = jax.jit(lambda params, image: encode(params, config, image, tiling))
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    compiled = program.lower(*arguments).compile(compiler_options=options)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("config", "cost", "side", "tiling"),
    [
        (SMALL, encode_cost, 1024, None),
        (SMALL, encode_cost, 2048, Tiling(8, 512, 512)),
        (SMALL, decode_cost, 1024, Tiling(16, 256, 256)),
        (SMALL, pixel_decode_cost, 1024, None),
        (SMALL, pixel_decode_cost, 2048, Tiling(8, 512, 1024)),
        (thin("float32"), encode_cost, 1024, Tiling(4, 256, 512)),
        (thin("float32"), decode_cost, 512, None),
        (thin("float32"), pixel_decode_cost, 1024, Tiling(8, 256, 256)),
        (thin("bfloat16"), encode_cost, 1024, Tiling(8, 256, 256)),
        (thin("bfloat16"), pixel_decode_cost, 1024, Tiling(4, 256, 256)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_bytes_are_those_that_xla_reports(config, cost, side, tiling):
    ratio = cost(config, side, side, tiling).temporaries / reported(cost, config, side, tiling)
    assert 0.9 < ratio < 1.25


def test_work_without_tiles_is_that_of_the_networks_and_halos_add_to_it():
    # The last convolutions of the encoders are left out.
    untiled = encode_cost(PAPER, 2048, 1024).flops
    assert untiled == pytest.approx(encode_flops(PAPER, 2048, 1024), rel=0.001)
    for cost in COSTS:
        works = [
            cost(PAPER, 2048, 2048, tiling).flops
            for tiling in (None, Tiling(4, 1024, 1024), Tiling(4, 256, 256), Tiling(16, 256, 256))
        ]
        assert works == sorted(works) and works[0] < works[1]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.__name__)
@pytest.mark.parametrize("config", [SMALL, PAPER], ids=["small", "paper"])
def test_the_smaller_the_budget_the_more_work(config, cost):
    height, width = 4096, 6144
    whole, works = cost(config, height, width, None, "gpu"), []
    for gibibytes in (500, 32, 16):
        tiling = choose_tiling(cost, config, height, width, gibibytes * 2**30, "gpu")
        chosen = cost(config, height, width, tiling, "gpu")
        assert resident_bytes(chosen, "gpu") <= gibibytes * 2**30
        works.append(chosen.flops)
        assert (tiling is None) == (chosen.flops == whole.flops)
        assert chosen.largest < 2**31
    assert works == sorted(works)


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: cost.__name__)
def test_where_arrays_are_too_large_for_an_accelerators_convolutions_memory_does_not_help(cost):
    """1024 x 2048 pixels at full resolution in at least 128 channels have 2^28 elements, and so on."""
    assert 2**28 <= cost(PAPER, 1024, 2048).largest <= 2**29
    assert cost(PAPER, 4096, 8192).largest == 16 * cost(PAPER, 1024, 2048).largest
    assert choose_tiling(cost, PAPER, 4096, 8192, 2**50, "gpu") is not None
    assert choose_tiling(cost, PAPER, 4096, 8192, 2**50, "cpu") is None


def test_no_tile_tried_that_fits_is_less_work():
    height, width, budget = 1024, 2048, 2**28
    chosen = pixel_decode_cost(
        SMALL, height, width, choose_tiling(pixel_decode_cost, SMALL, height, width, budget)
    )
    for cell in (8, 16, 32):
        for rows in (128, 256, 512, 1024):
            for columns in (128, 256, 512, 1024, 2048):
                other = pixel_decode_cost(SMALL, height, width, Tiling(cell, rows, columns))
                assert resident_bytes(other) > budget or other.flops >= chosen.flops * 0.95


def test_where_no_tiling_fits_the_one_that_needs_least_is_chosen():
    needs = {}
    for budget in (2**20, 2**21):
        tiling = choose_tiling(decode_cost, PAPER, 8192, 8192, budget)
        needs[tiling] = resident_bytes(decode_cost(PAPER, 8192, 8192, tiling))
    (least,) = needs.values()
    for cell in (2, 8, 32):
        assert least <= resident_bytes(decode_cost(PAPER, 8192, 8192, Tiling(cell, 128, 128)))
