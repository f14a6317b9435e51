import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zipir_jax.config import DiscriminatorConfig, LossConfig, OptimizerConfig, TrainConfig
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.lp_vae import Encoder
from zipir_jax.models.pixel_decoder import PixelDecoder
from zipir_jax.training import state as state_module
from zipir_jax.training.state import create_state, mean_gradients, train_step

pytestmark = pytest.mark.usefixtures("quick_compile")
GENERATOR = {"toy": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}


def toy_gradients(config, params, frozen, batch, key, adversarial):
    """Random gradients: what a step does with them is closed form."""
    noise = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    return noise, {"adversarial": adversarial, "draw": jax.random.uniform(key)}


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch):
    stage = types.SimpleNamespace(
        init=lambda config, key, pretrained: jax.tree.map(jnp.array, GENERATOR), gradients=toy_gradients
    )
    monkeypatch.setitem(state_module.STAGES, "coarse", stage)
    return stage


def toy_config(**changes):
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=1)
    return TrainConfig(optimizer=optimizer, loss=LossConfig(adversarial=0.0), steps=10, **changes)


def run(config, steps):
    """All states from step 0 on, and the metrics of each step."""
    states, metrics = [create_state(config, jax.random.key(0), {})], []
    step = jax.jit(functools.partial(train_step, config, False))
    for _ in range(steps):
        state, values = step(states[-1], {}, {})
        states.append(state)
        metrics.append(values)
    return states, metrics


@pytest.mark.parametrize("ema_decay", [0.9999, 0.2])
def test_the_average_follows_its_recursion(ema_decay):
    states, _ = run(toy_config(ema_decay=ema_decay), 3)
    average = np.asarray(GENERATOR["toy"]["kernel"], np.float64)
    for step in (1, 2, 3):
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(
            states[step]["params"]["generator"]["toy"]["kernel"]
        )
        np.testing.assert_allclose(states[step]["ema"]["toy"]["kernel"], average, rtol=1e-5)
    assert np.abs(average - states[3]["params"]["generator"]["toy"]["kernel"]).max() > 1e-3


def test_a_step_counts_and_reports_its_learning_rate():
    states, metrics = run(toy_config(), 2)
    assert [int(state["step"]) for state in states] == [0, 1, 2]
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], [0, 0.1], rtol=1e-5)
    assert all(m["gradient_norm"] > 0.1 for m in metrics)


def test_random_numbers_follow_from_the_seed_and_the_step():
    draws = {seed: [float(m["draw"]) for m in run(toy_config(seed=seed), 3)[1]] for seed in (0, 1)}
    assert len({*draws[0], *draws[1]}) == 6
    config = toy_config(seed=0)
    late = create_state(config, jax.random.key(5), {}) | {"step": jnp.asarray(2)}
    _, metrics = train_step(config, False, late, {}, {})
    np.testing.assert_allclose(metrics["draw"], draws[0][2], rtol=1e-6)


@pytest.mark.parametrize(
    ("stage", "adversarial", "expected"), [("fine", 0.5, True), ("fine", 0.0, False), ("dit", 0.5, False)]
)
def test_a_discriminator_exists_only_where_it_is_used(stage, adversarial, expected):
    config = TrainConfig(stage=stage, loss=LossConfig(adversarial=adversarial))
    state = jax.eval_shape(lambda key: create_state(config, key, {}), jax.random.key(0))
    assert bool(state["params"]["discriminator"]) == expected
    assert state["params"]["generator"].keys() == state["ema"].keys()


def test_training_goes_on_from_the_weights_that_it_is_given():
    given = {"toy": jax.tree.map(lambda p: p + 3, GENERATOR["toy"]), "other": {"kernel": jnp.ones(2)}}
    state = create_state(toy_config(), jax.random.key(0), given)
    for tree in (state["params"]["generator"], state["ema"]):
        assert tree.keys() == {"toy"}
        jax.tree.map(np.testing.assert_array_equal, tree["toy"], given["toy"])


