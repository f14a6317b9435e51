"""Pixel-aware decoder stage: D_f* learns the clean image from a latent and the degraded image (paper section 3.1).

E_f stays frozen, its trainable copy and all of D_f learn. The paper notes that this stage may follow the DiT's, since
the latent space does not change. The paper decodes the clean image's latent; with `decoder_noise` the decoder sees what
the DiT predicts from a noisy one, and so learns how far it can trust the DiT.
"""

import math

import jax
import jax.numpy as jnp

from zipir_jax.diffusion.objective import add_noise, predict_clean
from zipir_jax.diffusion.schedule import linear_schedule
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import encode, unwhiten, whiten
from zipir_jax.models.pixel_decoder import PixelDecoder, from_lp_vae
from zipir_jax.training.losses import image_gradients

DEGRADED = True


def needs(config):
    lp_vae = ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")
    return (*lp_vae, "dit") if config.decoder_noise else lp_vae


def start(config, key, pretrained, images):
    params = init_params(PixelDecoder, config.model.lp_vae, key)
    return from_lp_vae(params, pretrained), pretrained


def _latent(config, frozen, batch, key):
    """The clean image's latent, or the DiT's prediction of it at a random noise level."""
    clean = encode(frozen, config.model.lp_vae, batch["image"])
    if not config.decoder_noise:
        return clean
    schedule, statistics = linear_schedule(config.model.diffusion), frozen["statistics"]
    lq = whiten(encode(frozen, config.model.lp_vae, batch["lq"]), statistics)
    timestep_key, noise_key = jax.random.split(key)
    bound = math.ceil(config.decoder_noise * config.model.diffusion.train_timesteps)
    timesteps = jax.random.randint(timestep_key, (len(clean),), 0, bound)
    eps = jax.random.normal(noise_key, clean.shape)
    noisy = add_noise(whiten(clean, statistics), eps, timesteps, schedule)
    predicted = bind(DiT, config.model.dit, frozen["dit"])(noisy, timesteps, lq)
    return unwhiten(predict_clean(noisy, predicted, timesteps, schedule), statistics)


def gradients(config, params, frozen, batch, key, adversarial):
    latent_key, loss_key = jax.random.split(key)
    latent = _latent(config, frozen, batch, latent_key)

    def features(generator):
        decoder = bind(PixelDecoder, config.model.lp_vae, generator)
        return decoder.features(latent, batch["lq"]), jnp.zeros(())  # no KL: the latent is given

    def head(generator, hidden):
        return bind(PixelDecoder, config.model.lp_vae, generator).head(hidden)

    return image_gradients(
        config, features, head, params, frozen["lpips"], batch["image"], loss_key, adversarial
    )


def preview(config, generator, frozen, batch, key):
    """Degraded image, D_f* from the training latent, from the degraded image's latent; clean image."""
    decoder = bind(PixelDecoder, config.model.lp_vae, generator)
    latents = [_latent(config, frozen, batch, key), encode(frozen, config.model.lp_vae, batch["lq"])]
    return [batch["lq"], *(decoder(latent, batch["lq"]) for latent in latents), batch["image"]]


def export(config, generator, frozen, images):
    return {"pixel_decoder": generator}
