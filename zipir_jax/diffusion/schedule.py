"""The noise schedule: how much signal and noise a latent holds at each timestep, and which ones are used.

With betas linear between two values, alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 ... alpha_t (Ho et al.
2020, "Denoising Diffusion Probabilistic Models", above eq. 4), a noisy latent is

    z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps        (eq. 4)

Timesteps count from 0 (least noise) to T - 1 (most noise), so `signal[t]` is sqrt(alpha_bar_{t+1}) there. The
numbers of ZipIR, supplement A, are T = 1000 and beta from 0.00085 to 0.012, so sqrt(alpha_bar_T) = 0.0397.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Key

from zipir_jax.config import DiffusionConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Signal and noise factors of every timestep, on the host; cast to float32 where they meet a latent."""

    signal: Float64[np.ndarray, " t"]  # sqrt(alpha_bar)
    noise: Float64[np.ndarray, " t"]  # sqrt(1 - alpha_bar)


def linear_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule with betas linear from `beta_start` to `beta_end` (Ho et al. 2020, section 4; eq. 4).

    float64, since 1 - alpha_bar starts at 0.00085 and the product has 1000 factors.
    """
    betas = np.linspace(config.beta_start, config.beta_end, config.train_timesteps, dtype=np.float64)
    alpha_bar = np.cumprod(1.0 - betas)
    return Schedule(signal=np.sqrt(alpha_bar), noise=np.sqrt(1.0 - alpha_bar))


def spaced_timesteps(
    train_timesteps: int, steps: int, spacing: str = "trailing"
) -> Int[np.ndarray, " steps"]:
    """The timesteps that a sampler of `steps` steps visits, from most noise to least.

    "trailing": t_i = round(T - i T / steps) - 1, which starts at T - 1, the noisiest level of training (Lin
    et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.3).
    "leading": t_i = (steps - 1 - i) floor(T / steps) + 1, for comparison with older work: 25 steps start at
    t = 961. Both are the numbers of diffusers' DDIMScheduler, the latter with steps_offset=1, except that the
    rounding of its trailing spacing can be off by one at a tie (48 steps of 1000) or return a timestep too
    many (61 steps).

    Raises ValueError for steps outside 1 .. T (trailing) or 1 .. T - 1 (leading), or an unknown spacing.
    """
    if spacing not in ("trailing", "leading"):
        raise ValueError(f'timestep spacing "{spacing}" is neither "trailing" nor "leading"')
    # The offset of one leaves no room for a leading sequence of all T timesteps.
    most = train_timesteps if spacing == "trailing" else train_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps are not between 1 and {most} ({spacing} spacing)")
    index = np.arange(steps)
    if spacing == "trailing":
        return np.round(train_timesteps - index * (train_timesteps / steps)).astype(np.int32) - 1
    return ((steps - 1 - index) * (train_timesteps // steps) + 1).astype(np.int32)


def logit_normal_timesteps(
    key: Key[Array, ""], shape: tuple[int, ...], config: DiffusionConfig
) -> Int[Array, "..."]:
    """Random training timesteps, t = floor(T sigmoid(m + s n)) with n ~ N(0, 1), int32 in [0, T).

    Logit-normal sampling of Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1, with
    m = `logit_normal_mean` and s = `logit_normal_std`; it favours the middle of the schedule.
    """
    normal = jax.random.normal(key, shape, dtype=jnp.float32)
    fraction = jax.nn.sigmoid(config.logit_normal_mean + config.logit_normal_std * normal)
    timesteps = jnp.floor(fraction * config.train_timesteps).astype(jnp.int32)
    return jnp.minimum(timesteps, config.train_timesteps - 1)  # sigmoid can round to 1
