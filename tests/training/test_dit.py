"""What the DiT stage does beside encoding: weak LQ latents."""

import dataclasses

import jax
import numpy as np

from zipir_jax.config import DiffusionConfig
from zipir_jax.training.stages.dit import weaken

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
