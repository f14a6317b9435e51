"""The pixel-aware decoder D_f* (paper section 3.1, Fig. 8): D_f with skip connections from the degraded image.

A trainable copy of E_f reads the low-quality image; its features at every scale enter extra residual layers between
the upsampling blocks of D_f. Where E_f folds pixels into patches it has no features of the highest scales; there the
low-quality image itself enters. All that enters starts at zero, so D_f* starts as D_f.
"""

from flax import nnx
from jaxtyping import Array, Float

from zipir_jax.config import LPVAEConfig
from zipir_jax.models.layers import ResidualBlock, area_downsample, conv
from zipir_jax.models.lp_vae import Decoder, Encoder


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
    ) -> Float[Array, "b h2 w2 c2"]:
        """Everything before the last convolution."""
        skips = self.extractor.features(lq)[::-1]

        def fuse(scale, h):
            if scale < len(skips):
                return self.fusions[scale](h, skips[scale])
            return h + self.pixel_fusions[scale - len(skips)](area_downsample(lq, lq.shape[1] // h.shape[1]))

        return self.decoder.features(latent, fuse)

    def head(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        """The last convolution; float32."""
        return self.decoder.head(features)

    def __call__(
        self, latent: Float[Array, "b h w c"], lq: Float[Array, "b h2 w2 3"]
    ) -> Float[Array, "b h2 w2 3"]:
        return self.head(self.features(latent, lq))


def from_lp_vae(params: dict, lp_vae: dict) -> dict:
    """Parameters of D_f* that start from a trained LP-VAE: extractor from E_f, decoder from D_f."""
    extractor = {k: lp_vae["fine_encoder"][k] for k in params["extractor"]}
    return params | {"extractor": extractor, "decoder": lp_vae["fine_decoder"]}
