"""Fine stage: E_f and D_f learn the full image from all bands, with E_c frozen (paper section 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np

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

DEGRADED = False


def needs(config):
    return ("statistics", "coarse_encoder")


def start(config, key, pretrained, images):
    keys = jax.random.split(key)
    generator = {
        "fine_encoder": init_params(Encoder, config.model.lp_vae.fine, keys[0]),
        "fine_decoder": init_params(Decoder, config.model.lp_vae.fine, keys[1]),
    }
    return generator, pretrained


def gradients(config, params, frozen, batch, key, adversarial):
    vae = config.model.lp_vae
    image = batch["image"]
    latent_key, loss_key = jax.random.split(key)
    macro = macro_band(image, frozen["statistics"])
    coarse, _ = coarse_moments(frozen, vae, image)

    def features(generator):
        mean, log_variance = fine_moments(generator, vae, image)
        latent = jnp.concatenate([macro, coarse, sample_posterior(latent_key, mean, log_variance)], -1)
        decoder = bind(Decoder, vae.fine, generator["fine_decoder"])
        return decoder.features(latent), kl_divergence(mean, log_variance)

    def head(generator, hidden):
        return bind(Decoder, vae.fine, generator["fine_decoder"]).head(hidden)

    return image_gradients(config, features, head, params, frozen["lpips"], image, loss_key, adversarial)


def preview(config, generator, frozen, batch, key):
    vae, lp_vae = config.model.lp_vae, frozen | generator
    return [batch["image"], decode(lp_vae, vae, encode(lp_vae, vae, batch["image"]))]


def export(config, generator, frozen, images):
    measured = latent_statistics(config.model.lp_vae, frozen | generator, images)
    return generator | {"statistics": frozen["statistics"] | measured}


def latent_statistics(vae, lp_vae, images) -> dict:
    """Per-channel mean and standard deviation of the latents (DESIGN 3.5)."""
    encoder = jax.jit(lambda lp_vae, image: encode(lp_vae, vae, image))
    latents = [np.asarray(encoder(lp_vae, batch)) for batch in images]
    values = np.concatenate([latent.reshape(-1, latent.shape[-1]) for latent in latents])
    return {
        "latent_mean": jnp.asarray(values.mean(0, dtype=np.float64), jnp.float32),
        "latent_std": jnp.asarray(values.std(0, dtype=np.float64), jnp.float32),
    }
