"""Fine stage: E_f and D_f learn the full image from all bands, with E_c frozen (paper section 3.1)."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zipir_jax.config import TrainConfig
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import (
    Decoder,
    Encoder,
    coarse_moments,
    decode,
    encode,
    fine_moments,
    macro_band,
    sample_posterior,
)
from zipir_jax.training.losses import image_gradients, kl_divergence
from zipir_jax.training.statistics import latent_statistics

DEGRADED = False
MAKES = ("fine_encoder", "fine_decoder")


def needs(config: TrainConfig) -> tuple[str, ...]:
    return ("statistics", "coarse_encoder")


def init(config: TrainConfig, key, pretrained: dict) -> dict:
    keys = jax.random.split(key)
    return {
        "fine_encoder": init_params(Encoder, config.model.lp_vae.fine, keys[0]),
        "fine_decoder": init_params(Decoder, config.model.lp_vae.fine, keys[1]),
    }


def gradients(
    config: TrainConfig, params: dict, frozen: dict, batch: dict, key, adversarial: bool
) -> tuple[dict, dict]:
    vae = config.model.lp_vae
    image = batch["image"]
    latent_key, loss_key = jax.random.split(key)
    macro = macro_band(image, frozen["statistics"])
    coarse, _ = coarse_moments(frozen, vae, image)

    def inputs(generator):
        mean, log_variance = fine_moments(generator, vae, image)
        latent = jnp.concatenate([macro, coarse, sample_posterior(latent_key, mean, log_variance)], -1)
        return (latent,), kl_divergence(mean, log_variance)

    return image_gradients(
        config,
        params,
        inputs=inputs,
        decoder=lambda generator: bind(Decoder, vae.fine, generator["fine_decoder"]),
        target=image,
        lpips_params=frozen.get("lpips"),
        key=loss_key,
        adversarial=adversarial,
    )


def preview(config: TrainConfig, generator: dict, frozen: dict, batch: dict, key) -> list[Array]:
    """The image, D_f of its latent."""
    vae, lp_vae = config.model.lp_vae, frozen | generator
    return [batch["image"], decode(lp_vae, vae, encode(lp_vae, vae, batch["image"]))]


def statistics(config: TrainConfig, weights: dict, images: Iterable) -> dict:
    """Those of the whole latent too, which the DiT's is whitened by, and of what degradations change in it."""
    degradation = config.degradation if config.model.diffusion.residual else None
    return weights["statistics"] | latent_statistics(config.model.lp_vae, weights, images, degradation)
