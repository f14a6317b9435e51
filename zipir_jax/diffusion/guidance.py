"""Guidance: what pushes a prediction, step by step, away from a negative condition, or towards the degraded image.

Classifier-free guidance extrapolates from the model's prediction p under a negative condition to that under the
condition (Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6, with w = 1 + their w and the negative prompt
in the place of the empty condition):

    p = p(z_t, negative) + w (p(z_t, condition) - p(z_t, negative))

The paper uses w = 3.5; w = 1 is the conditional model alone. p is what the model predicts, eps or v: at a given z_t
either, and the clean latent, is a linear function of the other, so that w means the same for all. Where w is large, the
result has more contrast than any image; a share phi of it may be scaled to the conditional prediction's deviation over
an image (S. Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", eq. 15 and 16):

    p <- phi p std(p(z_t, condition)) / std(p) + (1 - phi) p

and w may act within an interval of noise levels alone (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited
Interval Improves Sample and Distribution Quality in Diffusion Models"); beyond it the model is called once, not twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PyTree

from zipir_jax.config import SamplingConfig


def classifier_free_guidance(
    prepare: Callable[[PyTree], Callable[[Array, Array], Array]],
    config: SamplingConfig,
    train_timesteps: int,
    condition: PyTree,
    negative: PyTree | None = None,
) -> Callable[[Array, Array], Array]:
    """The guided `predict(noisy, timesteps)`, where `prepare(condition)` returns the one of a condition.

    `condition` and `negative` are pytrees of the same structure whose leaves have a leading batch axis [b, ...]. They
    are joined along it and prepared here, once, not at each step; the model is then called once, on 2b items, the
    negative ones last, and the difference of what it returns is taken in float32. With guidance 1 (a Python number,
    known when tracing) or without `negative` the model is called on the b items alone, as it is at timesteps outside
    the guidance interval; all items of a call are at one timestep.
    """
    if config.guidance == 1 or negative is None:
        return prepare(condition)

    predict = prepare(
        jax.tree.map(lambda with_, without: jnp.concatenate([with_, without]), condition, negative)
    )

    def predict_guided(noisy: Array, timesteps: Array) -> Array:
        both = predict(jnp.concatenate([noisy, noisy]), jnp.concatenate([timesteps, timesteps]))
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
        result = unconditional + config.guidance * (conditional - unconditional)
        return rescale(result, conditional, config.guidance_rescale)

    if config.guidance_interval == (0, 1):
        return predict_guided
    first, last = guided_timesteps(config, train_timesteps)

    alone = prepare(condition)

    def predict_in_interval(noisy: Array, timesteps: Array) -> Array:
        return jax.lax.cond(
            (first <= timesteps[0]) & (timesteps[0] <= last),
            predict_guided,
            lambda *inputs: alone(*inputs).astype(jnp.float32),
            noisy,
            timesteps,
        )

    return predict_in_interval


def guided_timesteps(config: SamplingConfig, train_timesteps: int) -> tuple[int, int]:
    """First and last timestep of the guidance interval, whose noise levels are (timestep + 1) / train_timesteps."""
    low, high = config.guidance_interval
    return round(low * train_timesteps) - 1, round(high * train_timesteps) - 1


def rescale(
    guided: Float32[Array, " b *item"], conditional: Float32[Array, " b *item"], share: float
) -> Float32[Array, " b *item"]:
    """A share of the guided prediction at the deviation of the conditional one (S. Lin et al. 2024, eq. 15 and 16)."""
    if not share:
        return guided
    axes = tuple(range(1, guided.ndim))
    # Where the prediction is flat, as an untrained model's is, there is nothing to scale.
    deviation = jnp.maximum(guided.std(axes, keepdims=True), jnp.finfo(jnp.float32).tiny)
    factor = conditional.std(axes, keepdims=True) / deviation
    return guided * (share * factor + 1 - share)


def restoration_guidance(
    denoise: Callable[[Array, Array], Array],
    strength: float,
    target: Float[Array, "b h w c"],
    channels: int,
) -> Callable[[Array, Array], Array]:
    """`denoise(noisy, timesteps) -> z_0` whose first channels are pulled towards those of `target`.

        z_0 <- z_0 - strength grad 1/2 || z_0 - target ||^2 = z_0 + strength (target - z_0)

    Restoration guidance (X. Lin et al. 2024, "DiffBIR"): a gradient step on the distance between the predicted clean
    latent and a faithful one. DiffBIR's target is an image whose degradation a first network has removed; ours is the
    degraded image, and only in the bands of the latent that hold low frequencies, so no decoder is differentiated. 0
    leaves the prediction, 1 replaces the bands; as what is pulled at one step is seen at the next, pulls add up.
    """
    if not strength:
        return denoise

    def denoise_faithfully(noisy: Array, timesteps: Array) -> Array:
        clean = denoise(noisy, timesteps)
        pulled = clean[..., :channels] + strength * (target - clean)[..., :channels]
        return jnp.concatenate([pulled, clean[..., channels:]], -1)

    return denoise_faithfully
