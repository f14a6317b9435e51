"""The programs that `Restorer.restore` runs, with abstract arguments: to compile without weights or pictures."""

import jax
import jax.numpy as jnp

from zipir_jax import restorer
from zipir_jax.config import ModelConfig, SamplingConfig
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.planner import TEXT_BLOCK, Plan
from zipir_jax.weights import abstract_weights


def sampling_weights(config: ModelConfig) -> dict:
    """The weights that a `Restorer` holds, as `jax.ShapeDtypeStruct`."""
    groups = abstract_weights(config)
    needed = {group: groups[group] for group in restorer.NEEDED}
    return jax.eval_shape(lambda weights: restorer.in_compute_dtype(config, weights), needed)


def sampling_programs(
    config: ModelConfig, sampling: SamplingConfig, plan: Plan, branches: int
) -> dict[str, tuple]:
    """{phase: (jitted function, its static arguments, its arrays but the weights, which come first)} of a plan.

    branches of the guidance: 2 with a negative text, else 1. The arrays are `jax.ShapeDtypeStruct`.
    """
    shape = plan.pictures, plan.height, plan.width
    image = jax.ShapeDtypeStruct((*shape, 3), jnp.float32)
    latent = (plan.pictures, plan.height // FACTOR, plan.width // FACTOR, config.dit.latent_channels)
    latent = jax.ShapeDtypeStruct(latent, jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), plan.pictures))
    text = None
    if config.dit.text_width:
        text = {
            "text": jax.ShapeDtypeStruct((plan.pictures, TEXT_BLOCK, config.dit.text_width), jnp.float32),
            "text_lengths": jax.ShapeDtypeStruct((plan.pictures,), jnp.int32),
        }
    texts = text, text if branches == 2 else None
    return {
        "encode": (restorer._encode, (config, plan.encode), (image,)),
        "denoise": (restorer._denoise, (config, sampling), (latent, keys, *texts)),
        "decode": (restorer._decode, (config, plan.decode), (latent, image)),
    }
