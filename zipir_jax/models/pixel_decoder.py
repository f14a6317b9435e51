"""The pixel-aware decoder D_f* (paper section 3.1, Fig. 8): D_f with skip connections from the degraded image.

A trainable copy of E_f reads the low-quality image; its features at every scale enter extra residual layers between
the upsampling blocks of D_f. Where E_f folds pixels into patches it has no features of the highest scales; there the
low-quality image itself enters. All that enters starts at zero, so D_f* starts as D_f.
"""

from flax import nnx
from jaxtyping import Array, Float

from zipir_jax.config import LPVAEConfig
from zipir_jax.models.layers import ResidualBlock, area_downsample, bind, conv, folded_conv, space_to_depth
from zipir_jax.models.lp_vae import Decoder, Encoder, run_high_scales
from zipir_jax.models.tiling import Tiling, map_tiles, pixel_decoder_halo, tiled_scales


class Fusion(nnx.Module):
    """Adds the extractor's features to the decoder's, then one residual block."""

    def __init__(self, feature_channels, channels, rngs, *, dtype, remat):
        self.project = conv(feature_channels, channels, rngs, dtype=dtype, kernel=1, zero=True)
        self.block = ResidualBlock(channels, channels, rngs, dtype=dtype, remat=remat, zero=True)

    def __call__(
        self, h: Float[Array, "b h w c"], feature: Float[Array, "b h w c2"]
    ) -> Float[Array, "b h w c"]:
        return self.block(h + self.project(feature))


class PixelDecoder(nnx.Module):
    """D_f*: latent and low-quality image to restored image."""

    def __init__(self, config: LPVAEConfig, rngs: nnx.Rngs):
        fine = config.fine
        self.extractor = Encoder(fine, rngs)
        # The extractor's latent head is not used: only its features are.
        del self.extractor.head, self.extractor.norm
        self.decoder = Decoder(fine, rngs)
        widths = [fine.base_channels * m for m in fine.multipliers][::-1]
        entering = [widths[0], *widths[:-1]]  # channels that enter each scale of the decoder
        self.fusions = nnx.List(
            [
                Fusion(f, c, rngs, dtype=fine.compute_dtype, remat=fine.remat)
                for f, c in zip(widths, entering, strict=True)
            ]
        )
        leaving = [layer.out_features for layer in self.decoder.enlarge]
        self.pixel_fusions = nnx.List(
            [conv(3, channels, rngs, dtype=fine.compute_dtype, zero=True) for channels in leaving]
        )

    def features(
        self, latent: Float[Array, "b h w c"], lq: Float[Array, "b h2 w2 3"]
    ) -> Float[Array, "b h3 w3 c2"]:
        """Everything before the last convolution, as of `Decoder.features`."""
        return self.decoder.features(latent, self.fuse(lq, self.extractor.features(lq), 0))

    def fuse(self, lq: Float[Array, "b h w 3"], features: list[Float[Array, "b _h _w _c"]], first: int):
        """The decoder's `fuse(scale, h)`; the last of the extractor's features enters the decoder's scale `first`."""
        skips = dict(enumerate(reversed(features), first))

        def fuse(scale, h):
            if scale < len(self.fusions):
                return self.fusions[scale](h, skips[scale])
            pixels = space_to_depth(area_downsample(lq, lq.shape[1] // (2 * h.shape[1])), 2)
            return h + folded_conv(self.pixel_fusions[scale - len(self.fusions)], pixels)

        return fuse

    def head(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """The last convolution; float32."""
        return self.decoder.head(features)

    def __call__(
        self, latent: Float[Array, "b h w c"], lq: Float[Array, "b h2 w2 3"]
    ) -> Float[Array, "b h2 w2 3"]:
        return self.head(self.features(latent, lq))


def pixel_decode(
    params: dict,
    config: LPVAEConfig,
    latent: Float[Array, "b h w c"],
    lq: Float[Array, "b h2 w2 3"],
    tiling: Tiling | None = None,
) -> Float[Array, "b h2 w2 3"]:
    """D_f*: the restored image of a latent and the low-quality image.

    With a tiling, the scales of high resolution run in tiles, the extractor's twice: once for what the lower scales
    read of them, once beside the decoder's, which keeps no skip connection of theirs whole. The image is the same up
    to rounding. Raises ValueError if the tiling's cell is larger than 32.
    """
    network = bind(PixelDecoder, config, params)
    extractor, decoder = network.extractor, network.decoder
    scales = 0 if tiling is None else tiled_scales(config.fine, tiling.cell)
    if not scales:
        return network(latent, lq)
    start = len(config.fine.multipliers) - scales

    def window(h, lq):
        fuse = network.fuse(lq, extractor.high_scales(lq, scales), start)
        return network.head(decoder.high_scales(h, start, fuse))

    entering = run_high_scales(extractor, config.fine, lq, scales, tiling)
    fuse = network.fuse(lq, extractor.low_scales(entering, scales), 0)
    h = decoder.low_scales(latent, start, fuse)
    return map_tiles(window, [h, lq], h.shape[1:3], tiling.cells, pixel_decoder_halo(config.fine, scales))


def from_lp_vae(params: dict, lp_vae: dict) -> dict:
    """Parameters of D_f* that start from a trained LP-VAE: extractor from E_f, decoder from D_f."""
    extractor = {k: lp_vae["fine_encoder"][k] for k in params["extractor"]}
    return params | {"extractor": extractor, "decoder": lp_vae["fine_decoder"]}
