"""The programs of training and restoring with abstract arguments: to compile without weights, pictures or devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from zipir_jax import parallel, restorer
from zipir_jax.config import ModelConfig, SamplingConfig, TrainConfig
from zipir_jax.data.buckets import Bucket
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.planner import TEXT_BLOCK, Plan
from zipir_jax.training.loop import abstract_batch, check, compile_step
from zipir_jax.training.losses import lpips_group
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import create_state
from zipir_jax.weights import abstract_weights


def check_side(side: int) -> None:
    """Raises ValueError for a picture whose side, in pixels, is below that of one cell of the latent."""
    if side < FACTOR:
        raise ValueError(f"size {side} is below {FACTOR}")


def square_crops(config: TrainConfig, side: int) -> tuple[TrainConfig, Bucket]:
    """The config with crops of side x side pixels alone, and their bucket. Raises ValueError as `training.loop.check`.

    The folders that a training needs are named, and need not be there.
    """
    text = "text" if config.model.dit.text_width and config.stage == "dit" else ""
    folders = {"sources": ("images",), "text": text}
    data = dataclasses.replace(
        config.data, resolutions=(side,), resolution_weights=(), aspect_ratios=(1.0,), **folders
    )
    config = dataclasses.replace(config, data=data, output="output", init_from="weights")
    check(config)
    return config, Bucket(side, side, config.data.batch_size, np.zeros(0, np.int64), 1.0)


def training_arguments(config: TrainConfig, mesh: Mesh) -> tuple[dict, dict]:
    """The state of a training and what it reads only, as `jax.ShapeDtypeStruct` divided over the devices of a mesh."""
    groups = abstract_weights(config.model)
    groups = {name: groups[name] for name in ("statistics", *STAGES[config.stage].needs(config))}
    state = jax.eval_shape(functools.partial(create_state, config), jax.random.key(0), groups)
    groups |= jax.eval_shape(lambda: lpips_group(config))

    def divided(tree):
        shardings = parallel.parameter_shardings(mesh, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    return divided(state), divided(groups)


def training_batch(config: TrainConfig, mesh: Mesh, side: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a step on crops of side x side pixels, as `training.loop.abstract_batch`."""
    config, bucket = square_crops(config, side)
    return abstract_batch(config, mesh, bucket)


def training_program(config: TrainConfig, mesh: Mesh, side: int) -> jax.stages.Compiled:
    """The step of `training.loop` on crops of side x side pixels, for the arguments of `training_arguments`."""
    config, bucket = square_crops(config, side)
    adversarial = config.stage != "dit" and config.loss.adversarial > 0
    return compile_step(config, mesh, bucket, adversarial, *training_arguments(config, mesh))


def program_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of each device while a program runs, as XLA accounts for them.

    {"arguments", "returned": what does not take the place of a donated argument, "temporaries": the most that live at a
    time, "code", "total"}. What a runtime keeps besides (cuDNN's and NCCL's buffers, fragmentation) is not in it.
    """
    account = compiled.memory_analysis()
    sizes = {
        "arguments": account.argument_size_in_bytes,
        "returned": account.output_size_in_bytes - account.alias_size_in_bytes,
        "temporaries": account.temp_size_in_bytes,
        "code": account.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values())}


def sampling_weights(config: ModelConfig) -> dict:
    """The weights that a `Restorer` holds, as `jax.ShapeDtypeStruct`."""
    groups = abstract_weights(config)
    needed = {group: groups[group] for group in restorer.NEEDED}
    return jax.eval_shape(lambda weights: restorer.in_compute_dtype(config, weights), needed)


def sampling_programs(
    config: ModelConfig, sampling: SamplingConfig, plan: Plan, branches: int
) -> dict[str, tuple]:
    """{program: (jitted function, its static arguments, its arrays but the weights, which come first)} of a plan.

    "encode" and "decode" are the phases of their names, the others are `denoising_programs`. The arrays are
    `jax.ShapeDtypeStruct`.
    """
    shape = plan.pictures, plan.height, plan.width
    image = jax.ShapeDtypeStruct((*shape, 3), jnp.float32)
    latent = (plan.pictures, plan.height // FACTOR, plan.width // FACTOR, config.dit.latent_channels)
    latent = jax.ShapeDtypeStruct(latent, jnp.float32)
    return {
        "encode": (restorer._encode, (config, plan.encode), (image,)),
        **denoising_programs(config, sampling, latent, branches),
        "decode": (restorer._decode, (config, plan.decode), (latent, image)),
    }


def denoising_programs(
    config: ModelConfig, sampling: SamplingConfig, latent: jax.ShapeDtypeStruct, branches: int
) -> dict[str, tuple]:
    """The programs that denoise, as of `sampling_programs`: "read", what comes first, and "denoise", a step.

    latent: of the degraded pictures, [b, h, w, c]. branches of the guidance: 2 with a negative text, else 1.
    """
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), latent.shape[0]))
    text = None
    if config.dit.text_width:
        shape = latent.shape[0], TEXT_BLOCK, config.dit.text_width
        text = {
            "text": jax.ShapeDtypeStruct(shape, jnp.float32),
            "text_lengths": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        }
    steps, numbers = restorer.sampling_numbers(config, sampling, latent.shape)
    step, numbers = jax.eval_shape(lambda: (jax.tree.map(lambda rows: rows[0], steps), numbers))
    given = numbers, latent, keys, text, text if branches == 2 else None
    read, carry = jax.eval_shape(functools.partial(restorer._read, config), sampling_weights(config), *given)
    return {
        "read": (restorer._read, (config,), given),
        "denoise": (restorer._take_step, (config,), (numbers, read, keys, carry, step)),
    }
