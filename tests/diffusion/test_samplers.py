import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig
from zipir_jax.diffusion import samplers
from zipir_jax.diffusion.objective import predict_clean
from zipir_jax.diffusion.samplers import begin, initial_noise, plan_steps, sample, take_step
from zipir_jax.diffusion.schedule import linear_schedule, spaced_timesteps

pytestmark = pytest.mark.usefixtures("quick_compile")
DIFFUSERS = pathlib.Path(__file__).parents[1] / "parity" / "samplers.npz"
SCHEDULE = linear_schedule(DiffusionConfig())
SAMPLERS = ("ddim", "dpm-solver++", "unipc")
SHAPE = (3, 2, 4)


def toy_denoise(noisy, timesteps):
    """A per-image, non-linear stand-in for a network."""
    time = timesteps.reshape((-1,) + (1,) * (noisy.ndim - 1)) / 1000
    return jnp.tanh(noisy + jnp.mean(noisy, axis=(1, 2, 3), keepdims=True)) * (1.3 - time)


def gaussian_denoise(mean, std, schedule=SCHEDULE):
    """The exact E[z_0 | z_t] when z_0 ~ N(mean, std^2)."""

    def denoise(noisy, timesteps):
        shape = (-1,) + (1,) * (noisy.ndim - 1)
        signal = jnp.asarray(schedule.signal, jnp.float32)[timesteps].reshape(shape)
        noise = jnp.asarray(schedule.noise, jnp.float32)[timesteps].reshape(shape)
        return mean + signal * std**2 * (noisy - signal * mean) / (signal**2 * std**2 + noise**2)

    return denoise


def trailing(steps):
    return spaced_timesteps(1000, steps)


def trajectory(denoise, keys, noisy, timesteps, sampler="ddim", eta=0.0, schedule=SCHEDULE):
    """The latents at every timestep visited, then the result, by running the scan as a Python loop."""
    latents = []

    def recorded(noisy, timesteps):
        latents.append(np.asarray(noisy))
        return denoise(noisy, timesteps)

    with jax.disable_jit():
        steps = plan_steps(schedule, timesteps, sampler, eta)
        latents.append(np.asarray(sample(recorded, keys, noisy, steps)))
    return np.stack(latents)


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps", "eta"),
    [
        ("ddim", "trailing", 25, 0.0),
        ("ddim", "leading", 25, 0.0),
        ("ddim", "leading", 30, 0.0),
        ("ddim", "trailing", 25, 0.5),
        ("ddim", "leading", 25, 0.5),
        ("ddim", "trailing", 10, 1.0),
        *(
            (sampler, *case, 0.0)
            for sampler in ("dpm-solver++", "unipc")
            for case in (
                ("trailing", 1),
                ("trailing", 2),
                ("trailing", 8),
                ("leading", 12),
                ("linspace", 25),
            )
        ),
    ],
)
def test_samplers_give_the_numbers_of_diffusers(sampler, spacing, steps, eta, monkeypatch):
    with np.load(DIFFUSERS) as file:
        prefix = f"{sampler}_{spacing}_{steps}_{eta}_"
        eps, expected = (jnp.asarray(file[prefix + name]) for name in ("eps", "latents"))
        visited, timesteps = jnp.asarray(file[prefix + "timesteps"]), file[prefix + "timesteps"]
        if eta:  # diffusers' step noise in the place of ours; draw 0 is the initial noise
            noise = jnp.asarray(file[prefix + "noise"])
            monkeypatch.setattr(samplers, "_normal", lambda keys, index, shape: noise[index - 1])
    np.testing.assert_array_equal(timesteps, spaced_timesteps(1000, steps, spacing))
    denoise = predict_clean(lambda _, t: eps[jnp.argmax(visited == t[0])], "eps", SCHEDULE)
    keys = jax.random.split(jax.random.key(0), 2)
    latents = trajectory(denoise, keys, expected[0], timesteps, sampler, eta)
    assert latents.shape == expected.shape
    tolerance = {"atol": 1e-5 * np.abs(expected).max(), "rtol": 1e-5}
    np.testing.assert_allclose(latents, expected, **tolerance)
    steps = plan_steps(SCHEDULE, timesteps, sampler, eta)
    compiled = jax.jit(lambda noisy: sample(denoise, keys, noisy, steps))
    np.testing.assert_allclose(compiled(expected[0]), expected[-1], **tolerance)


