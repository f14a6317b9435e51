"""DiT stage: predict the noise in the latent of the clean image, given the degraded image's (paper section 3.2)."""

import jax
import jax.numpy as jnp

from zipir_jax.config import SamplingConfig
from zipir_jax.diffusion.objective import eps_loss
from zipir_jax.diffusion.schedule import linear_schedule, logit_normal_timesteps
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import decode, encode, whiten
from zipir_jax.restorer import denoise_latent

DEGRADED = True


def needs(config):
    return ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")


def start(config, key, pretrained, images):
    return init_params(DiT, config.model.dit, key), pretrained


def gradients(config, params, frozen, batch, key, adversarial):
    vae, draws = config.model.lp_vae, config.noise_draws
    timestep_key, noise_key = jax.random.split(key)
    clean = whiten(encode(frozen, vae, batch["image"]), frozen["statistics"])
    lq = whiten(encode(frozen, vae, batch["lq"]), frozen["statistics"])
    clean, lq = jnp.repeat(clean, draws, 0), jnp.repeat(lq, draws, 0)
    timesteps = logit_normal_timesteps(timestep_key, (clean.shape[0],), config.model.diffusion)
    schedule = linear_schedule(config.model.diffusion)

    def loss(generator):
        dit = bind(DiT, config.model.dit, generator)
        return eps_loss(lambda noisy, t: dit(noisy, t, lq), noise_key, clean, timesteps, schedule).mean()

    value, gradient = jax.value_and_grad(loss)(params["generator"])
    return {"generator": gradient, "discriminator": {}}, {"loss": value}


def preview(config, generator, frozen, batch, key):
    """Degraded image, what D_f makes of its latent, of the sampled latent, and of the clean latent; clean image."""
    weights, vae = frozen | {"dit": generator}, config.model.lp_vae
    keys = jax.random.split(key, batch["lq"].shape[0])
    lq_latent = encode(weights, vae, batch["lq"])
    sampled = denoise_latent(weights, config.model, SamplingConfig(), lq_latent, keys)
    latents = [lq_latent, sampled, encode(weights, vae, batch["image"])]
    return [batch["lq"], *(decode(weights, vae, latent) for latent in latents), batch["image"]]


def export(config, generator, frozen, images):
    return {"dit": generator}
