"""Coarse stage: E_c and D_c learn the 4x smaller image from [z_macro; z_coarse] (paper section 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np

from zipir_jax.models.layers import area_downsample, bind, init_params
from zipir_jax.models.lp_vae import (
    COARSE_FACTOR,
    FACTOR,
    Decoder,
    Encoder,
    coarse_moments,
    macro_band,
    sample_posterior,
)
from zipir_jax.training.losses import image_gradients, kl_divergence

DEGRADED = False


def needs(config):
    return ()


def start(config, key, pretrained, images):
    keys = jax.random.split(key)
    generator = {
        "coarse_encoder": init_params(Encoder, config.model.lp_vae.coarse, keys[0]),
        "coarse_decoder": init_params(Decoder, config.model.lp_vae.coarse, keys[1]),
    }
    return generator, {"statistics": macro_statistics(images)}


def macro_statistics(images) -> dict:
    """Per-channel mean and standard deviation of the 32x smaller images: mu and sigma of z_macro."""
    values = np.concatenate([area_downsample(batch, FACTOR).reshape(-1, 3) for batch in images])
    return {
        "macro_mean": jnp.asarray(values.mean(0, dtype=np.float64), jnp.float32),
        "macro_std": jnp.asarray(values.std(0, dtype=np.float64), jnp.float32),
    }


def gradients(config, params, frozen, batch, key, adversarial):
    vae = config.model.lp_vae
    image = batch["image"]
    latent_key, loss_key = jax.random.split(key)

    def features(generator):
        mean, log_variance = coarse_moments(generator, vae, image)
        latent = [macro_band(image, frozen["statistics"]), sample_posterior(latent_key, mean, log_variance)]
        decoder = bind(Decoder, vae.coarse, generator["coarse_decoder"])
        return decoder.features(jnp.concatenate(latent, -1)), kl_divergence(mean, log_variance)

    def head(generator, hidden):
        return bind(Decoder, vae.coarse, generator["coarse_decoder"]).head(hidden)

    target = area_downsample(image, COARSE_FACTOR)
    return image_gradients(config, features, head, params, frozen["lpips"], target, loss_key, adversarial)


def preview(config, generator, frozen, batch, key):
    vae, image = config.model.lp_vae, batch["image"]
    mean, _ = coarse_moments(generator, vae, image)
    latent = jnp.concatenate([macro_band(image, frozen["statistics"]), mean], -1)
    return [
        area_downsample(image, COARSE_FACTOR),
        bind(Decoder, vae.coarse, generator["coarse_decoder"])(latent),
    ]


def export(config, generator, frozen, images):
    return generator | {"statistics": frozen["statistics"]}
