"""Autoencoder of Stable Diffusion (Rombach et al. 2022), the paper's baseline, as in diffusers' AutoencoderKL.

Residual blocks with group norm, one layer of attention at the lowest resolution. Both look at the whole image, so that
it cannot run in tiles: the larger the image, the more memory it needs. In float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from zipir_jax.config import SDVAEConfig
from zipir_jax.models import layers
from zipir_jax.models.attention import attention
from zipir_jax.models.layers import bind

EPSILON = 1e-6  # of the norms

conv = functools.partial(layers.conv, dtype=jnp.float32)


def _norm(channels, config, rngs):
    # The fast variance, E x^2 - (E x)^2, loses digits where the mean is large.
    return nnx.GroupNorm(
        channels,
        num_groups=config.groups,
        epsilon=EPSILON,
        use_fast_variance=False,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after group norm and Swish, added to the input."""

    def __init__(self, in_channels, out_channels, config: SDVAEConfig, rngs: nnx.Rngs):
        self.norm1 = _norm(in_channels, config, rngs)
        self.conv1 = conv(in_channels, out_channels, rngs)
        self.norm2 = _norm(out_channels, config, rngs)
        self.conv2 = conv(out_channels, out_channels, rngs)
        same = in_channels == out_channels
        self.skip = None if same else conv(in_channels, out_channels, rngs, kernel=1)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        h = self.conv1(nnx.swish(self.norm1(x)))
        h = self.conv2(nnx.swish(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class Attention(nnx.Module):
    """Of every pixel to all of them, in one head, added to the input."""

    def __init__(self, channels: int, config: SDVAEConfig, rngs: nnx.Rngs):
        self.norm = _norm(channels, config, rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(channels, channels, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        pixels = self.norm(x).reshape(b, h * w, c)
        query, key, value = (layer(pixels)[:, :, None] for layer in (self.query, self.key, self.value))
        return x + self.out(attention(query, key, value, implementation="xla")[:, :, 0]).reshape(x.shape)


class Middle(nnx.Module):
    """What the encoder ends with and the decoder starts with: block, attention, block."""

    def __init__(self, channels: int, config: SDVAEConfig, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(channels, channels, config, rngs)
        self.attention = Attention(channels, config, rngs) if config.attention else None
        self.block2 = ResidualBlock(channels, channels, config, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.block1(x)
        return self.block2(x if self.attention is None else self.attention(x))


class Encoder(nnx.Module):
    """Image to mean and log variance of the posterior."""

    def __init__(self, config: SDVAEConfig, rngs: nnx.Rngs):
        widths = [config.base_channels * m for m in config.multipliers]
        self.stem = conv(3, widths[0], rngs)
        blocks, previous = [], widths[0]
        for width in widths:
            for _ in range(config.blocks_per_scale):
                blocks.append(ResidualBlock(previous, width, config, rngs))
                previous = width
        self.blocks = nnx.List(blocks)
        self.blocks_per_scale = config.blocks_per_scale
        # Padded below and to the right alone, as it was trained: the latent lies half a pixel of it off.
        self.downs = nnx.List(
            [nnx.Conv(w, w, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs) for w in widths[:-1]]
        )
        self.middle = Middle(previous, config, rngs)
        self.norm = _norm(previous, config, rngs)
        self.head = conv(previous, 2 * config.latent_channels, rngs)
        self.posterior = conv(2 * config.latent_channels, 2 * config.latent_channels, rngs, kernel=1)

    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float32[Array, "b h2 w2 c"], Float32[Array, "b h2 w2 c"]]:
        h = self.stem(image)
        for i, block in enumerate(self.blocks):
            scale, of_scale = divmod(i, self.blocks_per_scale)
            h = block(self.downs[scale - 1](h) if scale and not of_scale else h)
        h = self.head(nnx.swish(self.norm(self.middle(h))))
        mean, log_variance = jnp.split(self.posterior(h).astype(jnp.float32), 2, -1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)


class Decoder(nnx.Module):
    """Posterior's sample to image; a block more at each scale than `Encoder`."""

    def __init__(self, config: SDVAEConfig, rngs: nnx.Rngs):
        widths = [config.base_channels * m for m in reversed(config.multipliers)]
        self.entry = conv(config.latent_channels, config.latent_channels, rngs, kernel=1)
        self.stem = conv(config.latent_channels, widths[0], rngs)
        self.middle = Middle(widths[0], config, rngs)
        blocks, previous = [], widths[0]
        for width in widths:
            for _ in range(config.blocks_per_scale + 1):
                blocks.append(ResidualBlock(previous, width, config, rngs))
                previous = width
        self.blocks = nnx.List(blocks)
        self.blocks_per_scale = config.blocks_per_scale + 1
        self.ups = nnx.List([conv(w, w, rngs) for w in widths[:-1]])
        self.norm = _norm(previous, config, rngs)
        self.head = conv(previous, 3, rngs)

    def __call__(self, latent: Float[Array, "b h w c"]) -> Float32[Array, "b h2 w2 3"]:
        h = self.middle(self.stem(self.entry(latent)))
        for i, block in enumerate(self.blocks):
            scale, of_scale = divmod(i, self.blocks_per_scale)
            if scale and not of_scale:
                h = self.ups[scale - 1](h.repeat(2, 1).repeat(2, 2))
            h = block(h)
        return self.head(nnx.swish(self.norm(h))).astype(jnp.float32)


class SDVAE(nnx.Module):
    """Encoder and decoder, as one set of weights holds them."""

    def __init__(self, config: SDVAEConfig, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)


def moments(params: dict, config: SDVAEConfig, image: Float[Array, "b h w 3"]) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the posterior, float32 [b, h / factor, w / factor, c]; log variance within [-30, 20].

    Raises ValueError if a side is not a multiple of the config's factor.
    """
    for name, side in (("height", image.shape[1]), ("width", image.shape[2])):
        if side % config.factor:
            raise ValueError(f"{name} {side} is not a multiple of {config.factor}")
    return bind(Encoder, config, params["encoder"])(image)


def encode(params: dict, config: SDVAEConfig, image: Float[Array, "b h w 3"]) -> Float32[Array, "b h2 w2 c"]:
    """Latent: the posterior's mean, scaled; ValueError as of `moments`."""
    return moments(params, config, image)[0] * config.scaling


def decode(params: dict, config: SDVAEConfig, latent: Float[Array, "b h w c"]) -> Float32[Array, "b h2 w2 3"]:
    """Image of a latent that `encode` made."""
    return bind(Decoder, config, params["decoder"])(latent / config.scaling)
