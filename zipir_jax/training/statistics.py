"""Mean and standard deviation of each channel, which the macro band and the DiT's latents are normalised by."""

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Array, Float

from zipir_jax.config import DegradationConfig, LPVAEConfig
from zipir_jax.data.degrade import degrade_item
from zipir_jax.models.layers import area_downsample
from zipir_jax.models.lp_vae import FACTOR, encode

# A channel that never changes has a deviation of 0, or of rounding errors; dividing by that would make noise of it.
SMALLEST_STD = 1e-4


def channel_statistics(name: str, batches: Iterable[Float[Array | np.ndarray, "b h w c"]]) -> dict:
    """{"NAME_mean", "NAME_std"}: float32 [c] each, over all pixels of all batches; std is at least SMALLEST_STD."""
    count, sums, squares = 0, 0.0, 0.0
    for batch in batches:
        values = np.asarray(batch, np.float64).reshape(-1, batch.shape[-1])
        count += len(values)
        sums = sums + values.sum(0)
        squares = squares + np.square(values).sum(0)
    mean = sums / count
    std = np.maximum(np.sqrt(np.maximum(squares / count - mean**2, 0)), SMALLEST_STD)
    return {f"{name}_mean": mean.astype(np.float32), f"{name}_std": std.astype(np.float32)}


def macro_statistics(images: Iterable[Float[np.ndarray, "b h w 3"]]) -> dict:
    """{"macro_mean", "macro_std"} of the images averaged over 32 x 32 pixels (paper section 3.1)."""
    return channel_statistics("macro", (area_downsample(batch, FACTOR) for batch in images))


def latent_statistics(
    config: LPVAEConfig,
    weights: dict,
    images: Iterable[Float[np.ndarray, "b h w 3"]],
    degradation: DegradationConfig | None = None,
) -> dict:
    """{"latent_mean", "latent_std"} of the images' whole latents.

    With a degradation also "residual_std": the root mean square, in units of latent_std, of what it changes.
    """
    encoder = jax.jit(lambda weights, image: encode(weights, config, image))
    names = ("statistics", "coarse_encoder", "fine_encoder")
    weights = jax.device_put({name: weights[name] for name in names})
    changes = []

    def latents():
        for number, batch in enumerate(images):
            latent = encoder(weights, batch)
            if degradation is not None:
                lq = [degrade_item(image, degradation, (number, i)) for i, image in enumerate(batch)]
                change = np.asarray(latent - encoder(weights, np.stack(lq)), np.float64)
                changes.append(np.square(change).mean((0, 1, 2)))
            yield latent

    statistics = channel_statistics("latent", latents())
    if changes:
        change = np.sqrt(np.mean(changes, 0)) / statistics["latent_std"]
        statistics["residual_std"] = np.maximum(change, SMALLEST_STD).astype(np.float32)
    return statistics
