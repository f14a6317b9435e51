import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig
from zipir_jax.diffusion.objective import add_noise, diffusion_loss, predict_clean, predict_eps
from zipir_jax.diffusion.schedule import linear_schedule

SCHEDULE = linear_schedule(DiffusionConfig())
TIMESTEPS = jnp.array([0, 40, 500, 999])


@pytest.fixture(name="clean")
def make_clean():
    return jax.random.normal(jax.random.key(1), (4, 8, 6, 16))


def test_forward_process_keeps_unit_variance(clean):
    eps = jax.random.normal(jax.random.key(2), clean.shape)
    noisy = np.asarray(add_noise(clean, eps, TIMESTEPS, SCHEDULE), np.float64)
    for item, timestep in enumerate(TIMESTEPS):
        expected = SCHEDULE.signal[timestep] * np.asarray(clean[item]) + SCHEDULE.noise[
            timestep
        ] * np.asarray(eps[item])
        np.testing.assert_allclose(noisy[item], expected, atol=1e-6)
    assert np.all(np.abs(noisy.var(axis=(1, 2, 3)) - 1) < 0.2)  # 768 values an item: known to 0.05


def test_clean_and_noise_round_trip(clean):
    eps = jax.random.normal(jax.random.key(2), clean.shape)
    recovered = predict_clean(add_noise(clean, eps, TIMESTEPS, SCHEDULE), eps, TIMESTEPS, SCHEDULE)
    # At t = 999 rounding is enlarged by 1 / 0.0397.
    np.testing.assert_allclose(recovered, clean, atol=2e-5)


def test_loss_is_zero_for_the_noise_itself_and_one_for_nothing(clean):
    def oracle(noisy, timesteps):
        signal = jnp.asarray(SCHEDULE.signal, jnp.float32)[timesteps][:, None, None, None]
        noise = jnp.asarray(SCHEDULE.noise, jnp.float32)[timesteps][:, None, None, None]
        return (noisy - signal * clean) / noise

    key = jax.random.key(5)
    loss = diffusion_loss(oracle, "eps", key, clean, TIMESTEPS, SCHEDULE)
    assert loss.shape == (4,)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    nothing = diffusion_loss(
        lambda noisy, timesteps: jnp.zeros_like(noisy), "eps", key, clean, TIMESTEPS, SCHEDULE
    )
    assert np.all(np.abs(np.asarray(nothing) - 1) < 0.25)  # known to 0.05
    assert len(np.unique(np.asarray(nothing))) == 4  # the items do not share their noise


def test_v_is_the_direction_in_which_the_noise_grows(clean):
    """z_t = cos(a) z_0 + sin(a) eps, and v = dz/da (Salimans & Ho 2022, appendix D)."""
    key = jax.random.key(5)
    keys = [jax.random.fold_in(key, item) for item in range(4)]
    eps = jnp.stack([jax.random.normal(item_key, clean.shape[1:]) for item_key in keys])
    angles = jnp.arctan2(SCHEDULE.noise[TIMESTEPS], SCHEDULE.signal[TIMESTEPS])[:, None, None, None]
    _, v = jax.jvp(lambda a: jnp.cos(a) * clean + jnp.sin(a) * eps, (angles,), (jnp.ones_like(angles),))
    loss = diffusion_loss(lambda noisy, timesteps: v, "v", key, clean, TIMESTEPS, SCHEDULE)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    denoise = predict_eps(lambda noisy, timesteps: v, "v", SCHEDULE)
    noisy = add_noise(clean, eps, TIMESTEPS, SCHEDULE)
    np.testing.assert_allclose(denoise(noisy, TIMESTEPS), eps, atol=1e-5)


def test_a_model_of_v_that_knows_nothing_is_right_about_pure_noise():
    noisy = jax.random.normal(jax.random.key(1), (1, 4, 4, 8))
    denoise = predict_eps(lambda noisy, timesteps: jnp.zeros_like(noisy), "v", SCHEDULE)
    np.testing.assert_allclose(denoise(noisy, jnp.array([999])), noisy, rtol=1e-3)
    untouched = predict_eps(lambda noisy, timesteps: 2 * noisy, "eps", SCHEDULE)
    np.testing.assert_array_equal(untouched(noisy, jnp.array([999])), 2 * noisy)


def test_loss_is_that_of_each_item_alone(clean):
    def denoise(noisy, timesteps):
        return jnp.tanh(noisy) * (1 + timesteps[:, None, None, None] / 1000)

    key = jax.random.key(6)
    together = diffusion_loss(denoise, "eps", key, clean, TIMESTEPS, SCHEDULE)
    fewer = diffusion_loss(denoise, "eps", key, clean[:2], TIMESTEPS[:2], SCHEDULE)
    np.testing.assert_allclose(together[:2], fewer, rtol=1e-6)


def test_loss_is_float32_when_the_model_computes_in_bfloat16(clean):
    loss = diffusion_loss(
        lambda noisy, _: noisy.astype(jnp.bfloat16), "eps", jax.random.key(0), clean, TIMESTEPS, SCHEDULE
    )
    assert loss.dtype == jnp.float32
    exact = diffusion_loss(lambda noisy, _: noisy, "eps", jax.random.key(0), clean, TIMESTEPS, SCHEDULE)
    np.testing.assert_allclose(loss, exact, rtol=0.05, atol=1e-4)


def test_gradient_descends_to_the_best_linear_model():
    # For unit Gaussian data the best prediction of eps from z_t is sqrt(1 - abar_t) z_t.
    clean = jax.random.normal(jax.random.key(7), (64, 32, 32, 4))
    timesteps = jnp.full(64, 300)

    def loss(scale):
        losses = diffusion_loss(
            lambda noisy, _: scale * noisy, "eps", jax.random.key(8), clean, timesteps, SCHEDULE
        )
        return losses.mean()

    best = SCHEDULE.noise[300]
    assert abs(jax.grad(loss)(best)) < 0.02
    assert jax.grad(loss)(best + 0.1) > 0.1
    assert jax.grad(loss)(best - 0.1) < -0.1
