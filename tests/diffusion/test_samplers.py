import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig
from zipir_jax.diffusion import samplers
from zipir_jax.diffusion.samplers import ddim, initial_noise
from zipir_jax.diffusion.schedule import linear_schedule, spaced_timesteps

DIFFUSERS = pathlib.Path(__file__).parents[1] / "parity" / "ddim.npz"
SCHEDULE = linear_schedule(DiffusionConfig())
SHAPE = (3, 2, 4)


def toy_denoise(noisy, timesteps):
    """A per-image, non-linear stand-in for a network."""
    time = timesteps.reshape((-1,) + (1,) * (noisy.ndim - 1)) / 1000
    return jnp.tanh(noisy + jnp.mean(noisy, axis=(1, 2, 3), keepdims=True)) * (0.3 + time)


def gaussian_denoise(mean, std):
    """The exact eps(z_t, t) = E[eps | z_t] when z_0 ~ N(mean, std^2)."""

    def denoise(noisy, timesteps):
        shape = (-1,) + (1,) * (noisy.ndim - 1)
        signal = jnp.asarray(SCHEDULE.signal, jnp.float32)[timesteps].reshape(shape)
        noise = jnp.asarray(SCHEDULE.noise, jnp.float32)[timesteps].reshape(shape)
        return noise * (noisy - signal * mean) / (signal**2 * std**2 + noise**2)

    return denoise


def trajectory(denoise, keys, noisy, steps, spacing, eta):
    """The latents at every timestep visited, then the result, by running the scan as a Python loop."""
    latents = []

    def recorded(noisy, timesteps):
        latents.append(np.asarray(noisy))
        return denoise(noisy, timesteps)

    with jax.disable_jit():
        latents.append(np.asarray(ddim(recorded, keys, noisy, SCHEDULE, steps, spacing, eta)))
    return np.stack(latents)


@pytest.mark.parametrize(
    ("spacing", "steps", "eta"),
    [
        ("trailing", 25, 0.0),
        ("leading", 25, 0.0),
        ("leading", 30, 0.0),
        ("trailing", 25, 0.5),
        ("leading", 25, 0.5),
        ("trailing", 10, 1.0),
    ],
)
def test_ddim_gives_the_numbers_of_diffusers(spacing, steps, eta, monkeypatch):
    with np.load(DIFFUSERS) as file:
        prefix = f"{spacing}_{steps}_{eta}_"
        eps, noise, expected = (jnp.asarray(file[prefix + name]) for name in ("eps", "noise", "latents"))
        visited = jnp.asarray(file[prefix + "timesteps"])
    # diffusers' step noise in the place of ours; draw 0 is the initial noise.
    monkeypatch.setattr(samplers, "_normal", lambda keys, index, shape: noise[index - 1])

    def denoise(noisy, timesteps):
        return eps[jnp.argmax(visited == timesteps[0])]

    keys = jax.random.split(jax.random.key(0), 2)
    latents = trajectory(denoise, keys, expected[0], steps, spacing, eta)
    assert latents.shape == expected.shape
    np.testing.assert_allclose(latents, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    compiled = jax.jit(lambda noisy: ddim(denoise, keys, noisy, SCHEDULE, steps, spacing, eta))(expected[0])
    np.testing.assert_allclose(compiled, expected[-1], atol=1e-5 * np.abs(expected).max(), rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.5), (-1.0, 1.0)])
def test_ddim_converges_at_first_order_to_the_probability_flow(mean, std):
    keys = jax.random.split(jax.random.key(1), 2)
    noisy = initial_noise(keys, SHAPE)
    signal, noise = SCHEDULE.signal[-1], SCHEDULE.noise[-1]
    exact = mean + std * (np.asarray(noisy, np.float64) - signal * mean) / np.sqrt(
        signal**2 * std**2 + noise**2
    )

    def error(steps):
        result = ddim(gaussian_denoise(mean, std), keys, noisy, SCHEDULE, steps)
        return np.abs(np.asarray(result) - exact).max()

    errors = np.array([error(steps) for steps in (50, 100, 200, 400)])
    assert errors[-1] < 0.015
    ratios = errors[:-1] / errors[1:]
    assert np.all((ratios > 1.75) & (ratios < 2.1))  # twice the steps, half the error


