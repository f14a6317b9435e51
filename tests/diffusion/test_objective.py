import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig, ObjectiveConfig
from zipir_jax.diffusion.objective import add_noise, diffusion_loss, min_snr_weights, predict_clean
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
    denoise = predict_clean(lambda noisy, timesteps: eps, "eps", SCHEDULE)
    recovered = denoise(add_noise(clean, eps, TIMESTEPS, SCHEDULE), TIMESTEPS)
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
    denoise = predict_clean(lambda noisy, timesteps: v, "v", SCHEDULE)
    noisy = add_noise(clean, eps, TIMESTEPS, SCHEDULE)
    np.testing.assert_allclose(denoise(noisy, TIMESTEPS), clean, atol=1e-5)


def test_a_model_of_v_that_knows_nothing_finds_nothing_in_pure_noise():
    """An error of v counts once in the clean latent of the noisiest timestep, one of eps 1 / 0.0397 times."""
    noisy, timesteps = jax.random.normal(jax.random.key(1), (1, 4, 4, 8)), jnp.array([999])

    def nothing(noisy, timesteps):
        return jnp.zeros_like(noisy)

    found = predict_clean(nothing, "v", SCHEDULE)(noisy, timesteps)
    np.testing.assert_allclose(found, 0.0397 * noisy, rtol=2e-3)
    np.testing.assert_allclose(
        predict_clean(nothing, "eps", SCHEDULE)(noisy, timesteps), noisy / 0.0397, rtol=2e-3
    )


def test_v_needs_no_signal_at_the_last_timestep_of_zero_snr(clean):
    schedule = linear_schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True, uniform_share=0.1))
    last = jnp.full(4, 999)
    eps = jax.random.normal(jax.random.key(2), clean.shape)
    np.testing.assert_array_equal(add_noise(clean, eps, last, schedule), eps)
    # There v is minus the clean latent: the loss asks for the image, and gets it back.
    loss = diffusion_loss(lambda noisy, t: -clean, "v", jax.random.key(5), clean, last, schedule)
    np.testing.assert_allclose(loss, 0, atol=1e-9)
    found = predict_clean(lambda noisy, t: -clean, "v", schedule)(eps, last)
    np.testing.assert_allclose(found, clean, rtol=1e-6)


@pytest.mark.parametrize("zero", [False, True])
def test_min_snr_weights_make_the_error_of_the_clean_latent_count_alike(zero, clean):
    """Either way min(SNR, gamma) times the squared error of z_0, whatever the model predicts."""
    gamma, timesteps = 5.0, jnp.array([0, 40, 500, 998])
    losses, objective = {}, ObjectiveConfig(min_snr_gamma=gamma)
    wrong = clean + 0.3 * jnp.sin(jnp.arange(16.0))  # of z_0
    schedule = linear_schedule(DiffusionConfig(prediction="v", zero_terminal_snr=zero, uniform_share=0.1))
    signal, noise = (
        jnp.asarray(factor, jnp.float32)[timesteps][:, None, None, None]
        for factor in (schedule.signal, schedule.noise)
    )

    def implied(prediction):
        def predict(noisy, _):
            eps = (noisy - signal * wrong) / noise
            return eps if prediction == "eps" else signal * eps - noise * wrong

        return predict

    predictions = ("v",) if zero else ("eps", "v")  # without any signal eps says nothing of z_0
    for prediction in predictions:
        losses[prediction] = diffusion_loss(
            implied(prediction), prediction, jax.random.key(3), clean, timesteps, schedule, objective
        )
    snr = np.square(schedule.signal / schedule.noise)[timesteps]
    error = np.mean(np.square(wrong - clean), axis=(1, 2, 3))
    for prediction in predictions:
        np.testing.assert_allclose(losses[prediction], np.minimum(snr, gamma) * error, rtol=2e-3)


def test_min_snr_weights_of_hang_et_al():
    snr = np.square(SCHEDULE.signal / SCHEDULE.noise)
    weights = np.asarray(min_snr_weights(SCHEDULE, "eps", 5.0))
    np.testing.assert_allclose(weights, np.minimum(snr, 5) / snr, rtol=1e-6)
    assert weights[0] < 0.01 and np.all(
        weights[snr < 5] == 1
    )  # little noise counts less, much noise as before
    np.testing.assert_allclose(min_snr_weights(SCHEDULE, "v", 5.0), np.minimum(snr, 5) / (snr + 1), rtol=1e-6)
    np.testing.assert_array_equal(min_snr_weights(SCHEDULE, "v", 0.0), np.ones(1000))


def test_extra_losses_are_those_of_the_first_channels(clean):
    def predict(noisy, timesteps):
        return noisy * jnp.linspace(0.2, 1, 16)

    def losses(latent, **weights):
        return diffusion_loss(
            lambda noisy, t: predict(noisy, t), "eps", jax.random.key(5), latent, TIMESTEPS, SCHEDULE,
            ObjectiveConfig(**weights), (3, 12),
        )  # fmt: skip

    def of_first(channels):
        """The plain loss where the model is right about all the other channels."""
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(4))
        eps = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)

        def right(noisy, timesteps):
            mixed = jnp.where(jnp.arange(16) < channels, predict(noisy, timesteps), eps)
            return mixed

        plain = diffusion_loss(right, "eps", jax.random.key(5), clean, TIMESTEPS, SCHEDULE)
        return plain * 16 / channels

    plain = losses(clean)
    np.testing.assert_allclose(losses(clean, macro=0.5) - plain, 0.5 * of_first(3), rtol=1e-4)
    np.testing.assert_allclose(losses(clean, coarse=0.2) - plain, 0.2 * of_first(12), rtol=1e-4)
    both = losses(clean, macro=0.5, coarse=0.2, min_snr_gamma=5.0)
    weights = min_snr_weights(SCHEDULE, "eps", 5.0)[TIMESTEPS]
    expected = weights * (plain + 0.5 * of_first(3) + 0.2 * of_first(12))
    np.testing.assert_allclose(both, expected, rtol=1e-4)


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
