"""The training objective: add noise to a clean latent, ask the model for the noise, or for v.

    z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps                 (Ho et al. 2020, eq. 4)
    z_0 = (z_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)             (eq. 4 solved for z_0; eq. 15)
    L   = E || eps - eps_model(z_t, t) ||^2                                 (eq. 14, the paper's DDPM loss)

    v   = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0                 (Salimans & Ho 2022, appendix D)
    z_0 = sqrt(alpha_bar_t) z_t - sqrt(1 - alpha_bar_t) v

An error of eps counts 1 / 0.0397 times in the clean latent of the noisiest timestep, an error of v once: a model of few
training steps does better with v. The model is seen only as a callable, `predict(noisy, timesteps) -> eps or v`.

Beyond the paper, and off by default, a timestep's loss may be weighted by its ratio of signal to noise,
SNR = alpha_bar_t / (1 - alpha_bar_t), which balances the timesteps against one another (Hang et al. 2023, "Efficient
Diffusion Training via Min-SNR Weighting Strategy", section 3.4),

    w_t = min(SNR, gamma) / SNR  for eps,    min(SNR, gamma) / (SNR + 1)  for v

either of which is min(SNR, gamma) times the squared error of z_0; and the latent's first channels, which carry the
structure of the image, may have losses of their own, added to that of all,

    L + sum_n weight_n E || (target - prediction)[first n channels] ||^2

which is the augmented diffusion training of DC-AE 1.5 (Chen et al. 2025); there n is drawn at random, here the bands of
the latent pyramid are there to be named.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from zipir_jax.config import ObjectiveConfig
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


def predict_clean(predict: Callable, prediction: str, schedule: Schedule) -> Callable:
    """`denoise(noisy, timesteps) -> z_0`, float32, of a model `predict(noisy, timesteps)` of its `prediction`.

    prediction: "eps" (Ho et al. 2020, eq. 15) or "v" (Salimans & Ho 2022, appendix D).
    """

    def denoise(noisy: Array, timesteps: Array) -> Array:
        signal, noise = _factors(schedule, timesteps, noisy.ndim)
        predicted = predict(noisy, timesteps).astype(jnp.float32)
        return (
            signal * noisy - noise * predicted if prediction == "v" else (noisy - noise * predicted) / signal
        )

    return denoise


def diffusion_loss(
    predict: Callable[[Array, Array], Array],
    prediction: str,
    key: Key[Array, ""],
    clean: Float[Array, " b *item"],
    timesteps: Int[Array, " b"],
    schedule: Schedule,
    objective: ObjectiveConfig = ObjectiveConfig(),
    bands: tuple[int, int] = (3, 12),
) -> Float32[Array, " b"]:
    """Each item's mean squared error of the predicted noise (Ho et al. 2020, eq. 14) or of v, in float32.

    `predict(noisy, timesteps)` returns the `prediction`, "eps" or "v", in the shape of `clean`. Item i draws its noise
    from its own key, `fold_in(key, i)`, so its loss depends neither on the other items nor on their number. objective:
    weights of the timesteps, and of extra losses on the first `bands` channels: (those of the macro band, those of
    macro and coarse).
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(clean.shape[0]))
    eps = jax.vmap(lambda item_key: jax.random.normal(item_key, clean.shape[1:], jnp.float32))(keys)
    predicted = predict(add_noise(clean, eps, timesteps, schedule), timesteps).astype(jnp.float32)
    signal, noise = _factors(schedule, timesteps, clean.ndim)
    target = eps if prediction == "eps" else signal * eps - noise * clean
    error = jnp.square(predicted - target)
    loss = jnp.mean(error, axis=tuple(range(1, clean.ndim)))
    for channels, weight in zip(bands, (objective.macro, objective.coarse), strict=True):
        if weight:
            loss += weight * jnp.mean(error[..., :channels], axis=tuple(range(1, clean.ndim)))
    return loss * min_snr_weights(schedule, prediction, objective.min_snr_gamma)[timesteps]


def min_snr_weights(schedule: Schedule, prediction: str, gamma: float) -> Float32[Array, " t"]:
    """w_t of every timestep (Hang et al. 2023, section 3.4); 1 for gamma 0."""
    if not gamma:
        return jnp.ones(len(schedule.signal), jnp.float32)
    # In signal^2 and noise^2, whose sum is 1, neither of which is divided by a signal of zero.
    signal, noise = np.square(schedule.signal), np.square(schedule.noise)
    if prediction == "v":
        return jnp.asarray(np.minimum(signal, gamma * noise), jnp.float32)
    return jnp.asarray(np.minimum(1, gamma * noise / signal), jnp.float32)
