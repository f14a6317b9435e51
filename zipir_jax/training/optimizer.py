"""Optimizers of the two players: the network that makes images (or noise), and the discriminator."""

import jax
import optax
import optax.contrib

from zipir_jax.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, then cosine decay to the final rate at the last step (paper supplement A)."""
    o = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        0.0, o.learning_rate, o.warmup_steps, max(config.steps, o.warmup_steps + 1), o.final_learning_rate
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon for "generator", Adam for "discriminator", each with its gradient's global norm clipped.

    Where a gradient is not finite, nothing changes but `last_finite` and the count of such steps in a row,
    `notfinite_count`, in its state.
    """
    o = config.optimizer

    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: _is_kernel(path), params)

    if o.algorithm == "muon":
        generator = optax.contrib.muon(
            learning_rate(config),
            beta=o.momentum,
            weight_decay=o.weight_decay,
            weight_decay_mask=kernels,
            adam_b1=o.beta1,
            adam_b2=o.beta2,
            consistent_rms=0.2,  # root mean square of the updates / learning rate, as AdamW's (Liu et al. 2025)
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        generator = optax.adamw(
            learning_rate(config), o.beta1, o.beta2, weight_decay=o.weight_decay, mask=kernels
        )
    # beta1 0.5 as in Isola et al. 2017: the discriminator chases a moving target.
    discriminator = optax.adam(config.loss.discriminator_learning_rate, 0.5, 0.9)
    both = optax.partition(
        {
            "generator": optax.chain(optax.clip_by_global_norm(o.clip_norm), generator),
            "discriminator": optax.chain(optax.clip_by_global_norm(o.clip_norm), discriminator),
        },
        {"generator": "generator", "discriminator": "discriminator"},
    )
    # It would give in after so many; the training loop stops long before.
    return optax.apply_if_finite(both, max_consecutive_errors=2**31 - 1)


def _is_kernel(path) -> bool:
    # By name: in the DiT's stacked blocks biases and norm scales have two axes as well.
    return path[-1].key == "kernel"


def _matrices(params: dict) -> dict:
    """Of each kernel which axes Muon takes for a matrix's rows and columns; None for what is no kernel.

    A convolution's [height, width, in, out] is one matrix from its window to its output; of a linear layer's
    [layers, in, out] each layer is one.
    """

    def matrix(path, x):
        if not _is_kernel(path):
            return None
        rows = (0, 1, 2) if x.ndim == 4 else (x.ndim - 2,)
        return optax.contrib.MuonDimensionNumbers(rows, (x.ndim - 1,))

    return jax.tree.map_with_path(matrix, params)
