"""Coarse stage: E_c and D_c learn the 4x smaller image from [z_macro; z_coarse] (paper section 3.1)."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zipir_jax.config import TrainConfig
from zipir_jax.models.layers import area_downsample, bind, init_params
from zipir_jax.models.lp_vae import (
    COARSE_FACTOR,
    Decoder,
    Encoder,
    coarse_moments,
    macro_band,
    sample_posterior,
)
from zipir_jax.training.losses import image_gradients, kl_divergence

DEGRADED = False
MAKES = ("statistics", "coarse_encoder", "coarse_decoder")


def needs(config: TrainConfig) -> tuple[str, ...]:
    return ()


def init(config: TrainConfig, key, pretrained: dict) -> dict:
    keys = jax.random.split(key)
    return {
        "coarse_encoder": init_params(Encoder, config.model.lp_vae.coarse, keys[0]),
        "coarse_decoder": init_params(Decoder, config.model.lp_vae.coarse, keys[1]),
    }


def _decoder(config, generator):
    return bind(Decoder, config.model.lp_vae.coarse, generator["coarse_decoder"])


def gradients(
    config: TrainConfig, params: dict, frozen: dict, batch: dict, key, adversarial: bool
) -> tuple[dict, dict]:
    image = batch["image"]
    latent_key, loss_key = jax.random.split(key)

    def inputs(generator):
        mean, log_variance = coarse_moments(generator, config.model.lp_vae, image)
        latent = [macro_band(image, frozen["statistics"]), sample_posterior(latent_key, mean, log_variance)]
        return (jnp.concatenate(latent, -1),), kl_divergence(mean, log_variance)

    return image_gradients(
        config,
        params,
        inputs=inputs,
        decoder=functools.partial(_decoder, config),
        target=area_downsample(image, COARSE_FACTOR),
        lpips_params=frozen.get("lpips"),
        key=loss_key,
        adversarial=adversarial,
    )


def preview(config: TrainConfig, generator: dict, frozen: dict, batch: dict, key) -> list[Array]:
    """The 4x smaller image, D_c of its latent."""
    image = batch["image"]
    mean, _ = coarse_moments(generator, config.model.lp_vae, image)
    latent = jnp.concatenate([macro_band(image, frozen["statistics"]), mean], -1)
    return [area_downsample(image, COARSE_FACTOR), _decoder(config, generator)(latent)]


def statistics(config: TrainConfig, weights: dict, images: Iterable) -> dict:
    """mu and sigma of z_macro alone: with other coarse bands the latent has other ones."""
    return {name: weights["statistics"][name] for name in ("macro_mean", "macro_std")}
