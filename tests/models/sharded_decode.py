"""Decodes on four devices that divide the height, and on one; prints how far the results lie apart.

That each of the four holds less is asserted.

    python -m tests.models.sharded_decode

Four virtual devices of the CPU; a process of its own, since their number is fixed when jax starts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import random_params
from tests.models.test_tiling import lp_vae
from zipir_jax import parallel
from zipir_jax.config import MeshConfig
from zipir_jax.models.lp_vae import Decoder, decode
from zipir_jax.models.pixel_decoder import PixelDecoder, pixel_decode
from zipir_jax.models.tiling import Tiling


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    mesh = parallel.make_mesh(MeshConfig(tensor=4))

    def run(config, rows, columns, tiling, share):
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
        on_one = jax.jit(both).lower(params, latent, lq).compile()
        expected = on_one(params, latent, lq)
        with jax.set_mesh(mesh):
            whole = parallel.put((params, latent, lq), parallel.replicated(mesh))
            on_four = jax.jit(both).lower(*whole).compile()
            found = on_four(*whole)
        held, held_of_whole = (x.memory_analysis().temp_size_in_bytes for x in (on_four, on_one))
        assert held < share * held_of_whole, f"{held} bytes on each device, {held_of_whole} on one"
        for one, many in zip(expected, found, strict=True):
            assert rows % 4 or many.sharding.spec[1] == "tensor"
            assert jnp.abs(one).std() > 0.01
            print(float(np.abs(np.asarray(one) - np.asarray(many)).max()))

    # share: of the bytes on one device, what each of the four holds at most.
    run(lp_vae(3, 5, 1, False), 4, 1, None, 0.5)  # one latent row a device
    # The last device has less; the image, whose rows four do not divide, is whole on each in the end.
    run(lp_vae(3, 4, 1, True), 7, 1, None, 0.9)
    # Tiles beside one another, each divided by height.
    run(lp_vae(3, 4, 1, True), 4, 7, Tiling(8, 128, 32), 0.75)


if __name__ == "__main__":
    main()
