"""What the DiT stage does beside encoding: weak LQ latents, and the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import TINY, random_params
from zipir_jax.config import DiffusionConfig, ObjectiveConfig, TrainConfig
from zipir_jax.diffusion.schedule import linear_schedule, training_timesteps
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.training.stages.dit import gradients, weaken

CONFIG = DiffusionConfig(weak_lq_probability=0.3, weak_lq=(0.1, 0.4))


def test_a_share_of_the_lq_latents_is_scaled_as_a_whole():
    lq = jax.random.normal(jax.random.key(0), (2000, 2, 2, 3))
    ratio = np.asarray(weaken(lq, jax.random.key(1), CONFIG) / lq).reshape(2000, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-5)
    strength = ratio[:, 0]
    weak = strength[strength != 1]
    assert abs(len(weak) / 2000 - 0.3) < 0.04  # known to 0.01
    assert weak.min() >= 0.1 - 1e-6 and weak.max() <= 0.4 + 1e-6
    assert abs(weak.mean() - 0.25) < 0.015 and abs(weak.std() - 0.3 / 12**0.5) < 0.01


def test_none_is_weakened_by_default():
    lq = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    assert weaken(lq, jax.random.key(1), DiffusionConfig()) is lq
    always = dataclasses.replace(CONFIG, weak_lq_probability=1.0, weak_lq=(0.0, 0.0))
    np.testing.assert_array_equal(weaken(lq, jax.random.key(1), always), 0 * lq)


def test_the_loss_is_that_of_weak_lq_latents_weights_and_bands():
    """One step's loss against the formula: what the config says of the objective reaches it."""
    model = dataclasses.replace(
        TINY, diffusion=dataclasses.replace(TINY.diffusion, weak_lq_probability=1.0, weak_lq=(0.2, 0.2))
    )
    objective = ObjectiveConfig(min_snr_gamma=5.0, macro=0.5, coarse=0.25)
    config = TrainConfig(stage="dit", model=model, objective=objective)
    params, (clean, lq) = (
        random_params(DiT, model.dit),
        jax.random.normal(jax.random.key(2), (2, 2, 4, 4, 64)),
    )
    frozen = {"statistics": {"latent_mean": np.zeros(64), "latent_std": np.ones(64)}}
    batch, key = {"latent": clean, "lq_latent": lq}, jax.random.key(3)
    _, metrics = jax.jit(
        lambda params: gradients(
            config, {"generator": {"dit": params}, "discriminator": {}}, frozen, batch, key, False
        )
    )(params)

    timestep_key, noise_key = jax.random.split(key)
    timesteps = np.asarray(training_timesteps(timestep_key, (2,), model.diffusion))
    eps = np.stack([jax.random.normal(jax.random.fold_in(noise_key, i), (4, 4, 64)) for i in range(2)])
    schedule = linear_schedule(model.diffusion)
    signal, noise = (factor[timesteps][:, None, None, None] for factor in (schedule.signal, schedule.noise))
    noisy = np.asarray(signal * clean + noise * eps, np.float32)
    predicted = jax.jit(lambda noisy: bind(DiT, model.dit, params)(noisy, jnp.asarray(timesteps), 0.2 * lq))(
        noisy
    )
    error = np.square(predicted - (signal * eps - noise * clean))
    losses = error.mean((1, 2, 3))
    losses += 0.5 * error[..., :3].mean((1, 2, 3)) + 0.25 * error[..., :12].mean((1, 2, 3))
    snr = np.square(schedule.signal / schedule.noise)[timesteps]
    expected = np.mean(np.minimum(snr, 5) / (snr + 1) * losses)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
