"""What the restorer's sampler computes once an image, against a sampler that computes it anew at every step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TINY, random_params
from zipir_jax.config import SamplingConfig
from zipir_jax.diffusion.guidance import guided
from zipir_jax.diffusion.objective import predict_eps
from zipir_jax.diffusion.samplers import ddim, initial_noise
from zipir_jax.diffusion.schedule import linear_schedule
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import bind
from zipir_jax.restorer import denoise_latent

pytestmark = pytest.mark.usefixtures("quick_compile")
SAMPLING = SamplingConfig(steps=3)


def without_cache(dit, config, lq, keys, text, negative_text):
    """`denoise_latent` with the whole DiT, keys and values of LQ tokens and text included, at every step and branch."""
    schedule = linear_schedule(config.diffusion)

    def prepare(text):
        def predict(noisy, timesteps):
            return dit(noisy, timesteps, jnp.tile(lq, (len(noisy) // len(lq), 1, 1, 1)), **text)

        return predict_eps(predict, config.diffusion.prediction, schedule)

    denoise = guided(prepare, SAMPLING.guidance, text, negative_text)
    return ddim(denoise, keys, initial_noise(keys, lq.shape[1:]), schedule, SAMPLING.steps)


@pytest.mark.parametrize("lq_attention", ["joint", "static"])
@pytest.mark.parametrize("with_negative", [False, True], ids=["plain", "guided"])
def test_the_cached_sampler_equals_the_one_without_cache(lq_attention, with_negative):
    dit = dataclasses.replace(TINY.dit, text_width=16, lq_attention=lq_attention)
    config = dataclasses.replace(TINY, dit=dit)
    params, rng = random_params(DiT, dit), np.random.default_rng(0)
    mean, std = rng.normal(size=64).astype(np.float32), rng.uniform(0.5, 2, 64).astype(np.float32)
    weights = {"statistics": {"latent_mean": mean, "latent_std": std}, "dit": params}
    latent = rng.normal(size=(2, 3, 4, 64)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    text, negative = (
        {"text": rng.normal(size=(2, 5, 16)).astype(np.float32), "text_lengths": np.array(lengths)}
        for lengths in ((5, 2), (1, 4))
    )
    negative = negative if with_negative else None
    found = jax.jit(lambda *arrays: denoise_latent(weights, config, SAMPLING, *arrays))(
        latent, keys, text, negative
    )
    bound, lq = bind(DiT, dit, params), (latent - mean) / std
    expected = jax.jit(lambda *arrays: without_cache(bound, config, *arrays))(lq, keys, text, negative)
    np.testing.assert_allclose((found - mean) / std, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.1
