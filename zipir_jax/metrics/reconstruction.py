"""What autoencoders make of a picture that nothing was done to (paper supplement E: LP-VAE against SD-VAE)."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zipir_jax.imageio import to_float, to_uint8
from zipir_jax.metrics.scoring import Method
from zipir_jax.models import lp_vae, sd_vae
from zipir_jax.planner import refusing
from zipir_jax.weights import load_weights
from zipir_jax.weights.foreign import imported_config, load_imported

LP_VAE_GROUPS = ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")


def lp_vae_method(weights: Path | str) -> tuple[str, Method]:
    """(name, method) of the LP-VAE of a folder of weights: its latent, decoded by D_f, which sees nothing else.

    Raises ValueError for weights that cannot be read or lack a part, as those for restoring alone lack D_f.
    """
    config, groups = load_weights(weights, LP_VAE_GROUPS, LP_VAE_GROUPS)
    vae = config.lp_vae

    def reconstruct(params, image):
        return lp_vae.decode(params, vae, lp_vae.encode(params, vae, image))

    method = _method(reconstruct, jax.device_put(groups), vae.fine.factor)
    return f"LP-VAE f{vae.fine.factor}c{vae.fine.decoder_channels}", method


def sd_vae_method(folder: Path) -> tuple[str, Method]:
    """(name, method) of a folder that `prepare import-sd-vae` wrote; raises ValueError if it cannot be read."""
    name, _, config = imported_config(folder, "sd_vae")
    params = load_imported(folder, "sd_vae", config)

    def reconstruct(params, image):
        return sd_vae.decode(params, config, sd_vae.encode(params, config, image))

    return f"{name} f{config.factor}c{config.latent_channels}", _method(reconstruct, params, config.factor)


def _method(reconstruct: Callable, params: dict, factor: int) -> Method:
    run = jax.jit(lambda params, image: jnp.clip(reconstruct(params, image), -1, 1))

    def method(picture, size):
        padding = [(0, -side % factor) for side in size]
        image = np.pad(to_float(picture), [*padding, (0, 0)], "symmetric")
        too_large = (
            f"{size[1]} x {size[0]} pixels need more memory than there is: an autoencoder reconstructs a picture "
            "whole; choose smaller pictures"
        )
        with refusing(too_large):
            return to_uint8(np.asarray(run(params, image[None]))[0, : size[0], : size[1]])

    return method
