import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import LossConfig, OptimizerConfig, TrainConfig
from zipir_jax.training import state as state_module
from zipir_jax.training.state import create_state, train_step

pytestmark = pytest.mark.usefixtures("quick_compile")
GENERATOR = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}


def toy_gradients(config, params, frozen, batch, key, adversarial):
    """Random gradients: what a step does with them is closed form."""
    noise = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    return noise, {"adversarial": adversarial, "draw": jax.random.uniform(key)}


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch):
    monkeypatch.setitem(state_module.STAGES, "coarse", types.SimpleNamespace(gradients=toy_gradients))


def make_config(**changes):
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=1)
    return TrainConfig(optimizer=optimizer, loss=LossConfig(adversarial=0.0), steps=10, **changes)


def run(config, steps):
    """All states from step 0 on, and the metrics of each step."""
    states, metrics = [create_state(config, GENERATOR, jax.random.key(0))], []
    step = jax.jit(functools.partial(train_step, config, False))
    for _ in range(steps):
        state, values = step(states[-1], {}, {})
        states.append(state)
        metrics.append(values)
    return states, metrics


@pytest.mark.parametrize("ema_decay", [0.9999, 0.2])
def test_the_average_follows_its_recursion(ema_decay):
    states, _ = run(make_config(ema_decay=ema_decay), 3)
    average = np.asarray(GENERATOR["kernel"], np.float64)
    for step in (1, 2, 3):
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(states[step]["params"]["generator"]["kernel"])
        np.testing.assert_allclose(states[step]["ema"]["kernel"], average, rtol=1e-5)
    assert np.abs(average - states[3]["params"]["generator"]["kernel"]).max() > 1e-3


def test_a_step_counts_and_reports_its_learning_rate():
    states, metrics = run(make_config(), 2)
    assert [int(state["step"]) for state in states] == [0, 1, 2]
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], [0, 0.1], rtol=1e-5)
    assert all(m["gradient_norm"] > 0.1 for m in metrics)


def test_random_numbers_follow_from_the_seed_and_the_step():
    draws = {seed: [float(m["draw"]) for m in run(make_config(seed=seed), 3)[1]] for seed in (0, 1)}
    assert len({*draws[0], *draws[1]}) == 6
    config = make_config(seed=0)
    late = create_state(config, GENERATOR, jax.random.key(5)) | {"step": jnp.asarray(2)}
    _, metrics = train_step(config, False, late, {}, {})
    np.testing.assert_allclose(metrics["draw"], draws[0][2], rtol=1e-6)


@pytest.mark.parametrize(
    ("stage", "adversarial", "expected"), [("fine", 0.5, True), ("fine", 0.0, False), ("dit", 0.5, False)]
)
def test_a_discriminator_exists_only_where_it_is_used(stage, adversarial, expected):
    config = TrainConfig(stage=stage, loss=LossConfig(adversarial=adversarial))
    state = jax.eval_shape(lambda key: create_state(config, GENERATOR, key), jax.random.key(0))
    assert bool(state["params"]["discriminator"]) == expected
    assert state["params"]["generator"].keys() == state["ema"].keys() == GENERATOR.keys()