# --------------------------------------------------------------------------------------------------
# Gradients that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_one_bad_value_of_either_player_leaves_both_as_they_are(bad, player, monkeypatch, toy_stage):
    """The two share one loss: a generator that goes on against a discriminator that could not is another game."""

    def gradients(config, params, frozen, batch, key, adversarial):
        ones = jax.tree.map(jnp.ones_like, params)
        is_bad = batch["is_bad"][0]
        if player == "generator":
            ones["generator"]["toy"]["bias"] = (
                ones["generator"]["toy"]["bias"].at[1].set(jnp.where(is_bad, bad, 1))
            )
        else:
            ones["discriminator"] = jax.tree.map(lambda p: jnp.where(is_bad, bad, p), ones["discriminator"])
        return ones, {}

    monkeypatch.setattr(toy_stage, "gradients", gradients)
    config = toy_config(ema_decay=0.5)
    config = dataclasses.replace(
        config,
        loss=LossConfig(adversarial=0.5),
        discriminator=DiscriminatorConfig(base_channels=1, layers=1, compute_dtype="float32"),
    )
    step = jax.jit(functools.partial(train_step, config, True))
    state, counts = create_state(config, jax.random.key(0), {}), []
    for is_bad in (False, False, True, True, False, True):
        before = state
        state, metrics = step(state, {}, {"is_bad": jnp.array([is_bad])})
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, state)
        moments = jax.tree.leaves(same["optimizer"].inner_state)
        kept = [*jax.tree.leaves(same["params"]["generator"]), *moments]
        assert all(kept) if is_bad else not any(moments)
        assert all(jax.tree.leaves(same["params"]["discriminator"])) == is_bad
        assert state["step"] == before["step"] + 1  # the next step has other random numbers
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 2), (0, 0), (1, 1)]


# --------------------------------------------------------------------------------------------------
# Accumulation
# --------------------------------------------------------------------------------------------------


def test_micro_batches_share_out_the_images_and_draw_numbers_of_their_own(monkeypatch, toy_stage):
    def gradients(config, params, frozen, batch, key, adversarial):
        images = jnp.zeros(12).at[batch["image"].astype(int)].set(1.0)
        gradients = {"generator": {"toy": {"seen": images}}, "discriminator": {}}
        return gradients, {"draw": jax.random.uniform(key), "size": len(batch["image"])}

    monkeypatch.setattr(toy_stage, "gradients", gradients)
    params = {"generator": {"toy": {"seen": jnp.zeros(12)}}, "discriminator": {}}

    def mean(accumulate, count):
        batch = {"image": jnp.arange(count)}
        config = toy_config(accumulate=accumulate)
        return mean_gradients(config, False, params, {}, batch, jax.random.key(3))

    for accumulate in (2, 3, 6):
        means, metrics = mean(accumulate, 12)
        np.testing.assert_allclose(means["generator"]["toy"]["seen"], 1 / accumulate, rtol=1e-6)
        draws = [
            jax.random.uniform(jax.random.fold_in(jax.random.key(3), part)) for part in range(accumulate)
        ]
        np.testing.assert_allclose(metrics["draw"], np.mean(draws), rtol=1e-6)
        assert metrics["size"] == 12 / accumulate


def test_micro_batches_give_the_gradients_of_the_whole_batch(make_config, random_params, quick_lpips):
    """Of a stage in which nothing is random: the pixel-aware decoder, without LPIPS windows and discriminator."""
    config = make_config("pixel_decoder")
    vae = config.model.lp_vae
    groups = {
        "coarse_encoder": random_params(Encoder, vae.coarse, 1),
        "fine_encoder": random_params(Encoder, vae.fine, 2),
        "statistics": {"macro_mean": np.zeros(3, np.float32), "macro_std": np.ones(3, np.float32)},
        "lpips": {"factor": np.float32(1.5)},
    }
    params = {
        "generator": {"pixel_decoder": random_params(PixelDecoder, vae, 3)},
        "discriminator": random_params(PatchDiscriminator, config.discriminator, 4),
    }
    rng = np.random.default_rng(0)
    batch = {name: rng.uniform(-1, 1, (4, 64, 64, 3)).astype(np.float32) for name in ("image", "lq")}

    def mean(accumulate):
        changed = dataclasses.replace(config, accumulate=accumulate)
        return jax.jit(functools.partial(mean_gradients, changed, False))(
            params, groups, batch, jax.random.key(0)
        )

    (whole, metrics), (parts, metrics_of_parts) = mean(1), mean(2)
    assert jax.tree.structure(whole) == jax.tree.structure(parts) == jax.tree.structure(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(
            b, a, atol=1e-5 * max(np.abs(a).max(), 1e-9), err_msg=jax.tree_util.keystr(path)
        )
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(whole["generator"]))
    assert metrics.keys() == metrics_of_parts.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_of_parts[name], value, rtol=1e-5, err_msg=name)
