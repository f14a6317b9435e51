"""Mean and standard deviation of each channel, which the macro band and the DiT's latents are normalised by."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A channel that never changes has a deviation of 0, or of rounding errors; dividing by that would make noise of it.
SMALLEST_STD = 1e-4


def channel_statistics(name: str, batches: Iterable[Float[Array | np.ndarray, "b h w c"]]) -> dict:
    """{"NAME_mean", "NAME_std"}: float32 [c] each, over all pixels of all batches; std is at least SMALLEST_STD."""
    values = np.concatenate([np.asarray(batch).reshape(-1, batch.shape[-1]) for batch in batches])
    std = np.maximum(values.std(0, dtype=np.float64), SMALLEST_STD)
    return {
        f"{name}_mean": jnp.asarray(values.mean(0, dtype=np.float64), jnp.float32),
        f"{name}_std": jnp.asarray(std, jnp.float32),
    }
