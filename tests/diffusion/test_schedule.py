import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from zipir_jax.config import MODELS, SPACINGS, DiffusionConfig, ObjectiveConfig, SamplingConfig, TrainConfig
from zipir_jax.diffusion.schedule import (
    linear_schedule,
    sampling_timesteps,
    spaced_timesteps,
    training_timesteps,
)

DIFFUSERS = pathlib.Path(__file__).parents[1] / "parity" / "samplers.npz"
ZERO_SNR = DiffusionConfig(prediction="v", zero_terminal_snr=True, uniform_share=0.1)


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


def test_zero_terminal_snr_is_that_of_diffusers_and_keeps_the_first_level():
    schedule = linear_schedule(ZERO_SNR)
    with np.load(DIFFUSERS) as file:
        np.testing.assert_allclose(
            schedule.signal**2, file["alpha_bar_zero_terminal_snr"], rtol=2e-5, atol=1e-9
        )
    assert (schedule.signal[-1], schedule.noise[-1]) == (0, 1)
    np.testing.assert_allclose(schedule.signal[0], linear_schedule(DiffusionConfig()).signal[0], rtol=1e-12)
    assert np.all(np.diff(schedule.signal) < 0)


def test_eps_says_nothing_of_an_image_without_signal():
    with pytest.raises(ValueError, match="zero_terminal_snr needs the prediction v"):
        DiffusionConfig(zero_terminal_snr=True)


def test_the_last_level_is_trained_where_sampling_starts_from_it():
    with pytest.raises(ValueError, match="uniform_share above 0"):
        DiffusionConfig(prediction="v", zero_terminal_snr=True)
    draws = (1000, 1000)
    plain = np.asarray(training_timesteps(jax.random.key(0), draws, DiffusionConfig()))
    some = np.asarray(training_timesteps(jax.random.key(0), draws, ZERO_SNR))
    assert (plain == 999).sum() == 0
    assert 60 < (some == 999).sum() < 140  # 100 expected, known to 10
    assert abs((some != plain).mean() - 0.1) < 0.002  # the others are as they were
    with pytest.raises(ValueError, match="min_snr_gamma gives no weight to the last level"):
        TrainConfig(
            model=dataclasses.replace(MODELS["tiny"], diffusion=ZERO_SNR),
            objective=ObjectiveConfig(min_snr_gamma=5.0),
        )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_is_that_of_diffusers(spacing):
    with np.load(DIFFUSERS) as file:
        names = [name for name in file if name.startswith(f"timesteps_{spacing}_")]
        assert len(names) == 10
        for name in names:
            steps = int(name.split("_")[2])
            if (spacing, steps) == ("linspace", 1):  # diffusers' single step is at 0, where there is no noise
                assert (file[name].item(), spaced_timesteps(1000, 1, spacing).item()) == (0, 999)
            else:
                np.testing.assert_array_equal(spaced_timesteps(1000, steps, spacing), file[name])


def test_where_25_steps_begin_and_end():
    trailing, leading = spaced_timesteps(1000, 25), spaced_timesteps(1000, 25, "leading")
    assert (trailing[0], trailing[-1]) == (999, 39)
    assert (leading[0], leading[-1]) == (961, 1)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_distinct_timesteps_in_range(spacing):
    for steps in range(1, 1000 if spacing == "leading" else 1001):
        timesteps = spaced_timesteps(1000, steps, spacing)
        assert len(timesteps) == steps
        assert timesteps[0] <= 999 and timesteps[-1] >= 0
        assert np.all(np.diff(timesteps) < 0)
        if spacing != "leading":
            assert timesteps[0] == 999


@pytest.mark.parametrize(
    ("steps", "spacing"), [(0, "trailing"), (1001, "trailing"), (-3, "leading"), (1000, "leading")]
)
def test_steps_outside_the_schedule_are_named(steps, spacing):
    with pytest.raises(ValueError, match=rf"^{steps} sampling steps are not between 1 and"):
        spaced_timesteps(1000, steps, spacing)


def test_unknown_spacing_is_named():
    with pytest.raises(ValueError, match="karras"):
        spaced_timesteps(1000, 25, "karras")


@pytest.mark.parametrize("start", [1.0, 0.6, 0.25])
def test_sampling_starts_at_a_noise_level_and_still_takes_all_steps(start):
    schedule = linear_schedule(DiffusionConfig())
    timesteps = sampling_timesteps(schedule, SamplingConfig(steps=20, start=start))
    assert timesteps[0] == round(1000 * start) - 1
    np.testing.assert_array_equal(timesteps, spaced_timesteps(round(1000 * start), 20))


def test_too_few_timesteps_below_the_start_are_named():
    schedule = linear_schedule(DiffusionConfig())
    with pytest.raises(ValueError, match=r"25 sampling steps, and 10 noise levels up to start 0\.01"):
        sampling_timesteps(schedule, SamplingConfig(start=0.01))


@pytest.mark.parametrize("factor", [4, 1 / 4])
@pytest.mark.parametrize("zero", [False, True])
def test_tokens_shift_the_ratio_of_noise_to_signal_by_their_root(factor, zero):
    schedule = linear_schedule(ZERO_SNR if zero else DiffusionConfig())
    config = SamplingConfig(steps=20, shift_tokens=1024)
    shifted = sampling_timesteps(schedule, config, int(1024 * factor))
    ratio = schedule.noise / np.maximum(schedule.signal, 1e-30)
    # The levels that are visited without a shift, of those that the shift does not take beyond the schedule.
    usable = int(np.sum(ratio * factor**0.5 <= ratio[-1] * (1 + 1e-12)))
    expected = ratio[spaced_timesteps(usable, 20)] * factor**0.5
    within = expected < ratio[-2]  # else rounded to the last timestep
    within[0] = False
    assert shifted[0] == 999  # from pure noise, whatever the shift
    # Half a timestep: the largest relative difference of neighbours beyond the first few.
    np.testing.assert_allclose(ratio[shifted][within], expected[within], rtol=0.02)
    assert np.all(np.diff(shifted) < 0)
    plain = sampling_timesteps(schedule, dataclasses.replace(config, shift_tokens=0), int(1024 * factor))
    middle = slice(5, 15)
    assert np.all((shifted > plain)[middle] if factor > 1 else (shifted < plain)[middle])
    np.testing.assert_array_equal(sampling_timesteps(schedule, config, 1024), plain)


def test_steps_that_would_share_timesteps_are_refused():
    schedule = linear_schedule(DiffusionConfig())
    with pytest.raises(
        ValueError, match="500 sampling steps, shifted from 64 to 4096 tokens, share timesteps"
    ):
        sampling_timesteps(schedule, SamplingConfig(steps=500, shift_tokens=64), 4096)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.0, 0.5), (0.7, 1.3)])
def test_logit_normal_moments(mean, std):
    config = dataclasses.replace(DiffusionConfig(), logit_normal_mean=mean, logit_normal_std=std)
    timesteps = np.asarray(training_timesteps(jax.random.key(3), (200, 200), config))
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
    timesteps = training_timesteps(jax.random.key(0), (1000,), config)
    assert (timesteps.min(), timesteps.max()) == (0, 999)
