import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import MODELS, DegradationConfig
from zipir_jax.data.degrade import degrade_item
from zipir_jax.models.layers import init_params
from zipir_jax.models.lp_vae import Encoder, encode, unwhiten, whiten
from zipir_jax.training.statistics import channel_statistics, latent_statistics

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_statistics_are_those_of_all_pixels_of_all_batches():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (n, 4, 5, 2)).astype(np.float32) for n in (1, 3)]
    statistics = channel_statistics("macro", iter(batches))
    pixels = np.concatenate([batch.reshape(-1, 2) for batch in batches]).astype(np.float64)
    assert statistics.keys() == {"macro_mean", "macro_std"}
    np.testing.assert_allclose(statistics["macro_mean"], pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["macro_std"], pixels.std(0), rtol=1e-5)


def test_a_channel_that_never_changes_stays_quiet():
    rng = np.random.default_rng(0)
    latent = rng.normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    latent[..., 1] = 0.3
    latent[..., 2] = 1 + 1e-7 * rng.standard_normal((2, 8, 8))  # rounding errors
    statistics = channel_statistics("latent", [latent])
    white = whiten(jnp.asarray(latent), statistics)
    np.testing.assert_allclose(white.std((0, 1, 2))[0], 1, rtol=1e-4)
    assert jnp.abs(white[..., 1:]).max() < 0.01
    np.testing.assert_allclose(unwhiten(white, statistics), latent, atol=1e-5)


def test_the_statistics_of_latents_and_of_what_degradations_change():
    vae, keys = MODELS["tiny"].lp_vae, jax.random.split(jax.random.key(0))
    weights = {
        "statistics": {"macro_mean": np.zeros(3, np.float32), "macro_std": np.full(3, 2, np.float32)},
        "coarse_encoder": init_params(Encoder, vae.coarse, keys[0]),
        "fine_encoder": init_params(Encoder, vae.fine, keys[1]),
    }
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 96, 3)).astype(np.float32)
    degradation = DegradationConfig(task_probability=1.0, tasks=("sr8", "mixture"))
    found = latent_statistics(vae, weights, iter(images), degradation)
    assert found.keys() == {"latent_mean", "latent_std", "residual_std"}
    lq = [
        [degrade_item(image, degradation, (i, j)) for j, image in enumerate(batch)]
        for i, batch in enumerate(images)
    ]
    clean, lq = (
        np.stack([encode(weights, vae, jnp.asarray(batch)) for batch in batches])
        for batches in (images, np.array(lq))
    )
    np.testing.assert_allclose(found["latent_mean"], clean.mean((0, 1, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(found["latent_std"], clean.std((0, 1, 2, 3)), rtol=1e-3)
    change = (clean - lq) / (found["latent_std"] * found["residual_std"])
    np.testing.assert_allclose(np.sqrt((change**2).mean((0, 1, 2, 3))), 1, rtol=1e-3)
    assert latent_statistics(vae, weights, iter(images)).keys() == {"latent_mean", "latent_std"}
