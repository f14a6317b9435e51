"""DiT stage: predict the noise, or v, of the clean image's latent, given the degraded image's (paper section 3.2)."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zipir_jax.config import DiffusionConfig, LPVAEConfig, SamplingConfig, TrainConfig
from zipir_jax.diffusion.objective import diffusion_loss
from zipir_jax.diffusion.schedule import linear_schedule, training_timesteps
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind, init_params
from zipir_jax.models.lp_vae import FACTOR, MACRO_CHANNELS, decode, encode, to_diffused, whiten
from zipir_jax.models.memory import choose_tiling, encode_cost, resident_bytes
from zipir_jax.models.tiling import Tiling
from zipir_jax.parallel import constrain, mesh_parts, platform
from zipir_jax.restorer import denoise_latent

# Of the images that a device encodes at a time; larger ones are encoded in tiles. 2048 x 2048 and, as the sides of
# crops are rounded to multiples of 64, 5 % more.
ENCODED_PIXELS = int(1.05 * 2**22)
DEGRADED = True
MAKES = ("dit",)


def needs(config: TrainConfig) -> tuple[str, ...]:
    return ("statistics", "coarse_encoder", "fine_encoder", "fine_decoder")


def init(config: TrainConfig, key, pretrained: dict) -> dict:
    return {"dit": init_params(DiT, config.model.dit, key)}


def text_of(batch: dict) -> dict:
    """The text embeddings of a batch, as the DiT takes them; {} where it has none."""
    return {name: batch[name] for name in ("text", "text_lengths") if name in batch}


def latents(config: TrainConfig, frozen: dict, batch: dict) -> tuple[Array, Array]:
    """The latents of the clean and of the degraded images, encoded here or beforehand.

    Each device encodes one image after another, or as many at a time as have ENCODED_PIXELS: what the encoders hold of
    an image of 2048 pixels, 3 GiB, would else be the largest of all that a step needs.
    """
    if "latent" in batch:
        return batch["latent"], batch["lq_latent"]
    images = jnp.stack([batch["image"], batch["lq"]])
    _, count, height, width, channels = images.shape
    parts = math.gcd(count, mesh_parts("batch"))
    images_of_part = count // parts
    together = math.gcd(images_of_part, max(1, ENCODED_PIXELS // (height * width)))
    # [2, part, turn, images at a time, ...], so that a device keeps the images that it has.
    turns = images.reshape(2, parts, images_of_part // together, together, height, width, channels)
    turns = turns.swapaxes(1, 2).reshape(-1, parts * together, height, width, channels)
    vae, tiling = config.model.lp_vae, _tiling(config.model.lp_vae, height, width)
    found = jax.lax.map(lambda x: encode(frozen, vae, x, tiling), constrain(turns, None, "batch"))
    found = found.reshape(2, -1, parts, together, *found.shape[2:]).swapaxes(1, 2)
    return tuple(found.reshape(2, count, *found.shape[4:]))


def _tiling(vae: LPVAEConfig, height: int, width: int) -> Tiling | None:
    """Of images of more than ENCODED_PIXELS, that which needs as much memory as one of so many.

    Not of those whose height is divided over devices: tiles along it would gather it.
    """
    if height * width <= ENCODED_PIXELS or mesh_parts("height") > 1:
        return None
    side = math.isqrt(ENCODED_PIXELS) // FACTOR * FACTOR
    budget = resident_bytes(encode_cost(vae, side, side, None, platform()), platform())
    return choose_tiling(encode_cost, vae, height, width, budget, platform())


def weaken(lq: Float[Array, "b h w c"], key, config: DiffusionConfig) -> Float[Array, "b h w c"]:
    """Whitened LQ latents, some of them, at random, multiplied by a small number (VOSR, Wu et al. 2026).

    What the DiT makes of these it can be guided away from (`SamplingConfig.weak_lq`).
    """
    if not config.weak_lq_probability:
        return lq
    which, strength = jax.random.split(key)
    shape = (len(lq), 1, 1, 1)
    is_weak = jax.random.bernoulli(which, config.weak_lq_probability, shape)
    low, high = config.weak_lq
    return jnp.where(is_weak, jax.random.uniform(strength, shape, minval=low, maxval=high), 1) * lq


def gradients(
    config: TrainConfig, params: dict, frozen: dict, batch: dict, key, adversarial: bool
) -> tuple[dict, dict]:
    timestep_key, noise_key, weak_key = *jax.random.split(key), jax.random.fold_in(key, 2)

    def condition(x):  # whole latents, even where the encoder divided the height of the images over devices
        x = jnp.repeat(x, config.noise_draws, 0)
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    clean, lq = (condition(whiten(latent, frozen["statistics"])) for latent in latents(config, frozen, batch))
    diffused = to_diffused(clean, lq, frozen["statistics"])
    text = jax.tree.map(condition, text_of(batch))
    timesteps = training_timesteps(timestep_key, (clean.shape[0],), config.model.diffusion)
    schedule = linear_schedule(config.model.diffusion)
    lq = weaken(lq, weak_key, config.model.diffusion)

    def loss(generator):
        dit = bind(DiT, config.model.dit, generator["dit"])
        losses = diffusion_loss(
            lambda noisy, t: dit(noisy, t, lq, **text),
            config.model.diffusion.prediction,
            noise_key,
            diffused,
            timesteps,
            schedule,
            config.objective,
            (MACRO_CHANNELS, config.model.lp_vae.coarse.decoder_channels),
        )
        return losses.mean()

    value, gradient = jax.value_and_grad(loss)(params["generator"])
    return {"generator": gradient, "discriminator": {}}, {"loss": value}


def preview(config: TrainConfig, generator: dict, frozen: dict, batch: dict, key) -> list[Array]:
    """What D_f makes of the degraded image's latent, of the sampled one and of the clean one; the images where known.

    Degraded image first, clean image last; cached latents come without them.
    """
    weights, vae = frozen | generator, config.model.lp_vae
    clean, lq = latents(config, frozen, batch)
    keys = jax.random.split(key, lq.shape[0])
    sampled = denoise_latent(weights, config.model, SamplingConfig(), lq, keys, text_of(batch))
    columns = [decode(weights, vae, latent) for latent in (lq, sampled, clean)]
    return [batch["lq"], *columns, batch["image"]] if "image" in batch else columns


def statistics(config: TrainConfig, weights: dict, images: Iterable) -> dict:
    return weights["statistics"]
