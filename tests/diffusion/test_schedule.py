import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig
from zipir_jax.diffusion.schedule import linear_schedule, logit_normal_timesteps, spaced_timesteps

DIFFUSERS = pathlib.Path(__file__).parents[1] / "parity" / "ddim.npz"


def test_schedule_ends_short_of_pure_noise():
    schedule = linear_schedule(DiffusionConfig())
    assert schedule.signal.shape == schedule.noise.shape == (1000,)
    assert abs(schedule.signal[-1] - 0.0397) < 5e-5
    np.testing.assert_allclose(schedule.noise[0] ** 2, 0.00085, rtol=1e-12)
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1, rtol=1e-12)
    assert np.all(np.diff(schedule.signal) < 0)


def test_alpha_bar_is_that_of_diffusers():
    with np.load(DIFFUSERS) as file:
        # diffusers multiplies 1000 factors in float32
        np.testing.assert_allclose(
            linear_schedule(DiffusionConfig()).signal ** 2, file["alpha_bar"], rtol=2e-5
        )


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_spacing_is_that_of_diffusers(spacing):
    with np.load(DIFFUSERS) as file:
        names = [name for name in file if name.startswith(f"timesteps_{spacing}_")]
        assert len(names) == 10
        for name in names:
            np.testing.assert_array_equal(
                spaced_timesteps(1000, int(name.split("_")[2]), spacing), file[name]
            )


def test_spacing_of_the_paper():
    trailing, leading = spaced_timesteps(1000, 25), spaced_timesteps(1000, 25, "leading")
    assert (trailing[0], trailing[-1]) == (999, 39)
    assert (leading[0], leading[-1]) == (961, 1)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_every_number_of_steps_gives_distinct_timesteps_in_range(spacing):
    for steps in range(1, 1000 if spacing == "leading" else 1001):
        timesteps = spaced_timesteps(1000, steps, spacing)
        assert len(timesteps) == steps
        assert timesteps[0] <= 999 and timesteps[-1] >= 0
        assert np.all(np.diff(timesteps) < 0)
        if spacing == "trailing":
            assert timesteps[0] == 999


@pytest.mark.parametrize(
    ("steps", "spacing"), [(0, "trailing"), (1001, "trailing"), (-3, "leading"), (1000, "leading")]
)
def test_steps_outside_the_schedule_are_named(steps, spacing):
    with pytest.raises(ValueError, match=rf"^{steps} sampling steps are not between 1 and"):
        spaced_timesteps(1000, steps, spacing)


def test_unknown_spacing_is_named():
    with pytest.raises(ValueError, match="linspace"):
        spaced_timesteps(1000, 25, "linspace")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.5), (0.7, 1.3)])
def test_logit_normal_moments(mean, std):
    config = dataclasses.replace(DiffusionConfig(), logit_normal_mean=mean, logit_normal_std=std)
    timesteps = np.asarray(logit_normal_timesteps(jax.random.key(3), (200, 200), config))
    assert timesteps.shape == (200, 200)
    assert timesteps.dtype == np.int32
    fraction = (timesteps + 0.5) / config.train_timesteps
    logit = np.log(fraction / (1 - fraction))
    # 40 000 draws: the mean is known to 0.005 std, the standard deviation to 0.0035 std.
    assert abs(logit.mean() - mean) < 0.025 * std
    assert abs(logit.std() - std) < 0.025 * std
    below = np.mean(fraction < 1 / (1 + np.exp(-(mean + std))))
    assert abs(below - 0.8413) < 0.01  # one standard deviation above the mean


def test_logit_normal_stays_in_range_when_the_sigmoid_saturates():
    config = dataclasses.replace(DiffusionConfig(), logit_normal_std=100.0)
    timesteps = logit_normal_timesteps(jax.random.key(0), (1000,), config)
    assert (timesteps.min(), timesteps.max()) == (0, 999)
