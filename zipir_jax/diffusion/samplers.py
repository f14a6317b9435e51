"""Samplers: from noise to a clean latent in a few steps, all of them alike, in float32.

All are linear in what they have seen: the latents z and the clean latents x = x(z_t, t) that the model predicted. So a
sampler is a table of numbers, a row for each step from timestep t to the next one, s, that were worked out on the host
in float64. With signal a = sqrt(abar), noise b = sqrt(1 - abar), and their log ratio l = ln(a / b), rising by
h = l_s - l_t:

DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16), first order:

    z_s     = a_s x_t + sqrt(b_s^2 - sigma^2) eps_t + sigma n,    eps_t = (z_t - a_t x_t) / b_t,  n ~ N(0, 1)
    sigma^2 = eta^2 (b_s / b_t)^2 (1 - (a_t / a_s)^2)

eta = 0 is deterministic (the paper's sampler), eta = 1 has the posterior variance of DDPM.

DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2), second order; r is the step before / this step, in l:

    z_s = (b_s / b_t) z_t + (a_s - b_s a_t / b_t) D,    D = x_t + (x_t - x_before) / (2 r)

UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", of order 2 with B_2(h), in its form for
predicted clean latents): its predictor is the line above, and once the model has seen z_s, x_s corrects it at no cost:

    z_s = (b_s / b_t) z_t + (a_s - b_s a_t / b_t) (x_t + c_1 (x_before - x_t) / r_1 + c_2 (x_s - x_t))

where r_1 = -r and c solves the two conditions of its order. The first step has no x_before: c_2 = 1/2.
The last step, to b_s = 0, is of first order in all three: it returns the predicted clean latent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int, Key

from zipir_jax.config import SAMPLERS
from zipir_jax.diffusion.schedule import Schedule

SMALLEST_SIGNAL = 1e-30  # whose log ratio stands for that of no signal at all, which would be infinite


class Table(NamedTuple):
    """A sampler's numbers, a row for each step."""

    # Of z_t, the latent corrected before it, x_t and the two predictions before it: they sum to the corrected z_t.
    corrector: Float64[np.ndarray, "steps 5"]
    predictor: Float64[np.ndarray, "steps 3"]  # of the corrected z_t, x_t and the prediction before it
    sigma: Float64[np.ndarray, " steps"] | None  # of fresh noise; None: there is none


class Step(NamedTuple):
    """What tells one step from another; of several steps, with a leading axis."""

    draw: Int[np.ndarray, "..."]  # of the images' noise; draw 0 is what sampling starts from
    timestep: Int[np.ndarray, "..."]
    numbers: Table


Carry = tuple[Array, Array, Array, Array]  # z_t, the corrected latent before it, the last two predictions


def _normal(keys: Key[Array, " b"], index: int | Array, shape: tuple[int, ...]) -> Float32[Array, " b ..."]:
    """Unit noise [b, *shape], the `index`-th draw of each image's own key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32))(keys)


def initial_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float32[Array, " b ..."]:
    """Unit noise [b, *shape] to start a sampler from; image i's depends on `keys[i]` and `shape` alone."""
    return _normal(keys, 0, shape)


def plan_steps(
    schedule: Schedule, timesteps: Int[np.ndarray, " steps"], sampler: str = "ddim", eta: float = 0.0
) -> Step:
    """The steps through `timesteps`, which fall, as numpy arrays with a leading axis; what does not act is None.

    sampler: "ddim", "dpm-solver++" or "unipc". eta in [0, 1], which DDIM alone takes. Each step goes to the next
    timestep visited, the last one to abar = 1 (diffusers: final_sigmas_type="zero" or set_alpha_to_one=True).
    diffusers' DDIM steps to t - floor(T / steps) instead, which with trailing spacing misses the timestep it visits
    next unless steps divides T.

    Raises ValueError for an unknown sampler.
    """
    signal, noise = np.append(schedule.signal[timesteps], 1.0), np.append(schedule.noise[timesteps], 0.0)
    if sampler == "ddim":
        table = ddim_table(signal, noise, eta)
    elif sampler == "dpm-solver++":
        table = dpm_solver_table(signal, noise)
    elif sampler == "unipc":
        table = unipc_table(signal, noise)
    else:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    draws = np.arange(1, len(timesteps) + 1, dtype=np.int32)
    table = jax.tree.map(lambda numbers: numbers.astype(np.float32), table)
    return Step(draws, np.asarray(timesteps, np.int32), table)


def begin(noisy: Float[Array, " b *item"]) -> Carry:
    """What the first step starts from, given latents at its timestep."""
    noisy = noisy.astype(jnp.float32)
    return noisy, *(jnp.zeros_like(noisy) for _ in range(3))


