"""DiT stage: predict the noise, or v, of the clean image's latent, given the degraded image's (paper section 3.2)."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from zipir_jax.config import SamplingConfig, TrainConfig
from zipir_jax.diffusion.objective import diffusion_loss
from zipir_jax.diffusion.schedule import linear_schedule, logit_normal_timesteps
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import decode, encode, whiten
from zipir_jax.restorer import denoise_latent

DEGRADED = True
MAKES = ("dit",)


def needs(config: TrainConfig) -> tuple[str, ...]:
    return ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")


def start(config: TrainConfig, key, pretrained: dict, images: Iterable) -> tuple[dict, dict]:
    generator = pretrained.get("dit") or init_params(DiT, config.model.dit, key)
    return generator, {group: pretrained[group] for group in needs(config)}


def gradients(
    config: TrainConfig, params: dict, frozen: dict, batch: dict, key, adversarial: bool
) -> tuple[dict, dict]:
    vae, draws = config.model.lp_vae, config.noise_draws
    timestep_key, noise_key = jax.random.split(key)
    clean = whiten(encode(frozen, vae, batch["image"]), frozen["statistics"])
    lq = whiten(encode(frozen, vae, batch["lq"]), frozen["statistics"])
    clean, lq = jnp.repeat(clean, draws, 0), jnp.repeat(lq, draws, 0)
    timesteps = logit_normal_timesteps(timestep_key, (clean.shape[0],), config.model.diffusion)
    schedule = linear_schedule(config.model.diffusion)

    def loss(generator):
        dit = bind(DiT, config.model.dit, generator)
        losses = diffusion_loss(
            lambda noisy, t: dit(noisy, t, lq),
            config.model.diffusion.prediction,
            noise_key,
            clean,
            timesteps,
            schedule,
        )
        return losses.mean()

    value, gradient = jax.value_and_grad(loss)(params["generator"])
    return {"generator": gradient, "discriminator": {}}, {"loss": value}


def preview(config: TrainConfig, generator: dict, frozen: dict, batch: dict, key) -> list[Array]:
    """Degraded image, what D_f makes of its latent, of the sampled latent, and of the clean latent; clean image."""
    weights, vae = frozen | {"dit": generator}, config.model.lp_vae
    keys = jax.random.split(key, batch["lq"].shape[0])
    lq_latent = encode(weights, vae, batch["lq"])
    sampled = denoise_latent(weights, config.model, SamplingConfig(), lq_latent, keys)
    latents = [lq_latent, sampled, encode(weights, vae, batch["image"])]
    return [batch["lq"], *(decode(weights, vae, latent) for latent in latents), batch["image"]]


def export(config: TrainConfig, generator: dict, frozen: dict, images: Iterable) -> dict:
    return {"dit": generator}
