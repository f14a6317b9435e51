import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from zipir_jax.config import DiTConfig, LossConfig, OptimizerConfig, TrainConfig
from zipir_jax.models.dit import DiT
from zipir_jax.models.layers import init_params
from zipir_jax.training.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = TrainConfig(
    optimizer=OptimizerConfig(
        learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10, weight_decay=0.5, clip_norm=2.0
    ),
    loss=LossConfig(discriminator_learning_rate=4e-3),
    steps=100,
)


def with_optimizer(**changes):
    return dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, **changes))


def test_the_learning_rate_rises_linearly_and_falls_to_its_final_value():
    rates = np.array([float(learning_rate(CONFIG)(step)) for step in range(121)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 1e-2, 11), rtol=1e-5)
    assert np.all(np.diff(rates[10:101]) < 0)
    np.testing.assert_allclose(rates[55], (1e-2 + 1e-3) / 2, rtol=1e-5)  # halfway down a cosine
    np.testing.assert_allclose(rates[100:], 1e-3, rtol=1e-5)


def test_without_warm_up_it_starts_at_the_peak():
    rate = learning_rate(with_optimizer(warmup_steps=0))
    np.testing.assert_allclose([rate(0), rate(100)], [1e-2, 1e-3], rtol=1e-5)


def test_a_run_that_ends_within_the_warm_up_still_warms_up():
    rate = learning_rate(dataclasses.replace(CONFIG, steps=4))
    np.testing.assert_allclose([rate(step) for step in range(5)], np.linspace(0, 4e-3, 5), rtol=1e-5)


def update(config, params, gradients, count):
    """The parameters after `count` updates with the gradients that `gradients(i)` returns."""
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for i in range(count):
        updates, state = optimizer.update(gradients(i), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_weight_decay_acts_on_kernels_of_the_generator_alone():
    """The DiT's blocks are stacked, so that its biases and norm scales have two axes; they do not decay either."""
    dit = init_params(DiT, DiTConfig(layers=2, width=16, heads=2, text_width=0, bias=True), jax.random.key(0))
    params = {"generator": dit, "discriminator": {"kernel": jnp.ones((3, 3, 1, 2))}}
    params = jax.tree.map(lambda p: jnp.full_like(p, 2), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = update(with_optimizer(warmup_steps=0), params, lambda _: zeros, 1)
    np.testing.assert_array_equal(moved["discriminator"]["kernel"], 2)
    seen = set()
    for path, leaf in flatten_dict(moved["generator"]).items():
        seen.add(path[-1])
        expected = 2 - 1e-2 * 0.5 * 2 if path[-1] == "kernel" else 2
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=str(path))
    assert seen == {"kernel", "bias", "scale"}


def adam(parameter, gradients, rates, beta1, beta2, clip):
    """Kingma & Ba 2015, algorithm 1, in float64, each gradient cut to a norm of `clip`."""
    mean = square = np.zeros_like(parameter)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient * min(1, clip / np.linalg.norm(gradient))
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        corrected = mean / (1 - beta1**step), square / (1 - beta2**step)
        parameter = parameter - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return parameter


@pytest.mark.parametrize("size", [0.1, 30.0], ids=["below the clip norm", "above it"])
def test_each_player_has_adam_with_its_own_rate_betas_and_clipping(size):
    rng = np.random.default_rng(0)
    start = {part: rng.standard_normal(5) for part in ("generator", "discriminator")}
    gradients = {part: rng.standard_normal((4, 5)) for part in start}
    gradients["generator"] *= np.array([size, 0.1, size, 1])[:, None]
    gradients["discriminator"] *= np.array([1, size, 0.1, size])[:, None]
    moved = update(
        CONFIG,
        {part: {"bias": jnp.asarray(p, jnp.float32)} for part, p in start.items()},
        lambda i: {part: {"bias": jnp.asarray(g[i], jnp.float32)} for part, g in gradients.items()},
        4,
    )
    rates = [0, 1e-3, 2e-3, 3e-3]  # the warm-up
    expected = adam(start["generator"], gradients["generator"], rates, 0.9, 0.95, 2.0)
    np.testing.assert_allclose(moved["generator"]["bias"], expected, atol=1e-6)
    expected = adam(start["discriminator"], gradients["discriminator"], [4e-3] * 4, 0.5, 0.9, 2.0)
    np.testing.assert_allclose(moved["discriminator"]["bias"], expected, atol=1e-6)


def test_muon_moves_kernels_by_orthogonal_matrices_as_large_as_the_updates_of_adam():
    """A convolution's window and inputs are the rows of one matrix, each layer of a stack has its own."""
    config = with_optimizer(algorithm="muon", warmup_steps=0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "stack": (5, 16, 12), "linear": (6, 24)}
    gradient = {name: {"kernel": rng.standard_normal(shape)} for name, shape in shapes.items()}
    gradient["linear"]["bias"] = rng.standard_normal(24)
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    both = {"generator": gradient, "discriminator": {}}
    moved = update(config, jax.tree.map(jnp.zeros_like, both), lambda _: both, 1)["generator"]
    for name, shape in shapes.items():
        matrices = np.asarray(moved[name]["kernel"]).reshape(
            {"conv": (1, 36, 8), "stack": shape, "linear": (1, *shape)}[name]
        )
        for matrix in matrices:
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular.max() / singular.min() < 2.5  # what five Newton-Schulz iterations leave
            assert 0.6 < np.sqrt((matrix**2).mean()) / (0.2 * 1e-2) < 1.3
    # Adam's first update, with Nesterov's momentum: by the sign, one size for all.
    steps = moved["linear"]["bias"] / -np.sign(gradient["linear"]["bias"])
    np.testing.assert_allclose(steps, np.full(24, steps[0]), rtol=1e-3)
    assert 1e-2 <= steps[0] < 2e-2


def test_muon_trains_only_what_its_gradient_is_finite_for():
    params = {"generator": {"kernel": jnp.ones((4, 4))}, "discriminator": {}}
    moved = update(
        with_optimizer(algorithm="muon"), params, lambda _: jax.tree.map(lambda x: x * jnp.nan, params), 3
    )
    np.testing.assert_array_equal(moved["generator"]["kernel"], 1)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm 'sgd' is not one of"):
        OptimizerConfig(algorithm="sgd")
