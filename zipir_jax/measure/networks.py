"""What the measurements share: networks with random weights, on which time and memory do not depend, and a clock."""

import jax
import jax.numpy as jnp

from zipir_jax.config import ModelConfig
from zipir_jax.restorer import in_compute_dtype
from zipir_jax.weights import abstract_weights

ATTENTION = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}  # the fastest implementation of each platform


def random_weights(config: ModelConfig, groups: tuple[str, ...]) -> dict:
    """Groups of weights in the dtypes of sampling: random kernels, the same ones in every layer.

    Drawn layer by layer, 3.12 billion numbers would take minutes on a CPU.
    """

    def draw(path, leaf):
        if path[-1].key == "kernel":
            inputs = leaf.shape[-2] * (1 if path[0].key == "dit" else leaf.shape[0] * leaf.shape[1])
            shape = leaf.shape[-2:] if path[0].key == "dit" else leaf.shape
            values = jax.random.normal(jax.random.key(0), shape) / inputs**0.5
        else:
            values = jnp.float32(path[-1].key in ("scale", "macro_std", "latent_std"))
        return jnp.broadcast_to(values, leaf.shape)

    def create():
        weights = jax.tree.map_with_path(draw, {group: abstract[group] for group in groups})
        return in_compute_dtype(config, weights)

    abstract = abstract_weights(config)
    return jax.jit(create)()
