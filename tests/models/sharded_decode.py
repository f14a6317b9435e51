"""Decodes on four devices that divide the height, and on one; prints how far the results lie apart.

    python tests/models/sharded_decode.py

Four virtual devices of the CPU; a process of its own, since their number is fixed when jax starts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from zipir_jax import parallel
from zipir_jax.config import AutoencoderConfig, LPVAEConfig, MeshConfig
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.lp_vae import Decoder, decode
from zipir_jax.models.pixel_decoder import PixelDecoder, pixel_decode
from zipir_jax.models.tiling import Tiling


def band(latent_channels, decoder_channels, scales, patch, unfold):
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


def random_params(module_class, config):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: generator.normal(0, 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1]))), leaf.shape).astype(
            np.float32
        ),
        abstract_params(module_class, config),
    )


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    mesh = parallel.make_mesh(MeshConfig(tensor=4))
    coarse = band(9, 12, 3, 2, True)
    plain = LPVAEConfig(coarse=coarse, fine=band(52, 64, 5, 2, False))
    unfolding = LPVAEConfig(coarse=coarse, fine=band(52, 64, 4, 4, True))

    def run(config, rows, columns, tiling):
        def both(params, latent, lq):
            latent, lq = (parallel.constrain(x, "batch", "height") for x in (latent, lq))
            return (
                decode(params, config, latent, tiling),
                pixel_decode(params["pixel_decoder"], config, latent, lq, tiling),
            )

        params = {
            "fine_decoder": random_params(Decoder, config.fine),
            "pixel_decoder": random_params(PixelDecoder, config),
        }
        latent = np.asarray(jax.random.normal(jax.random.key(0), (1, rows, columns, 64)))
        lq = np.asarray(jax.random.uniform(jax.random.key(1), (1, 32 * rows, 32 * columns, 3), minval=-1.0))
        expected = jax.jit(both)(params, latent, lq)
        with jax.set_mesh(mesh):
            whole = parallel.put((params, latent, lq), parallel.replicated(mesh))
            found = jax.jit(both)(*whole)
        for one, many in zip(expected, found, strict=True):
            assert rows % 4 or many.sharding.spec[1] == "tensor"
            assert jnp.abs(one).std() > 0.01
            print(float(np.abs(np.asarray(one) - np.asarray(many)).max()))

    run(plain, 4, 1, None)  # one latent row a device
    run(unfolding, 7, 1, None)  # the last device has less
    run(unfolding, 4, 7, Tiling(8, 128, 32))  # tiles beside one another, each divided by height


if __name__ == "__main__":
    main()
