"""Latent Pyramid VAE (paper section 3.1): three bands, concatenated into one 32x smaller latent.

    macro   image averaged over 32 x 32 pixels, normalised with the training set's mean and std   (no network)
    coarse  E_c on the image averaged over 4 x 4 pixels
    fine    E_f on the full image

D_c decodes [macro; coarse] to the 4x smaller image and only serves to train E_c; D_f decodes all bands.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from zipir_jax.config import AutoencoderConfig, LPVAEConfig
from zipir_jax.models.layers import (
    Downsample,
    ResidualBlock,
    Upsample,
    area_downsample,
    bilinear_upsample,
    bind,
    conv,
    space_to_depth,
)

FACTOR = 32  # pixels per latent pixel
COARSE_FACTOR = 4  # pixels per pixel of the image that E_c reads
MACRO_CHANNELS = 3
LOG_VARIANCE_START = -6.0  # of an untrained encoder: noise of unit variance would drown what it first learns


class Encoder(nnx.Module):
    """Convolutional encoder of one band: residual blocks at each scale, `Downsample` between."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        dtype = config.compute_dtype
        self.patch = config.patch
        widths = [config.base_channels * m for m in config.multipliers]
        self.stem = conv(3 * config.patch**2, widths[0], rngs, dtype=dtype)
        blocks, downs, previous = [], [], widths[0]
        for i, width in enumerate(widths):
            for _ in range(config.blocks_per_scale):
                blocks.append(ResidualBlock(previous, width, rngs, dtype=dtype, remat=config.remat))
                previous = width
            if i < len(widths) - 1:
                downs.append(Downsample(width, rngs, dtype=dtype))
        self.blocks = nnx.List(blocks)
        self.downs = nnx.List(downs)
        self.blocks_per_scale = config.blocks_per_scale
        self.norm = nnx.RMSNorm(previous, dtype=dtype, rngs=rngs)
        self.head = conv(previous, 2 * config.latent_channels, rngs, dtype=dtype)  # mean, log variance

    def features(self, image: Float[Array, "b h w 3"]) -> list[Float[Array, "b h2 w2 c"]]:
        """What the network holds at the end of each scale, highest resolution first."""
        h = self.stem(space_to_depth(image, self.patch))
        features = []
        for scale in range(len(self.downs) + 1):
            if scale:
                h = self.downs[scale - 1](h)
            for i in range(self.blocks_per_scale):
                h = self.blocks[scale * self.blocks_per_scale + i](h)
            features.append(h)
        return features

    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b h2 w2 c"]]:
        """Mean and log variance of the band's posterior, float32; log variance within [-30, 20]."""
        moments = self.head(nnx.swish(self.norm(self.features(image)[-1]))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, -1)
        return mean, jnp.clip(log_variance + LOG_VARIANCE_START, -30.0, 20.0)


class Decoder(nnx.Module):
    """Mirror of `Encoder`. `features` and `head` are apart because the adversarial weight needs the last layer."""

    def __init__(self, config: AutoencoderConfig, rngs: nnx.Rngs):
        dtype = config.compute_dtype
        widths = [config.base_channels * m for m in config.multipliers][::-1]
        self.stem = conv(config.decoder_channels, widths[0], rngs, dtype=dtype)
        blocks, ups, previous = [], [], widths[0]
        for i, width in enumerate(widths):
            if i:
                ups.append(Upsample(previous, rngs, dtype=dtype, unfold=config.unfold))
            for _ in range(config.blocks_per_scale):
                blocks.append(ResidualBlock(previous, width, rngs, dtype=dtype, remat=config.remat))
                previous = width
        self.blocks = nnx.List(blocks)
        self.ups = nnx.List(ups)
        self.blocks_per_scale = config.blocks_per_scale
        self.norm = nnx.RMSNorm(previous, dtype=dtype, rngs=rngs)
        # Where the encoder folds pixels into patches, the decoder does not unfold them: sub-pixels with weights of
        # their own would leave a grid. It enlarges and convolves, and what is flat before stays flat.
        enlarge = []
        for doubling in reversed(range(config.patch.bit_length() - 1)):
            width = config.pixel_channels * 2**doubling
            enlarge.append(conv(previous, width, rngs, dtype=dtype))
            previous = width
        self.enlarge = nnx.List(enlarge)
        self.head_conv = conv(previous, 3, rngs, dtype=dtype)

    def features(self, latent: Float[Array, "b h w c"], fuse=None) -> Float[Array, "b h2 w2 c2"]:
        """Everything before the last convolution. `fuse(scale, h) -> h` may add to what enters each scale, lowest
        resolution first, and to what leaves each doubling within a patch."""
        h = self.stem(latent)
        for scale in range(len(self.ups) + 1):
            if scale:
                h = self.ups[scale - 1](h)
            if fuse is not None:
                h = fuse(scale, h)
            for i in range(self.blocks_per_scale):
                h = self.blocks[scale * self.blocks_per_scale + i](h)
        h = nnx.swish(self.norm(h))
        for i, layer in enumerate(self.enlarge):
            h = nnx.swish(layer(bilinear_upsample(h)))
            if fuse is not None:
                h = fuse(len(self.ups) + 1 + i, h)
        return h

    def head(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        """The last convolution; float32."""
        return self.head_conv(features).astype(jnp.float32)

    def __call__(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        return self.head(self.features(latent))


def macro_band(image: Float[Array, "b h w 3"], statistics: dict) -> Float[Array, "b h2 w2 3"]:
    """z_macro = (I downsampled 32x - mu) / sigma (paper section 3.1)."""
    return (area_downsample(image, FACTOR) - statistics["macro_mean"]) / statistics["macro_std"]


def coarse_moments(params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"]):
    """Mean and log variance of z_coarse for a full-resolution image."""
    return bind(Encoder, config.coarse, params["coarse_encoder"])(area_downsample(image, COARSE_FACTOR))


def fine_moments(params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"]):
    """Mean and log variance of z_fine."""
    return bind(Encoder, config.fine, params["fine_encoder"])(image)


def encode(params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
    """z = [z_macro; z_coarse; z_fine], the posterior's mean; sides must be multiples of 32, else ValueError."""
    macro = macro_band(image, params["statistics"])
    coarse, _ = coarse_moments(params, config, image)
    fine, _ = fine_moments(params, config, image)
    return jnp.concatenate([macro, coarse, fine], -1)


def decode(params: dict, config: LPVAEConfig, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
    """D_f: the image of a latent, without the pixel-aware decoder."""
    return bind(Decoder, config.fine, params["fine_decoder"])(latent)


def whiten(latent: Float[Array, "b h w c"], statistics: dict) -> Float[Array, "b h w c"]:
    """Latent with zero mean and unit variance per channel over the training set; the DiT works on these."""
    return (latent - statistics["latent_mean"]) / statistics["latent_std"]


def unwhiten(latent: Float[Array, "b h w c"], statistics: dict) -> Float[Array, "b h w c"]:
    """The inverse of `whiten`."""
    return latent * statistics["latent_std"] + statistics["latent_mean"]


def sample_posterior(key, mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]):
    """mean + std * noise, the reparameterised draw."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
