"""Samplers: from noise to a clean latent in a few steps. One `lax.scan` each, in float32.

DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models"), from timestep t to the next one, s < t:

    z_0     = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)
    z_s     = sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps + sigma n,  n ~ N(0, 1)        (eq. 12)
    sigma^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)                          (eq. 16)

eta = 0 is deterministic (the paper's sampler), eta = 1 has the posterior variance of DDPM.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from zipir_jax.diffusion.schedule import Schedule, spaced_timesteps


def _normal(keys: Key[Array, " b"], index: int | Array, shape: tuple[int, ...]) -> Float32[Array, " b ..."]:
    """Unit noise [b, *shape], the `index`-th draw of each image's own key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(keys)


def initial_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float32[Array, " b ..."]:
    """Unit noise [b, *shape] to start a sampler from; image i's depends on `keys[i]` and `shape` alone."""
    return _normal(keys, 0, shape)


def ddim(
    denoise: Callable[[Array, Array], Array],
    keys: Key[Array, " b"],
    noisy: Float[Array, " b *item"],
    schedule: Schedule,
    steps: int,
    spacing: str = "trailing",
    eta: float = 0.0,
) -> Float32[Array, " b *item"]:
    """Clean latents from noise by DDIM (Song et al. 2021, eq. 12 and 16).

    `denoise(noisy [b, *item], timesteps [b]) -> eps [b, *item]`; `noisy` is where to start, as a rule
    `initial_noise(keys, item)`. With eta > 0 each image draws the noise of its steps from its own key, so its
    result does not depend on its neighbours in the batch; with eta = 0 the keys are not used.

    Each step goes to the next timestep visited; the last one goes to abar = 1, that is, it returns the
    predicted z_0, with either spacing (diffusers: set_alpha_to_one=True, clip_sample=False). diffusers steps
    to t - floor(T / steps) instead, which is the same where steps divides T and with leading spacing always;
    with trailing spacing and other numbers of steps it misses the timestep it visits next.

    Raises ValueError for steps outside the schedule, an unknown spacing, or eta outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is not between 0 and 1")
    timesteps = spaced_timesteps(len(schedule.signal), steps, spacing)
    signal, noise = schedule.signal[timesteps], schedule.noise[timesteps]
    next_signal, next_noise = np.append(signal[1:], 1.0), np.append(noise[1:], 0.0)
    sigma = eta * next_noise / noise * np.sqrt(1 - np.square(signal / next_signal))
    direction = np.sqrt(np.square(next_noise) - np.square(sigma))
    factors = jnp.asarray(np.stack([signal, noise, next_signal, direction, sigma], axis=1), jnp.float32)

    def step(noisy: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, timestep, (signal, noise, next_signal, direction, sigma) = xs
        eps = denoise(noisy, jnp.full(noisy.shape[0], timestep)).astype(jnp.float32)
        clean = (noisy - noise * eps) / signal
        noisy = next_signal * clean + direction * eps
        if eta > 0:
            noisy += sigma * _normal(keys, index, noisy.shape[1:])  # draw 0 was the initial noise
        return noisy, None

    xs = (jnp.arange(1, steps + 1), jnp.asarray(timesteps), factors)
    return jax.lax.scan(step, noisy.astype(jnp.float32), xs)[0]
