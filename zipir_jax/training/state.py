"""The training state, a plain dict, and the pure function that advances it by one step."""

import jax
import jax.numpy as jnp
import optax

from zipir_jax.config import TrainConfig
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.layers import init_params
from zipir_jax.parallel import constrain
from zipir_jax.training.optimizer import learning_rate, make_optimizer
from zipir_jax.training.stages import STAGES


def create_state(config: TrainConfig, key, pretrained: dict) -> dict:
    """{"params": {"generator", "discriminator"}, "ema", "optimizer", "step"} at step 0; pure, to be jitted.

    pretrained: groups of weights; those that the stage makes are gone on from.
    """
    keys = jax.random.split(key)
    fresh = STAGES[config.stage].init(config, keys[0], pretrained)
    generator = {group: pretrained.get(group, params) for group, params in fresh.items()}
    params = {"generator": generator, "discriminator": {}}
    if config.stage != "dit" and config.loss.adversarial > 0:
        params["discriminator"] = init_params(PatchDiscriminator, config.discriminator, keys[1])
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, generator),
        "optimizer": make_optimizer(config).init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def train_step(
    config: TrainConfig, adversarial: bool, state: dict, frozen: dict, batch: dict
) -> tuple[dict, dict]:
    """(next state, metrics). Random numbers follow from the seed and the step alone.

    `adversarial` says whether the discriminator takes part (both arguments before `state` are static). A step whose
    gradient is not finite changes neither parameters nor moments: the metric "skipped" is then 1, and
    "skipped_in_a_row" counts such steps.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    gradients, metrics = mean_gradients(config, adversarial, state["params"], frozen, batch, key)
    updates, optimizer = make_optimizer(config).update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    step = state["step"] + 1
    # A short memory at first, so that the average is not held back by the initial weights.
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params["generator"])
    metrics |= {
        "gradient_norm": optax.tree.norm(gradients["generator"]),
        "learning_rate": learning_rate(config)(state["step"]),
        "skipped": 1.0 - optimizer.last_finite,
        "skipped_in_a_row": optimizer.notfinite_count,
    }
    return {"params": params, "ema": ema, "optimizer": optimizer, "step": step}, metrics


def mean_gradients(
    config: TrainConfig, adversarial: bool, params: dict, frozen: dict, batch: dict, key
) -> tuple[dict, dict]:
    """The stage's gradients and metrics, averaged over `accumulate` micro-batches, which `lax.scan` runs in turn."""
    gradients = STAGES[config.stage].gradients
    parts = config.accumulate
    if parts == 1:
        return gradients(config, params, frozen, batch, key, adversarial)

    def split(x):
        # Every parts-th image, so that each device keeps the images that it has.
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch")

    def add(sums, part):
        number, micro_batch = part
        terms = gradients(config, params, frozen, micro_batch, jax.random.fold_in(key, number), adversarial)
        return jax.tree.map(jnp.add, sums, terms), None

    micro_batches = jnp.arange(parts), jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches[1])
    terms = jax.eval_shape(lambda: gradients(config, params, frozen, first, key, adversarial))
    # The sums start as the parameters are divided over devices.
    zeros = (
        jax.tree.map(jnp.zeros_like, params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), terms[1]),
    )
    sums, _ = jax.lax.scan(add, zeros, micro_batches)
    return jax.tree.map(lambda x: x / parts, sums)