def test_last_step_returns_the_predicted_clean_latent():
    keys = jax.random.split(jax.random.key(2), 2)
    noisy = initial_noise(keys, SHAPE)
    timestep = jnp.full(2, 999)
    clean = (noisy - SCHEDULE.noise[999] * toy_denoise(noisy, timestep)) / SCHEDULE.signal[999]
    for eta in (0.0, 1.0):
        np.testing.assert_allclose(ddim(toy_denoise, keys, noisy, SCHEDULE, 1, eta=eta), clean, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_and_correlations_for_a_single_clean_latent(eta):
    # With all data at one point mu eq. 12 is exact at any step size: z_s ~ N(sqrt(abar_s) mu, 1 - abar_s) at
    # each timestep, and with eta = 1 the chain is that of DDPM's forward process run backwards, with
    # covariance sqrt(abar_t / abar_s) (1 - abar_s).
    mean, steps = 0.7, 8
    keys = jax.random.split(jax.random.key(3), 2)
    signal, noise = (factor[spaced_timesteps(1000, steps)] for factor in (SCHEDULE.signal, SCHEDULE.noise))
    start = signal[0] * mean + noise[0] * initial_noise(keys, (128, 128, 1))
    latents = trajectory(gaussian_denoise(mean, 0.0), keys, start, steps, "trailing", eta)
    unit = (latents[:-1].reshape(steps, -1) - signal[:, None] * mean) / noise[:, None]
    # 32 768 values: the variance is known to 0.008, the correlation to 0.006.
    np.testing.assert_allclose(unit.mean(axis=1), 0, atol=0.03)
    np.testing.assert_allclose(unit.var(axis=1), 1, atol=0.04)
    correlation = np.mean(unit[1:] * unit[:-1], axis=1)
    forward = signal[:-1] / signal[1:] * noise[1:] / noise[:-1]
    np.testing.assert_allclose(correlation, np.sqrt(1 - eta**2 * (1 - forward**2)), atol=0.04)
    np.testing.assert_allclose(latents[-1], mean, atol=1e-4)


def test_samples_have_the_variance_of_the_data_with_eta_one():
    mean, std = 0.4, 0.6
    keys = jax.random.split(jax.random.key(4), 4)

    def sample(keys):
        noisy = initial_noise(keys, (64, 64, 1))
        return ddim(gaussian_denoise(mean, std), keys, noisy, SCHEDULE, 500, eta=1.0)

    samples = np.asarray(jax.jit(sample)(keys))
    assert abs(samples.mean() - mean) < 0.03
    assert abs(samples.std() - std) < 0.02  # 16 384 values: known to 0.003


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_an_image_does_not_depend_on_its_neighbours(eta):
    keys = jax.random.split(jax.random.key(5), 3)

    @jax.jit
    def sample(keys):
        return ddim(toy_denoise, keys, initial_noise(keys, SHAPE), SCHEDULE, 10, eta=eta)

    together = sample(keys)
    for image in range(3):
        np.testing.assert_allclose(sample(keys[image : image + 1])[0], together[image], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(together[0] - together[1])).max() > 0.1


def test_step_noise_is_fresh_at_every_step_and_unlike_the_initial_noise():
    keys = jax.random.split(jax.random.key(6), 2)
    draws = np.stack([samplers._normal(keys, index, (32, 32)) for index in range(4)]).reshape(8, -1)
    correlation = np.corrcoef(draws) - np.eye(8)
    assert np.abs(correlation).max() < 0.15  # 1024 values: known to 0.03


def primitives(jaxpr):
    """The names of all operations, those of inner functions and loops included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "jaxpr"):
                value = value.jaxpr
            if hasattr(value, "eqns"):
                yield from primitives(value)


def test_sampling_is_one_scan_compiled_once_for_all_seeds():
    traces = []

    def denoise(noisy, timesteps):
        traces.append(noisy.shape)
        return toy_denoise(noisy, timesteps)

    @jax.jit
    def sample(keys):
        return ddim(denoise, keys, initial_noise(keys, SHAPE), SCHEDULE, 25, eta=0.5)

    first, second = jax.random.split(jax.random.key(7), 2), jax.random.split(jax.random.key(8), 2)
    names = list(primitives(jax.make_jaxpr(sample)(first).jaxpr))
    assert names.count("scan") == 1
    assert names.count("while") == 0
    traces.clear()
    different = sample(first) - sample(second)
    assert np.abs(np.asarray(different)).max() > 0.1
    assert sample._cache_size() == 1
    assert len(traces) <= 1  # none anew for the second seeds


def test_bfloat16_model_still_samples_in_float32():
    keys = jax.random.split(jax.random.key(9), 2)
    noisy = initial_noise(keys, SHAPE)
    result = ddim(lambda noisy, t: toy_denoise(noisy, t).astype(jnp.bfloat16), keys, noisy, SCHEDULE, 5)
    assert result.dtype == jnp.float32


def test_settings_out_of_range_are_named():
    keys = jax.random.split(jax.random.key(0), 1)
    noisy = initial_noise(keys, SHAPE)
    with pytest.raises(ValueError, match=r"^eta 1\.5 is not between 0 and 1"):
        ddim(toy_denoise, keys, noisy, SCHEDULE, 25, eta=1.5)
    with pytest.raises(ValueError, match=r"^1001 sampling steps"):
        ddim(toy_denoise, keys, noisy, SCHEDULE, 1001)
