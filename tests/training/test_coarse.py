import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.metrics.fidelity import load_lpips
from zipir_jax.training.state import create_state, train_step
from zipir_jax.training.statistics import macro_statistics

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_loss_falls_on_one_batch(make_config):
    config = make_config("coarse", steps=15)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2),
        loss=dataclasses.replace(config.loss, adversarial=0.0),
    )
    # What the bottleneck can hold: light that changes from side to side.
    ramp = jnp.linspace(-0.8, 0.8, 128)
    pictures = ramp[:, None, None], -ramp[None, :, None]
    batch = {"image": jnp.stack([jnp.broadcast_to(picture, (128, 128, 3)) for picture in pictures])}
    state = create_state(config, jax.random.key(0), {})
    frozen = {"statistics": macro_statistics([np.asarray(batch["image"])]), "lpips": load_lpips("alexnet")[0]}
    step = jax.jit(functools.partial(train_step, config, False))
    values = []
    for _ in range(config.steps):
        state, metrics = step(state, frozen, batch)
        values.append(float(metrics["loss"]))
    # Seeds and machines differ: between 0.15 and 0.5 was seen.
    assert np.mean(values[-5:]) < 0.75 * np.mean(values[:3])
