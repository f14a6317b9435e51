"""Pixel-aware decoder stage: D_f* learns the clean image from a latent and the degraded image (paper section 3.1).

E_f stays frozen, its trainable copy and all of D_f learn. The paper notes that this stage may follow the DiT's, since
the latent space does not change. The paper decodes the clean image's latent; with `decoder_noise` the decoder sees what
the DiT predicts from a noisy one, and so learns how far it can trust the DiT.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zipir_jax.config import TrainConfig
from zipir_jax.diffusion.objective import add_noise, predict_clean
from zipir_jax.diffusion.schedule import linear_schedule
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import encode, from_diffused, to_diffused, unwhiten, whiten
from zipir_jax.models.pixel_decoder import PixelDecoder, from_lp_vae
from zipir_jax.training.losses import image_gradients
from zipir_jax.training.stages.dit import text_of

DEGRADED = True
MAKES = ("pixel_decoder",)


def needs(config: TrainConfig) -> tuple[str, ...]:
    lp_vae = ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")
    return (*lp_vae, "dit") if config.decoder_noise[1] else lp_vae


def init(config: TrainConfig, key, pretrained: dict) -> dict:
    return {"pixel_decoder": from_lp_vae(init_params(PixelDecoder, config.model.lp_vae, key), pretrained)}


def _decoder(config, generator):
    return bind(PixelDecoder, config.model.lp_vae, generator["pixel_decoder"])


def _latent(config, frozen, batch, key):
    """The clean image's latent, or the DiT's prediction of it at a random noise level."""
    latent = encode(frozen, config.model.lp_vae, batch["image"])
    if not config.decoder_noise[1]:
        return latent
    schedule, statistics = linear_schedule(config.model.diffusion), frozen["statistics"]
    lq = whiten(encode(frozen, config.model.lp_vae, batch["lq"]), statistics)
    timestep_key, noise_key = jax.random.split(key)
    low, high = (math.ceil(level * config.model.diffusion.train_timesteps) for level in config.decoder_noise)
    timesteps = jax.random.randint(timestep_key, (len(latent),), min(low, high - 1), high)
    clean = to_diffused(whiten(latent, statistics), lq, statistics)
    noisy = add_noise(clean, jax.random.normal(noise_key, clean.shape), timesteps, schedule)
    dit = bind(DiT, config.model.dit, frozen["dit"])
    predict = functools.partial(dit, lq=lq, **text_of(batch))
    denoise = predict_clean(predict, config.model.diffusion.prediction, schedule)
    return unwhiten(from_diffused(denoise(noisy, timesteps), lq, statistics), statistics)


def gradients(
    config: TrainConfig, params: dict, frozen: dict, batch: dict, key, adversarial: bool
) -> tuple[dict, dict]:
    latent_key, loss_key = jax.random.split(key)
    latent = _latent(config, frozen, batch, latent_key)

    return image_gradients(
        config,
        params,
        inputs=lambda generator: ((latent, batch["lq"]), jnp.zeros(())),  # no KL: the latent is given
        decoder=functools.partial(_decoder, config),
        target=batch["image"],
        lpips_params=frozen.get("lpips"),
        key=loss_key,
        adversarial=adversarial,
    )


def preview(config: TrainConfig, generator: dict, frozen: dict, batch: dict, key) -> list[Array]:
    """Degraded image, D_f* from the training latent, from the degraded image's latent; clean image."""
    decoder = _decoder(config, generator)
    latents = [_latent(config, frozen, batch, key), encode(frozen, config.model.lp_vae, batch["lq"])]
    return [batch["lq"], *(decoder(latent, batch["lq"]) for latent in latents), batch["image"]]


def statistics(config: TrainConfig, weights: dict, images: Iterable) -> dict:
    return weights["statistics"]
