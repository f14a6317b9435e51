"""What the LP-VAE would cost if its fine band folded the image into patches before the first scale.

A patch of 2 or 4 pixels takes the place of the highest one or two scales. Width, blocks and the 32x smaller latent stay
the paper's. The decoder enlarges without unfolding what the patches hid, see docs/decisions.md. What a patch costs in
quality is another question: it takes a training to know.
"""

import dataclasses

import jax

from zipir_jax.config import MODELS, LPVAEConfig
from zipir_jax.measure.timing import cheap_params, check_repeats, median_seconds
from zipir_jax.models.flops import decoder_flops, encoder_flops, pixel_decoder_flops
from zipir_jax.models.layers import abstract_params, bind, count_params
from zipir_jax.models.lp_vae import FACTOR, Decoder, Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder

PATCHES = (1, 2, 4)  # pixels; the paper's is 1
FLOPS_SIZE = 2048  # pixels, side of the image whose FLOPs are counted


def with_patch(config: LPVAEConfig, patch: int) -> LPVAEConfig:
    """`config` with patches of `patch` pixels in the fine band in place of its log2(patch) highest scales."""
    multipliers = config.fine.multipliers[patch.bit_length() - 1 :]
    return dataclasses.replace(
        config, fine=dataclasses.replace(config.fine, patch=patch, multipliers=multipliers)
    )


def stem_costs(size: int, repeats: int) -> list[dict]:
    """A row for each patch and each of E_f, D_f and D_f*: FLOPs, parameters, seconds, and the ratios to patch 1.

    FLOPs are of one image of FLOPS_SIZE x FLOPS_SIZE pixels; seconds of one of `size` x `size`, with random weights, in
    float32 on a CPU, else in the config's compute dtype. Raises ValueError for a size that is not a multiple of 32 and
    for fewer than one repeat.
    """
    if size < FACTOR or size % FACTOR:
        raise ValueError(f"size {size} is not a multiple of {FACTOR}")
    check_repeats(repeats)
    rows = []
    for patch in PATCHES:
        lp_vae = with_patch(MODELS["paper"].lp_vae, patch)
        dtype = "float32" if jax.default_backend() == "cpu" else lp_vae.fine.compute_dtype
        lp_vae = dataclasses.replace(lp_vae, fine=dataclasses.replace(lp_vae.fine, compute_dtype=dtype))
        # Not constant: a GPU computes faster where few bits change.
        image = jax.random.uniform(jax.random.key(0), (1, size, size, 3), minval=-1)
        shape = 1, size // FACTOR, size // FACTOR, lp_vae.fine.decoder_channels
        latent = jax.random.normal(jax.random.key(1), shape)
        networks = {
            "E_f": (encoder_flops, Encoder, lp_vae.fine, (image,)),
            "D_f": (decoder_flops, Decoder, lp_vae.fine, (latent,)),
            "D_f*": (pixel_decoder_flops, PixelDecoder, lp_vae, (latent, image)),
        }
        for name, (flops, module_class, config, inputs) in networks.items():
            row = {"patch": patch, "network": name, "flops": flops(config, FLOPS_SIZE, FLOPS_SIZE)}
            row["parameters"] = count_params(abstract_params(module_class, config))
            row["seconds"] = _seconds(module_class, config, dtype, inputs, repeats)
            reference = rows[len(rows) % len(networks)] if patch != PATCHES[0] else row
            row["flops_ratio"] = row["flops"] / reference["flops"]
            row["seconds_ratio"] = row["seconds"] / reference["seconds"]
            rows.append(row)
    return rows


def _seconds(module_class, config, dtype, inputs, repeats):
    params = cheap_params(module_class, config, dtype)
    forward = jax.jit(lambda params, *inputs: bind(module_class, config, params)(*inputs))
    return median_seconds(lambda: jax.block_until_ready(forward(params, *inputs)), repeats)
