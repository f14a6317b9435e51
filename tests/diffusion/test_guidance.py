import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiffusionConfig, SamplingConfig
from zipir_jax.diffusion.guidance import (
    classifier_free_guidance,
    conditions,
    guided_timesteps,
    restoration_guidance,
)
from zipir_jax.diffusion.objective import predict_clean
from zipir_jax.diffusion.schedule import linear_schedule

BATCH = 3
NOISY = jax.random.normal(jax.random.key(0), (BATCH, 4, 5, 8))
TIMESTEPS = jnp.array([10, 500, 999])


def make_condition(seed):
    text, latent = jax.random.split(jax.random.key(seed))
    return {
        "text": (
            jax.random.normal(text, (BATCH, 7, 8)),
            jnp.arange(BATCH * 7).reshape(BATCH, 7) % (seed + 2) == 0,
        ),
        "latent": jax.random.normal(latent, NOISY.shape),
    }


def denoise(noisy, timesteps, condition):
    """A per-item function that mixes every argument."""
    embeddings, mask = condition["text"]
    text = jnp.sum(embeddings * mask[..., None], axis=1)[:, None, None, :]
    return jnp.tanh(noisy * text + condition["latent"]) + timesteps[:, None, None, None] / 1000


def guide(prepare, condition, negative=None, guidance=3.5, share=None, interval=None):
    """The guided prediction; interval: of noise levels."""
    timesteps = (
        None if interval is None else guided_timesteps(SamplingConfig(guidance_interval=interval), 1000)
    )
    given = conditions(condition, negative, interval is not None)
    predicts = {name: prepare(found) for name, found in given.items()}
    return classifier_free_guidance(predicts, guidance, share, timesteps)


def prepare(condition):
    return lambda noisy, timesteps: denoise(noisy, timesteps, condition)


@pytest.fixture(name="calls")
def make_calls():
    return []


@pytest.fixture(name="counted")
def make_counted(calls):
    """`prepare` that notes the batches of what it prepares and of what is denoised."""

    def counted(condition):
        calls.append(("prepare", condition["latent"].shape[0]))

        def denoise_counted(noisy, timesteps):
            calls.append(("denoise", noisy.shape[0]))
            return denoise(noisy, timesteps, condition)

        return denoise_counted

    return counted


@pytest.mark.parametrize("guidance", [3.5, 0.0, -1.0, 1.5])
def test_one_call_gives_the_formula_of_two(guidance, counted, calls):
    condition, negative = make_condition(1), make_condition(2)
    eps = jax.jit(guide(counted, condition, negative, guidance))(NOISY, TIMESTEPS)
    assert calls == [("prepare", 2 * BATCH), ("denoise", 2 * BATCH)]
    with_, without = denoise(NOISY, TIMESTEPS, condition), denoise(NOISY, TIMESTEPS, negative)
    np.testing.assert_allclose(eps, without + guidance * (with_ - without), atol=2e-5)
    assert np.abs(np.asarray(eps - with_)).max() > 0.1


def test_without_a_negative_condition_the_plain_batch_is_called(counted, calls):
    condition = make_condition(1)
    found = guide(counted, condition, interval=(0.2, 0.6))(NOISY, TIMESTEPS)
    np.testing.assert_array_equal(found, denoise(NOISY, TIMESTEPS, condition))
    assert calls == [("prepare", BATCH), ("denoise", BATCH)]


def test_equal_conditions_cancel_at_any_guidance():
    condition = make_condition(1)
    eps = guide(prepare, condition, condition, guidance=7.5)(NOISY, TIMESTEPS)
    np.testing.assert_allclose(eps, denoise(NOISY, TIMESTEPS, condition), atol=1e-6)


def test_difference_is_taken_in_float32():
    def low_precision(condition):
        return lambda *args: denoise(*args, condition).astype(jnp.bfloat16)

    eps = guide(low_precision, make_condition(1), make_condition(2))(NOISY, TIMESTEPS)
    assert eps.dtype == jnp.float32
    with_, without = (
        np.asarray(low_precision(make_condition(seed))(NOISY, TIMESTEPS), np.float32) for seed in (1, 2)
    )
    np.testing.assert_allclose(eps, without + 3.5 * (with_ - without), rtol=1e-6, atol=1e-6)


def test_conditions_of_different_structure_are_refused():
    negative = make_condition(2)
    del negative["latent"]
    with pytest.raises(ValueError, match="latent"):
        guide(prepare, make_condition(1), negative)