@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.5), (-1.0, 0.2)])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2), ("unipc", 3)])
def test_samplers_converge_at_their_order_to_the_probability_flow(sampler, order, mean, std):
    """Half way: the last step, from a level that rises with the size of the steps, is of first order in all."""
    keys = jax.random.split(jax.random.key(1), 2)
    noisy, half = initial_noise(keys, SHAPE), 499
    signal, noise = SCHEDULE.signal[[999, half]], SCHEDULE.noise[[999, half]]
    deviation = np.sqrt(signal**2 * std**2 + noise**2)
    unit = (np.asarray(noisy, np.float64) - signal[0] * mean) / deviation[0]

    def error(steps):
        timesteps = trailing(steps)
        latents = trajectory(gaussian_denoise(mean, std), keys, noisy, timesteps, sampler)
        found = latents[np.flatnonzero(timesteps == half)[0]]
        return np.abs(found - (signal[1] * mean + unit * deviation[1])).max()

    errors = np.array([error(steps) for steps in (8, 16, 32)])
    orders = np.log2(errors[:-1] / errors[1:])
    assert np.all(np.abs(orders - order) < 0.4)
    assert abs(orders[-1] - order) < 0.15


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_end_where_the_probability_flow_does(sampler):
    mean, std = 0.7, 0.5
    keys = jax.random.split(jax.random.key(1), 2)
    noisy = initial_noise(keys, SHAPE)
    signal, noise = SCHEDULE.signal[-1], SCHEDULE.noise[-1]
    exact = mean + std * (np.asarray(noisy) - signal * mean) / np.sqrt(signal**2 * std**2 + noise**2)
    errors = []
    for steps in (100, 400):
        found = sample(
            gaussian_denoise(mean, std), keys, noisy, plan_steps(SCHEDULE, trailing(steps), sampler)
        )
        errors.append(np.abs(np.asarray(found) - exact).max())
    assert errors[1] < 0.3 * errors[0] < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_last_step_returns_the_predicted_clean_latent(sampler):
    keys = jax.random.split(jax.random.key(2), 2)
    noisy = initial_noise(keys, SHAPE)
    found = sample(toy_denoise, keys, noisy, plan_steps(SCHEDULE, trailing(1), sampler))
    np.testing.assert_allclose(found, toy_denoise(noisy, jnp.full(2, 999)), rtol=1e-5)
    if sampler == "ddim":
        found = sample(toy_denoise, keys, noisy, plan_steps(SCHEDULE, trailing(1), sampler, eta=1.0))
        np.testing.assert_allclose(found, toy_denoise(noisy, jnp.full(2, 999)), rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_starts_from_no_signal_at_all(sampler):
    """At zero SNR the first prediction is the mean of the data, and what follows is the flow from there."""
    mean, std = 0.7, 0.5
    schedule = linear_schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True, uniform_share=0.1))
    keys = jax.random.split(jax.random.key(1), 2)
    noisy = initial_noise(keys, SHAPE)
    denoise = gaussian_denoise(mean, std, schedule)
    found = sample(denoise, keys, noisy, plan_steps(schedule, trailing(200), sampler))
    np.testing.assert_allclose(found, mean + std * np.asarray(noisy), atol=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_and_correlations_for_a_single_clean_latent(eta):
    # With all data at one point mu eq. 12 is exact at any step size: z_s ~ N(sqrt(abar_s) mu, 1 - abar_s) at
    # each timestep, and with eta = 1 the chain is that of DDPM's forward process run backwards, with
    # covariance sqrt(abar_t / abar_s) (1 - abar_s).
    mean, steps = 0.7, 8
    keys = jax.random.split(jax.random.key(3), 2)
    signal, noise = (factor[spaced_timesteps(1000, steps)] for factor in (SCHEDULE.signal, SCHEDULE.noise))
    start = signal[0] * mean + noise[0] * initial_noise(keys, (128, 128, 1))
    latents = trajectory(gaussian_denoise(mean, 0.0), keys, start, trailing(steps), eta=eta)
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

    def draw(keys):
        noisy = initial_noise(keys, (64, 64, 1))
        return sample(gaussian_denoise(mean, std), keys, noisy, plan_steps(SCHEDULE, trailing(500), eta=1.0))

    samples = np.asarray(jax.jit(draw)(keys))
    assert abs(samples.mean() - mean) < 0.03
    assert abs(samples.std() - std) < 0.02  # 16 384 values: known to 0.003


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("unipc", 0.0)])
def test_an_image_does_not_depend_on_its_neighbours(sampler, eta):
    keys = jax.random.split(jax.random.key(5), 3)

    @jax.jit
    def draw(keys):
        return sample(
            toy_denoise, keys, initial_noise(keys, SHAPE), plan_steps(SCHEDULE, trailing(10), sampler, eta)
        )

    together = draw(keys)
    for image in range(3):
        np.testing.assert_allclose(draw(keys[image : image + 1])[0], together[image], rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.5), ("dpm-solver++", 0.0), ("unipc", 0.0)])
