import jax.numpy as jnp
import numpy as np

from zipir_jax.models.lp_vae import unwhiten, whiten
from zipir_jax.training.statistics import channel_statistics


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
