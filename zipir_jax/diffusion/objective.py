"""The training objective: add noise to a clean latent, ask the model for the noise, or for v.

    z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps                 (Ho et al. 2020, eq. 4)
    z_0 = (z_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)             (eq. 4 solved for z_0; eq. 15)
    L   = E || eps - eps_model(z_t, t) ||^2                                 (eq. 14, the paper's DDPM loss)

    v   = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0                 (Salimans & Ho 2022, appendix D)
    eps = sqrt(1 - alpha_bar_t) z_t + sqrt(alpha_bar_t) v

An error of eps counts 1 / 0.0397 times in the clean latent of the noisiest timestep, an error of v once: a model of few
training steps does better with v. The model is seen only as a callable, `predict(noisy, timesteps) -> eps or v`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from zipir_jax.diffusion.schedule import Schedule


def _factors(
    schedule: Schedule, timesteps: Int[Array, " b"], ndim: int
) -> tuple[Float32[Array, " b ..."], Float32[Array, " b ..."]]:
    """Each item's signal and noise factor, [b, 1, ...] with `ndim` axes so that they multiply a latent."""
    shape = (-1,) + (1,) * (ndim - 1)
    signal = jnp.asarray(schedule.signal, jnp.float32)[timesteps].reshape(shape)
    noise = jnp.asarray(schedule.noise, jnp.float32)[timesteps].reshape(shape)
    return signal, noise


def add_noise(
    clean: Float[Array, " b *item"],
    eps: Float[Array, " b *item"],
    timesteps: Int[Array, " b"],
    schedule: Schedule,
) -> Float32[Array, " b *item"]:
    """The noisy latent z_t of a clean latent z_0 and unit noise eps (Ho et al. 2020, eq. 4)."""
    signal, noise = _factors(schedule, timesteps, clean.ndim)
    return signal * clean + noise * eps


def predict_clean(
    noisy: Float[Array, " b *item"],
    eps: Float[Array, " b *item"],
    timesteps: Int[Array, " b"],
    schedule: Schedule,
) -> Float32[Array, " b *item"]:
    """The clean latent z_0 that a noisy latent z_t and its noise eps imply (Ho et al. 2020, eq. 15)."""
    signal, noise = _factors(schedule, timesteps, noisy.ndim)
    return (noisy - noise * eps) / signal


def predict_eps(predict: Callable, prediction: str, schedule: Schedule) -> Callable:
    """`denoise(noisy, timesteps) -> eps` of a model `predict(noisy, timesteps)` of its `prediction`.

    prediction: "eps" or "v" (Salimans & Ho 2022, appendix D); float32.
    """
    if prediction == "eps":
        return predict

    def denoise(noisy: Array, timesteps: Array) -> Array:
        signal, noise = _factors(schedule, timesteps, noisy.ndim)
        return noise * noisy + signal * predict(noisy, timesteps).astype(jnp.float32)

    return denoise


def diffusion_loss(
    predict: Callable[[Array, Array], Array],
    prediction: str,
    key: Key[Array, ""],
    clean: Float[Array, " b *item"],
    timesteps: Int[Array, " b"],
    schedule: Schedule,
) -> Float32[Array, " b"]:
    """Each item's mean squared error of the predicted noise (Ho et al. 2020, eq. 14) or of v, in float32.

    `predict(noisy, timesteps)` returns the `prediction`, "eps" or "v", in the shape of `clean`. Item i draws its noise
    from its own key, `fold_in(key, i)`, so its loss depends neither on the other items nor on their number.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(clean.shape[0]))
    eps = jax.vmap(lambda item_key: jax.random.normal(item_key, clean.shape[1:], jnp.float32))(keys)
    predicted = predict(add_noise(clean, eps, timesteps, schedule), timesteps).astype(jnp.float32)
    signal, noise = _factors(schedule, timesteps, clean.ndim)
    target = eps if prediction == "eps" else signal * eps - noise * clean
    return jnp.mean(jnp.square(predicted - target), axis=tuple(range(1, clean.ndim)))