def test_sampling_is_one_scan_compiled_once_for_all_seeds(sampler, eta):
    traces = []

    def denoise(noisy, timesteps):
        traces.append(noisy.shape)
        return toy_denoise(noisy, timesteps)

    @jax.jit
    def draw(keys):
        return sample(
            denoise, keys, initial_noise(keys, SHAPE), plan_steps(SCHEDULE, trailing(25), sampler, eta)
        )

    first, second = jax.random.split(jax.random.key(7), 2), jax.random.split(jax.random.key(8), 2)
    names = list(primitives(jax.make_jaxpr(draw)(first).jaxpr))
    assert names.count("scan") == 1
    assert names.count("while") == 0
    traces.clear()
    different = draw(first) - draw(second)
    assert np.abs(np.asarray(different)).max() > 0.1
    assert draw._cache_size() == 1
    assert len(traces) <= 1  # none anew for the second seeds


def test_one_program_takes_every_step_of_every_sampler():
    """The steps one by one, compiled once for all samplers, timesteps and numbers of steps, are the scan."""
    keys, noisy = (
        jax.random.split(jax.random.key(7), 2),
        initial_noise(jax.random.split(jax.random.key(8), 2), SHAPE),
    )
    step_program = jax.jit(lambda carry, step: take_step(toy_denoise, keys, carry, step))
    for sampler in SAMPLERS:
        for count in (1, 2, 7):
            steps, carry = plan_steps(SCHEDULE, trailing(count), sampler), begin(noisy)
            for index in range(count):
                carry = step_program(carry, jax.tree.map(lambda rows, index=index: rows[index], steps))
            expected = sample(toy_denoise, keys, noisy, steps)
            np.testing.assert_allclose(carry[0], expected, rtol=1e-5, atol=1e-5)
    assert step_program._cache_size() == 1


def test_bfloat16_model_still_samples_in_float32():
    keys = jax.random.split(jax.random.key(9), 2)
    noisy = initial_noise(keys, SHAPE)
    result = sample(
        lambda noisy, t: toy_denoise(noisy, t).astype(jnp.bfloat16),
        keys,
        noisy,
        plan_steps(SCHEDULE, trailing(5)),
    )
    assert result.dtype == jnp.float32


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match=r"^sampler 'heun' is not one of ddim, dpm-solver\+\+, unipc"):
        plan_steps(SCHEDULE, trailing(2), "heun")
