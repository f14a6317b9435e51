"""The training state, a plain dict, and the pure function that advances it by one step."""

import jax
import jax.numpy as jnp
import optax

from zipir_jax.config import TrainConfig
from zipir_jax.models.discriminator import PatchDiscriminator
from zipir_jax.models.layers import init_params
from zipir_jax.training.optimizer import learning_rate, make_optimizer
from zipir_jax.training.stages import STAGES


def create_state(config: TrainConfig, generator: dict, key) -> dict:
    """{"params": {"generator", "discriminator"}, "ema", "optimizer", "step"} at step 0."""
    params = {"generator": generator, "discriminator": {}}
    if config.stage != "dit" and config.loss.adversarial > 0:
        params["discriminator"] = init_params(PatchDiscriminator, config.discriminator, key)
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

    `adversarial` says whether the discriminator takes part (both arguments before `state` are static).
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    gradients, metrics = STAGES[config.stage].gradients(
        config, state["params"], frozen, batch, key, adversarial
    )
    updates, optimizer = make_optimizer(config).update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    step = state["step"] + 1
    # A short memory at first, so that the average is not held back by the initial weights.
    decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params["generator"])
    metrics |= {
        "gradient_norm": optax.tree.norm(gradients["generator"]),
        "learning_rate": learning_rate(config)(state["step"]),
    }
    return {"params": params, "ema": ema, "optimizer": optimizer, "step": step}, metrics
