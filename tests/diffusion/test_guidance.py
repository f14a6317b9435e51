import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.diffusion.guidance import guided

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
    eps = jax.jit(guided(counted, guidance, condition, negative))(NOISY, TIMESTEPS)
    assert calls == [("prepare", 2 * BATCH), ("denoise", 2 * BATCH)]
    with_, without = denoise(NOISY, TIMESTEPS, condition), denoise(NOISY, TIMESTEPS, negative)
    np.testing.assert_allclose(eps, without + guidance * (with_ - without), atol=2e-5)
    assert np.abs(np.asarray(eps - with_)).max() > 0.1


def test_guidance_one_and_no_negative_call_the_plain_batch(counted, calls):
    condition, negative = make_condition(1), make_condition(2)
    expected = denoise(NOISY, TIMESTEPS, condition)
    for given in ((1.0, condition, negative), (3.5, condition)):
        denoise_guided = guided(counted, *given)
        np.testing.assert_array_equal(denoise_guided(NOISY, TIMESTEPS), expected)
    assert calls == 2 * [("prepare", BATCH), ("denoise", BATCH)]


def test_equal_conditions_cancel_at_any_guidance():
    condition = make_condition(1)
    eps = guided(prepare, 7.5, condition, condition)(NOISY, TIMESTEPS)
    np.testing.assert_allclose(eps, denoise(NOISY, TIMESTEPS, condition), atol=1e-6)


def test_difference_is_taken_in_float32():
    def low_precision(condition):
        return lambda *args: denoise(*args, condition).astype(jnp.bfloat16)

    eps = guided(low_precision, 3.5, make_condition(1), make_condition(2))(NOISY, TIMESTEPS)
    assert eps.dtype == jnp.float32
    with_, without = (
        np.asarray(low_precision(make_condition(seed))(NOISY, TIMESTEPS), np.float32) for seed in (1, 2)
    )
    np.testing.assert_allclose(eps, without + 3.5 * (with_ - without), rtol=1e-6, atol=1e-6)


def test_conditions_of_different_structure_are_refused():
    negative = make_condition(2)
    del negative["latent"]
    with pytest.raises(ValueError, match="latent"):
        guided(prepare, 3.5, make_condition(1), negative)
