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
    bind,
    conv,
    depth_to_space,
    enlarging_conv,
    folded_conv,
    space_to_depth,
)
from zipir_jax.models.tiling import Tiling, decoder_halo, encoder_halo, map_tiles, tiled_scales

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
        return self.high_scales(image, len(self.downs) + 1)

    def high_scales(self, image: Float[Array, "b h w 3"], stop: int) -> list[Float[Array, "b h2 w2 c"]]:
        """`features` of the scales before `stop`."""
        return self._scales(self.stem(space_to_depth(image, self.patch)), 0, stop)

    def low_scales(self, h: Float[Array, "b h w c"], start: int) -> list[Float[Array, "b h2 w2 c2"]]:
        """`features` of the scale `start` and those after it; `h` is what enters that scale, already shrunk."""
        return self._scales(h, start, len(self.downs) + 1)

    def _scales(self, h, start, stop):
        features = []
        for scale in range(start, stop):
            if scale > start:
                h = self.downs[scale - 1](h)
            for i in range(self.blocks_per_scale):
                h = self.blocks[scale * self.blocks_per_scale + i](h)
            features.append(h)
        return features

    def moments(
        self, h: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h w c2"], Float[Array, "b h w c2"]]:
        """Mean and log variance of the posterior, given the features of the lowest resolution."""
        moments = self.head(nnx.swish(self.norm(h))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, -1)
        return mean, jnp.clip(log_variance + LOG_VARIANCE_START, -30.0, 20.0)

    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "b h2 w2 c"]]:
        """Mean and log variance of the band's posterior, float32; log variance within [-30, 20]."""
        return self.moments(self.features(image)[-1])


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
        # their own would leave a grid. It enlarges and convolves, and what is flat before stays flat. It is computed
        # with 2 x 2 pixels folded into channels, which are many there where features are few.
        enlarge = []
        for doubling in reversed(range(config.patch.bit_length() - 1)):
            width = config.pixel_channels * 2**doubling
            enlarge.append(conv(previous, width, rngs, dtype=dtype))
            previous = width
        self.enlarge = nnx.List(enlarge)
        self.head_conv = conv(previous, 3, rngs, dtype=dtype)

    def features(self, latent: Float[Array, "b h w c"], fuse=None) -> Float[Array, "b h2 w2 c2"]:
        """Everything before the last convolution; where the encoder folds patches, 2 x 2 pixels folded into channels.

        `fuse(scale, h) -> h` may add to what enters each scale, lowest resolution first, and to what leaves each
        doubling within a patch, folded as above.
        """
        scales = len(self.ups) + 1
        return self.high_scales(self.low_scales(latent, scales, fuse), scales, fuse)

    def low_scales(self, latent: Float[Array, "b h w c"], stop: int, fuse=None) -> Float[Array, "b h2 w2 c2"]:
        """What leaves the last scale before `stop`; the first scale has the lowest resolution."""
        return self._scales(self.stem(latent), 0, stop, fuse)

    def high_scales(self, h: Float[Array, "b h w c"], start: int, fuse=None) -> Float[Array, "b h2 w2 c2"]:
        """The rest of `features`: the scale `start` and all after it, given what leaves the one before."""
        h = self._scales(h, start, len(self.ups) + 1, fuse)
        h = nnx.swish(self.norm(h))
        for i, layer in enumerate(self.enlarge):
            h = nnx.swish(enlarging_conv(layer, depth_to_space(h, 2) if i else h))
            if fuse is not None:
                h = fuse(len(self.ups) + 1 + i, h)
        return h

    def _scales(self, h, start, stop, fuse):
        for scale in range(start, stop):
            if scale:
                h = self.ups[scale - 1](h)
            if fuse is not None:
                h = fuse(scale, h)
            for i in range(self.blocks_per_scale):
                h = self.blocks[scale * self.blocks_per_scale + i](h)
        return h

    def head(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """The last convolution; float32."""
        if not self.enlarge:
            return self.head_conv(features).astype(jnp.float32)
        return depth_to_space(folded_conv(self.head_conv, features).astype(jnp.float32), 2)

    def __call__(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        return self.head(self.features(latent))


def macro_band(image: Float[Array, "b h w 3"], statistics: dict) -> Float[Array, "b h2 w2 3"]:
    """z_macro = (I downsampled 32x - mu) / sigma (paper section 3.1)."""
    return (area_downsample(image, FACTOR) - statistics["macro_mean"]) / statistics["macro_std"]


def coarse_moments(
    params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"], tiling: Tiling | None = None
):
    """Mean and log variance of z_coarse for a full-resolution image; tiling and ValueError as of `encode`."""
    encoder = bind(Encoder, config.coarse, params["coarse_encoder"])
    return _moments(encoder, config.coarse, area_downsample(image, COARSE_FACTOR), tiling, COARSE_FACTOR)


def fine_moments(
    params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"], tiling: Tiling | None = None
):
    """Mean and log variance of z_fine; tiling and ValueError as of `encode`."""
    return _moments(bind(Encoder, config.fine, params["fine_encoder"]), config.fine, image, tiling)


def _moments(encoder, config, image, tiling, factor=1):
    """Of an encoder that reads an image `factor` times smaller than the one that the tiling is for."""
    scales = 0 if tiling is None else tiled_scales(config, tiling.cell // factor)
    if not scales:
        return encoder(image)
    h = run_high_scales(encoder, config, image, scales, tiling)
    return encoder.moments(encoder.low_scales(h, scales)[-1])


def run_high_scales(
    encoder: Encoder, config: AutoencoderConfig, image: Float[Array, "b h w 3"], scales: int, tiling: Tiling
) -> Float[Array, "b h2 w2 c"]:
    """What leaves the first `scales` of an encoder, shrunk to what enters the next one; in tiles."""

    def window(image):
        return encoder.downs[scales - 1](encoder.high_scales(image, scales)[-1])

    cells = tuple(side // (config.patch * 2**scales) for side in image.shape[1:3])
    return map_tiles(window, [image], cells, tiling.cells, encoder_halo(config, scales))


def encode(
    params: dict, config: LPVAEConfig, image: Float[Array, "b h w 3"], tiling: Tiling | None = None
) -> Float[Array, "b h2 w2 c"]:
    """z = [z_macro; z_coarse; z_fine], the posterior's mean.

    With a tiling, both encoders run their scales of high resolution in tiles; the latent is the same up to rounding.
    Raises ValueError if a side is not a multiple of 32, or the tiling's cell larger than 32.
    """
    macro = macro_band(image, params["statistics"])
    coarse, _ = coarse_moments(params, config, image, tiling)
    fine, _ = fine_moments(params, config, image, tiling)
    return jnp.concatenate([macro, coarse, fine], -1)


def decode(
    params: dict, config: LPVAEConfig, latent: Float[Array, "b h w c"], tiling: Tiling | None = None
) -> Float[Array, "b h2 w2 3"]:
    """D_f: the image of a latent, without the pixel-aware decoder; tiling as of `encode`.

    Raises ValueError if the tiling's cell is larger than 32.
    """
    decoder = bind(Decoder, config.fine, params["fine_decoder"])
    scales = 0 if tiling is None else tiled_scales(config.fine, tiling.cell)
    if not scales:
        return decoder(latent)
    start = len(config.fine.multipliers) - scales

    def window(h):
        return decoder.head(decoder.high_scales(h, start))

    h = decoder.low_scales(latent, start)
    return map_tiles(window, [h], h.shape[1:3], tiling.cells, decoder_halo(config.fine, scales))


def whiten(latent: Float[Array, "b h w c"], statistics: dict) -> Float[Array, "b h w c"]:
    """Latent with zero mean and unit variance per channel over the training set; the DiT works on these."""
    return (latent - statistics["latent_mean"]) / statistics["latent_std"]


def unwhiten(latent: Float[Array, "b h w c"], statistics: dict) -> Float[Array, "b h w c"]:
    """The inverse of `whiten`."""
    return latent * statistics["latent_std"] + statistics["latent_mean"]


def to_diffused(
    latent: Float[Array, "b h w c"], lq: Float[Array, "b h w c"], statistics: dict
) -> Float[Array, "b h w c"]:
    """What the diffusion makes noise of and the sampler ends with, given the whitened latents, LQ the degraded image's.

    It is the latent itself or, for a model with `DiffusionConfig.residual`, its difference from the LQ latent, of unit
    mean square in each channel over the training set. Channels that a degradation hardly changes, colours above all,
    then end close to the LQ latent, however little the DiT has learned.
    """
    return (latent - lq) / statistics["residual_std"] if "residual_std" in statistics else latent


def from_diffused(
    diffused: Float[Array, "b h w c"], lq: Float[Array, "b h w c"], statistics: dict
) -> Float[Array, "b h w c"]:
    """The inverse of `to_diffused`: the whitened latent."""
    return lq + statistics["residual_std"] * diffused if "residual_std" in statistics else diffused


def sample_posterior(key, mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]):
    """mean + std * noise, the reparameterised draw."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
