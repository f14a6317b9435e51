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
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, PyTree

from zipir_jax.config import SamplingConfig


def conditions(
    condition: PyTree, negative: PyTree | None = None, interval: bool = False
) -> dict[str, PyTree]:
    """What a guided model is to be called with: {"both": the two joined, "alone": the condition}, or one of them.

    `condition` and `negative` are pytrees of the same structure whose leaves have a leading batch axis [b, ...], along
    which they are joined, the negative ones last. Without `negative` there is no guidance, and "alone" suffices; with
    it, "alone" is for the steps outside the interval, if there are any.
    """
    if negative is None:
        return {"alone": condition}
    joined = jax.tree.map(lambda with_, without: jnp.concatenate([with_, without]), condition, negative)
    return {"both": joined} | ({"alone": condition} if interval else {})


def classifier_free_guidance(
    predicts: dict[str, Callable[[Array, Array], Array]],
    guidance: ArrayLike | None,
    share: ArrayLike | None = None,
    interval: tuple[ArrayLike, ArrayLike] | None = None,
) -> Callable[[Array, Array], Array]:
    """The guided `predict(noisy, timesteps)` of those under each of the `conditions`.

    The model is called once, on 2b items, and the difference of what it returns is taken in float32. At timesteps
    outside the interval, first and last of `guided_timesteps`, it is called on the b items alone; all items of a call
    are at one timestep. share: of `rescale`; None: none of it.
    """
    if "both" not in predicts:
        return predicts["alone"]

    def predict_guided(noisy: Array, timesteps: Array) -> Array:
        both = predicts["both"](jnp.concatenate([noisy, noisy]), jnp.concatenate([timesteps, timesteps]))
        conditional, unconditional = jnp.split(both.astype(jnp.float32), 2)
        result = unconditional + guidance * (conditional - unconditional)
        return result if share is None else rescale(result, conditional, share)

    if "alone" not in predicts:
        return predict_guided
    first, last = interval

    def predict_in_interval(noisy: Array, timesteps: Array) -> Array:
        return jax.lax.cond(
            (first <= timesteps[0]) & (timesteps[0] <= last),
            predict_guided,
            lambda *inputs: predicts["alone"](*inputs).astype(jnp.float32),
            noisy,
            timesteps,
        )

    return predict_in_interval


def guided_timesteps(config: SamplingConfig, train_timesteps: int) -> tuple[int, int]:
    """First and last timestep of the guidance interval, whose noise levels are (timestep + 1) / train_timesteps."""
    low, high = config.guidance_interval
    return round(low * train_timesteps) - 1, round(high * train_timesteps) - 1


def rescale(
    guided: Float32[Array, " b *item"], conditional: Float32[Array, " b *item"], share: ArrayLike
) -> Float32[Array, " b *item"]:
    """A share of the guided prediction at the deviation of the conditional one (S. Lin et al. 2024, eq. 15 and 16)."""
    axes = tuple(range(1, guided.ndim))
    # Where the prediction is flat, as an untrained model's is, there is nothing to scale.
    deviation = jnp.maximum(guided.std(axes, keepdims=True), jnp.finfo(jnp.float32).tiny)
    factor = conditional.std(axes, keepdims=True) / deviation
    return guided * (share * factor + 1 - share)


def restoration_guidance(
    denoise: Callable[[Array, Array], Array],
    strength: ArrayLike,
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

    def denoise_faithfully(noisy: Array, timesteps: Array) -> Array:
        clean = denoise(noisy, timesteps)
        pulled = clean[..., :channels] + strength * (target - clean)[..., :channels]
        return jnp.concatenate([pulled, clean[..., channels:]], -1)

    return denoise_faithfully
