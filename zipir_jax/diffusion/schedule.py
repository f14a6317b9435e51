"""The noise schedule: how much signal and noise a latent holds at each timestep, and which ones are used.

With betas linear between two values, alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 ... alpha_t (Ho et al.
2020, "Denoising Diffusion Probabilistic Models", above eq. 4), a noisy latent is

    z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps        (eq. 4)

Timesteps count from 0 (least noise) to T - 1 (most noise), so `signal[t]` is sqrt(alpha_bar_{t+1}) there. The
numbers of ZipIR, supplement A, are T = 1000 and beta from 0.00085 to 0.012, so sqrt(alpha_bar_T) = 0.0397: what is
learned there still sees the mean of the image, which sampling, from noise alone, does not have. Lin et al. 2024,
"Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1, scale the signal so that it ends at zero,

    s_t <- (s_t - s_T) s_1 / (s_1 - s_T)       with s = sqrt(alpha_bar)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Key

from zipir_jax.config import SPACINGS, DiffusionConfig, SamplingConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Signal and noise factors of every timestep, on the host; cast to float32 where they meet a latent."""

    signal: Float64[np.ndarray, " t"]  # sqrt(alpha_bar)
    noise: Float64[np.ndarray, " t"]  # sqrt(1 - alpha_bar)


def linear_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule with betas linear from `beta_start` to `beta_end` (Ho et al. 2020, section 4; eq. 4).

    With `zero_terminal_snr` its signal is scaled to end at zero (Lin et al. 2024, algorithm 1). float64, since
    1 - alpha_bar starts at 0.00085 and the product has 1000 factors.
    """
    betas = np.linspace(config.beta_start, config.beta_end, config.train_timesteps, dtype=np.float64)
    signal = np.sqrt(np.cumprod(1.0 - betas))
    if config.zero_terminal_snr:
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return Schedule(signal=signal, noise=np.sqrt(1.0 - np.square(signal)))


def spaced_timesteps(
    train_timesteps: int, steps: int, spacing: str = "trailing"
) -> Int[np.ndarray, " steps"]:
    """The timesteps that a sampler of `steps` steps visits, from most noise to least.

    "trailing": t_i = round(T - i T / steps) - 1, which starts at T - 1, the noisiest level of training (Lin
    et al. 2024, table 2).
    "linspace": t_i = round((T - 1) (1 - i / (steps - 1))), from T - 1 to 0, both of them; one step is at T - 1.
    "leading": t_i = (steps - 1 - i) floor(T / steps) + 1, for comparison with older work: 25 steps start at
    t = 961. All are the numbers of diffusers' DDIMScheduler, the latter with steps_offset=1, except that the
    rounding of its trailing spacing can be off by one at a tie (48 steps of 1000) or return a timestep too
    many (61 steps), and that its linspace of one step is at 0.

    Raises ValueError for steps outside 1 .. T (1 .. T - 1 with leading spacing), or an unknown spacing.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"timestep spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    # The offset of one leaves no room for a leading sequence of all T timesteps.
    most = train_timesteps - 1 if spacing == "leading" else train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampling steps are not between 1 and {most} ({spacing} spacing)")
    index = np.arange(steps)
    if spacing == "linspace":
        return np.round(np.linspace(train_timesteps - 1, 0, steps)).astype(np.int32)
    if spacing == "trailing":
        return np.round(train_timesteps - index * (train_timesteps / steps)).astype(np.int32) - 1
    return ((steps - 1 - index) * (train_timesteps // steps) + 1).astype(np.int32)


def sampling_timesteps(
    schedule: Schedule, config: SamplingConfig, tokens: int = 0
) -> Int[np.ndarray, " steps"]:
    """The timesteps that sampling visits, from most noise to least, for a latent of `tokens`.

    They are spaced over the schedule up to the noise level `start`. With `shift_tokens` = n, a latent of m tokens is
    sampled at levels whose ratio of noise to signal is sqrt(m / n) times that: noise of one level hides less of a
    larger image, whose neighbouring tokens tell more of each other (Hoogeboom et al. 2023, "Simple diffusion", 3.1;
    Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23). The first stays where it is: sampling starts from
    noise, of which less would be a lie.

    Raises ValueError as `spaced_timesteps`, and for so many steps that two of them would share a timestep.
    """
    usable = round(config.start * len(schedule.signal))
    if config.start < 1 and config.steps > usable:
        raise ValueError(
            f"{config.steps} sampling steps, and {usable} noise levels up to start {config.start:g}"
        )
    if not config.shift_tokens or not tokens:
        return spaced_timesteps(usable, config.steps, config.spacing)
    # Of noise to signal; rising. Where there is no signal, that of as little as can be.
    ratio = np.log(schedule.noise / np.maximum(schedule.signal, np.finfo(np.float64).tiny))
    shift = 0.5 * np.log(tokens / config.shift_tokens)
    # Levels that stay within those usable.
    unshifted = int(np.searchsorted(ratio[:usable] + shift, ratio[usable - 1], side="right"))
    timesteps = spaced_timesteps(max(unshifted, config.steps), config.steps, config.spacing)
    shifted = np.interp(ratio[timesteps] + shift, ratio, np.arange(len(ratio)))
    shifted = np.round(shifted).astype(np.int32)
    shifted[0] = spaced_timesteps(usable, config.steps, config.spacing)[0]
    if np.any(np.diff(shifted) >= 0):
        raise ValueError(
            f"{config.steps} sampling steps, shifted from {config.shift_tokens} to {tokens} tokens, share timesteps; "
            "take fewer"
        )
    return shifted


def training_timesteps(
    key: Key[Array, ""], shape: tuple[int, ...], config: DiffusionConfig
) -> Int[Array, "..."]:
    """Random training timesteps, t = floor(T sigmoid(m + s n)) with n ~ N(0, 1), int32 in [0, T).

    Logit-normal sampling of Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1, with
    m = `logit_normal_mean` and s = `logit_normal_std`; it favours the middle of the schedule. A share of them,
    `uniform_share`, is drawn uniformly instead: the middle alone never learns the last level.
    """
    normal = jax.random.normal(key, shape, dtype=jnp.float32)
    fraction = jax.nn.sigmoid(config.logit_normal_mean + config.logit_normal_std * normal)
    timesteps = jnp.floor(fraction * config.train_timesteps).astype(jnp.int32)
    timesteps = jnp.minimum(timesteps, config.train_timesteps - 1)  # sigmoid can round to 1
    if not config.uniform_share:
        return timesteps
    which, level = jax.random.split(jax.random.fold_in(key, 1))
    uniform = jax.random.randint(level, shape, 0, config.train_timesteps)
    return jnp.where(jax.random.bernoulli(which, config.uniform_share, shape), uniform, timesteps)