def test_outside_the_interval_the_model_is_called_once(counted, calls):
    predict = guide(counted, make_condition(1), make_condition(2), interval=(0.2, 0.6))
    always = guide(prepare, make_condition(1), make_condition(2))
    for timestep, branches in ((100, 1), (198, 1), (199, 2), (500, 2), (599, 2), (600, 1), (999, 1)):
        calls.clear()
        timesteps = jnp.full(BATCH, timestep)
        with jax.disable_jit():
            found = predict(NOISY, timesteps)
        assert calls == [("denoise", branches * BATCH)]
        alone = denoise(NOISY, timesteps, make_condition(1))
        expected = always(NOISY, timesteps) if branches == 2 else alone
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(jax.jit(predict)(NOISY, timesteps), expected, atol=1e-5)


def test_rescaled_guidance_has_the_deviation_of_the_conditional_prediction():
    def predict(share):
        found = guide(prepare, make_condition(1), make_condition(2), 8.0, share)(NOISY, TIMESTEPS)
        return np.asarray(found)

    conditional = np.asarray(denoise(NOISY, TIMESTEPS, make_condition(1)))
    axes = (1, 2, 3)
    assert np.all(predict(0.0).std(axes) > 1.5 * conditional.std(axes))
    np.testing.assert_allclose(predict(1.0).std(axes), conditional.std(axes), rtol=1e-5)
    np.testing.assert_allclose(predict(0.7), 0.7 * predict(1.0) + 0.3 * predict(0.0), atol=1e-5)
    correlation = [
        np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(predict(0.0), predict(1.0), strict=True)
    ]
    np.testing.assert_allclose(correlation, 1, rtol=1e-6)  # another contrast, the same picture


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guidance_of_the_prediction_is_guidance_of_the_clean_latent(prediction):
    schedule = linear_schedule(DiffusionConfig())
    first, second = make_condition(1), make_condition(2)
    with_, without = (
        predict_clean(prepare(condition), prediction, schedule)(NOISY, TIMESTEPS)
        for condition in (first, second)
    )
    found = predict_clean(guide(prepare, first, second), prediction, schedule)
    expected = without + 3.5 * (with_ - without)
    np.testing.assert_allclose(found(NOISY, TIMESTEPS), expected, rtol=1e-4, atol=1e-3)


def test_fidelity_pulls_the_first_channels_alone():
    target = jax.random.normal(jax.random.key(7), NOISY.shape)

    def clean(noisy, timesteps):
        return jnp.tanh(noisy)

    plain = clean(NOISY, TIMESTEPS)
    distances = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        pulled = restoration_guidance(clean, strength, target, 3)(NOISY, TIMESTEPS)
        np.testing.assert_array_equal(pulled[..., 3:], plain[..., 3:])
        distances.append(np.abs(pulled - target)[..., :3].mean())
    first = np.abs(plain - target)[..., :3].mean()
    np.testing.assert_allclose(distances, first * np.array([1, 0.75, 0.5, 0]), rtol=1e-5, atol=1e-6)


def test_the_interval_has_its_bounds_at_every_level():
    """As compiled: a bound that is compared as a float misses one level in two."""
    for timestep in range(0, 1000, 37):
        for interval in ((0.0, (timestep + 1) / 1000), ((timestep + 1) / 1000, 1.0)):
            if interval == (0.0, 1.0):
                continue
            config = SamplingConfig(guidance_interval=interval)
            assert timestep in guided_timesteps(config, 1000)
    compiled = jax.jit(guide(prepare, make_condition(1), make_condition(2), interval=(0.0, 0.901)))
    alone, both = (compiled(NOISY, jnp.full(BATCH, timestep)) for timestep in (901, 900))
    np.testing.assert_allclose(alone, denoise(NOISY, jnp.full(BATCH, 901), make_condition(1)), atol=1e-5)
    assert np.abs(both - denoise(NOISY, jnp.full(BATCH, 900), make_condition(1))).max() > 0.1


def test_rescaling_what_is_flat_leaves_it():
    flat = guide(
        lambda condition: lambda noisy, timesteps: jnp.zeros_like(noisy),
        make_condition(1), make_condition(2), share=0.7,
    )  # fmt: skip
    np.testing.assert_array_equal(flat(NOISY, TIMESTEPS), 0)
