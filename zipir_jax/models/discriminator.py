"""Patch discriminator (Isola et al. 2017, section 3.2.2; recommended by the paper through its reference [13])."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zipir_jax.config import DiscriminatorConfig
from zipir_jax.models.layers import conv


class PatchDiscriminator(nnx.Module):
    """Strided 4x4 convolutions to a map of logits, one per overlapping patch of the image."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        dtype = config.compute_dtype
        widths = [config.base_channels * min(2**i, 8) for i in range(config.layers + 1)]
        self.stem = conv(3, widths[0], rngs, dtype=dtype, kernel=4, stride=2)
        strides = [2] * (config.layers - 1) + [1]
        self.convs = nnx.List(
            [
                conv(widths[i], widths[i + 1], rngs, dtype=dtype, kernel=4, stride=s)
                for i, s in enumerate(strides)
            ]
        )
        # RMS norm over channels instead of batch norm: no statistics shared between images or devices.
        self.norms = nnx.List([nnx.RMSNorm(w, dtype=dtype, rngs=rngs) for w in widths[1:]])
        self.head = conv(widths[-1], 1, rngs, dtype=dtype, kernel=4)

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2"]:
        h = nnx.leaky_relu(self.stem(image), 0.2)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            h = nnx.leaky_relu(norm(layer(h)), 0.2)
        return self.head(h)[..., 0].astype(jnp.float32)