def take_step(
    denoise: Callable[[Array, Array], Array], keys: Key[Array, " b"], carry: Carry, step: Step
) -> Carry:
    """One step, by one evaluation of the model; the first array of the result is the latent at the next timestep.

    `denoise(noisy [b, *item], timesteps [b]) -> predicted clean latents [b, *item]`. Where there is fresh noise, each
    image draws it from its own key, so its result does not depend on its neighbours in the batch; else the keys are not
    used.
    """
    noisy, last, before, earlier = carry
    draw, timestep, (corrector, predictor, sigma) = step
    clean = denoise(noisy, jnp.full(noisy.shape[0], timestep)).astype(jnp.float32)
    corrected = _combine(corrector, noisy, last, clean, before, earlier)
    following = _combine(predictor, corrected, clean, before)
    if sigma is not None:
        following += sigma * _normal(keys, draw, noisy.shape[1:])
    return following, corrected, clean, before


def sample(
    denoise: Callable[[Array, Array], Array],
    keys: Key[Array, " b"],
    noisy: Float[Array, " b *item"],
    steps: Step,
) -> Float32[Array, " b *item"]:
    """Clean latents from noisy ones at the first timestep, by one `lax.scan` of `take_step`; steps: of `plan_steps`."""
    steps = jax.tree.map(jnp.asarray, steps)
    return jax.lax.scan(
        lambda *carry_step: (take_step(denoise, keys, *carry_step), None), begin(noisy), steps
    )[0][0]


def _combine(weights, *arrays):
    return sum(weight * array for weight, array in zip(weights, arrays, strict=True))


def ddim_table(
    signal: Float64[np.ndarray, " n"], noise: Float64[np.ndarray, " n"], eta: float = 0.0
) -> Table:
    """DDIM through these n levels, in n - 1 steps (Song et al. 2021, eq. 12 and 16)."""
    sigma = eta * noise[1:] / noise[:-1] * np.sqrt(1 - np.square(signal[:-1] / signal[1:]))
    kept = np.sqrt(np.square(noise[1:]) - np.square(sigma)) / noise[:-1]
    predictor = np.stack([kept, signal[1:] - kept * signal[:-1], np.zeros(len(kept))], axis=1)
    return Table(_no_corrector(len(kept)), predictor, sigma if eta else None)


def dpm_solver_table(signal: Float64[np.ndarray, " n"], noise: Float64[np.ndarray, " n"]) -> Table:
    """DPM-Solver++(2M) through these n levels, in n - 1 steps (Lu et al. 2022, algorithm 2)."""
    steps = len(signal) - 1
    return Table(_no_corrector(steps), _second_order(signal, noise), None)


def unipc_table(signal: Float64[np.ndarray, " n"], noise: Float64[np.ndarray, " n"]) -> Table:
    """UniPC of order 2 through these n levels, in n - 1 steps (Zhao et al. 2023).

    Row i corrects what row i - 1 predicted; row 0 has nothing to correct.
    """
    steps = len(signal) - 1
    corrector, rises = _no_corrector(steps), _rises(signal, noise)
    for i in range(1, steps):
        kept = noise[i] / noise[i - 1]
        gain, h = signal[i] - kept * signal[i - 1], rises[i - 1]
        if i == 1:
            bend, c = 0.0, 0.5
        else:
            # The conditions c_1 + c_2 = g_1 and c_1 r_1 + c_2 = g_2, where g are integrals of the exponential.
            r = -rises[i - 2] / h
            g_1 = 1 / -np.expm1(-h) - 1 / h
            g_2 = 2 * (0.5 / -np.expm1(-h) - g_1 / h)
            c_1 = (g_1 - g_2) / (1 - r)
            bend, c = c_1 / r, g_1 - c_1
        # z_t itself has no part in it: it follows from what came before, as its correction does.
        corrector[i] = 0, kept, gain * c, gain * (1 - bend - c), gain * bend
    return Table(corrector, _second_order(signal, noise), None)


def _second_order(signal, noise):
    """The predictor of DPM-Solver++(2M), and of UniPC; its first and its last step are of first order."""
    steps = len(signal) - 1
    kept = noise[1:] / noise[:-1]
    gain = signal[1:] - kept * signal[:-1]
    bend = np.zeros(steps)
    rises = _rises(signal, noise)
    bend[1:-1] = rises[1:] / (2 * rises[:-1])
    return np.stack([kept, gain * (1 + bend), -gain * bend], axis=1)


def _rises(signal, noise):
    """By how much the log ratio of signal to noise rises in each step but the last, to no noise at all."""
    return np.diff(np.log(np.maximum(signal[:-1], SMALLEST_SIGNAL) / noise[:-1]))


def _no_corrector(steps):
    return np.tile([1.0, 0, 0, 0, 0], (steps, 1))
