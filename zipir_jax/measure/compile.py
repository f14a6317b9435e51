"""The programs of training and of restoring, compiled for hardware that is not there: what each device would hold."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from zipir_jax import parallel, restorer
from zipir_jax.config import MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from zipir_jax.data.buckets import Bucket
from zipir_jax.measure.topologies import GIB, GPU_SHARE, HARDWARE, devices, usable_memory
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.planner import TEXT_BLOCK, make_plan
from zipir_jax.training.loop import compile_step
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import create_state
from zipir_jax.weights import abstract_weights

ATTENTION = {"tpu": "splash", "cuda": "cudnn"}  # the kernel of each platform
IMAGES = 2  # of a micro-batch that a device computes at a time, at most; `accumulate` follows
NOTE = (
    "Compiled, not run: GiB on each device. Training: a global batch of 128 square crops from images, in as many micro-"
    f"batches as leave a device {IMAGES} of them; restoring: one picture, weights in bfloat16, 25 steps with guidance. "
    f"Attention: {ATTENTION['tpu']} on TPUs, {ATTENTION['cuda']} on GPUs. A GPU has {GPU_SHARE:.0%} of its memory, "
    "which is what jax takes of it by default; a TPU what its compiler gives away."
)
COLUMNS = {
    "program": "{program}",
    "side, px": "{side}",
    "hardware": "{hardware}",
    "devices": "{devices}",
    "micro-batches": "{accumulate}",
    "arguments": "{arguments}",
    "temporaries": "{temporaries}",
    "total": "{total}",
    "has": "{usable}",
    "fits": "{fits}",
    "compiled in, s": "{seconds:.0f}",
}


def training_step(config: TrainConfig, mesh: Mesh, side: int) -> tuple[jax.stages.Compiled, int]:
    """The step of `training.loop` on square crops, encoding included, compiled for the devices of a mesh.

    And the bytes that each of them has of state and frozen networks: of what they all hold, its part.
    """
    data = dataclasses.replace(config.data, text="embeddings" if config.model.dit.text_width else "")
    config = dataclasses.replace(config, data=data)
    groups = abstract_weights(config.model)
    groups = {name: groups[name] for name in ("statistics", *STAGES[config.stage].needs(config))}
    state = jax.eval_shape(functools.partial(create_state, config), jax.random.key(0), groups)
    state, frozen = (_sharded(mesh, tree) for tree in (state, groups))
    bucket = Bucket(side, side, data.batch_size, np.zeros(0, np.int64), 1.0)
    return compile_step(config, mesh, bucket, False, state, frozen), _bytes((state, frozen))


def sampling_program(
    program: str, config: ModelConfig, mesh: Mesh, side: int, memory: int
) -> tuple[jax.stages.Compiled, int]:
    """One of the programs that `Restorer.restore` runs for a square picture of `side` pixels.

    And the bytes of all weights, read by this program or not, and of what it is given.

    program: "encode", "denoise" (all steps, with a negative text) or "decode"; memory: bytes of the device, for which
    `planner.make_plan` plans it. Raises ValueError where that says that it does not fit.
    """
    groups = {name: group for name, group in abstract_weights(config).items() if name in restorer.NEEDED}
    weights = jax.eval_shape(functools.partial(restorer.in_compute_dtype, config), groups)
    weights = jax.tree.map(lambda x: _placed(x, parallel.replicated(mesh)), weights)
    plan = make_plan(config, side, side, available=memory - _bytes(weights), branches=2, platform="gpu")
    image = jax.ShapeDtypeStruct((1, plan.height, plan.width, 3), jnp.float32)
    latent = (1, plan.height // FACTOR, plan.width // FACTOR, config.dit.latent_channels)
    latent = jax.ShapeDtypeStruct(latent, jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    text = {
        "text": jax.ShapeDtypeStruct((1, TEXT_BLOCK, config.dit.text_width), jnp.float32),
        "text_lengths": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    function, static, arrays = {
        "encode": (restorer._encode, (config, plan.encode), (image,)),
        "denoise": (restorer._denoise, (config, SamplingConfig()), (latent, keys, text, text)),
        "decode": (restorer._decode, (config, plan.decode), (latent, image)),
    }[program]
    arrays = jax.tree.map(lambda x: _placed(x, parallel.replicated(mesh)), arrays)
    with jax.set_mesh(mesh):  # it says for which devices
        return function.lower(*static, weights, *arrays).compile(), _bytes((weights, arrays))


def measure(program: str, config: TrainConfig, hardware: str, side: int) -> dict:
    """A row of the report: bytes that `program` ("train" or one of `sampling_program`) needs on each device.

    Arguments, with all weights that are on the device meanwhile, and what is returned live as long as the program;
    arguments that are donated, and so hold what is returned, count once. Temporaries are the most that the compiler has
    live at a time; code is the program itself. What a runtime keeps besides (cuDNN's and NCCL's buffers,
    fragmentation) is not in it. Where planner or compiler refuse because the memory does not suffice, the row has no
    bytes and their sentence instead.
    """
    platform, _, _ = HARDWARE[hardware]
    dit = dataclasses.replace(config.model.dit, attention=ATTENTION[platform])
    absent = devices(hardware)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dit=dit),
        accumulate=max(1, config.data.batch_size // (IMAGES * len(absent))) if program == "train" else 1,
    )
    row = {"program": program, "side": side, "hardware": hardware, "devices": len(absent)}
    row |= {"accumulate": config.accumulate, "attention": dit.attention, "remat": dit.remat}
    row |= {"usable": usable_memory(hardware), "refusal": ""}
    began = time.monotonic()
    try:
        if program == "train":
            compiled, held = training_step(config, parallel.make_mesh(config.mesh, absent), side)
        else:
            mesh = parallel.make_mesh(MeshConfig(), absent)
            compiled, held = sampling_program(program, config.model, mesh, side, row["usable"])
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = dict.fromkeys(("held", "arguments", "returned", "temporaries", "code", "total"))
        row |= {"refusal": refusal(str(error))}
    else:
        sizes = device_bytes(compiled, held)
    row |= sizes | {"fits": sizes["total"] is not None and sizes["total"] <= row["usable"]}
    return row | {"seconds": time.monotonic() - began}


def cells(row: dict) -> dict:
    """A row as COLUMNS show it: GiB in place of bytes, "-" where the compiler refused."""
    sizes = {name: row[name] for name in ("arguments", "temporaries", "total", "usable")}
    shown = {name: "-" if size is None else f"{size / GIB:.2f}" for name, size in sizes.items()}
    return row | shown | {"fits": "yes" if row["fits"] else "no"}


def device_bytes(compiled: jax.stages.Compiled, held: int) -> dict[str, int]:
    """Bytes a device, see `measure`. held: of what is there, whether the program reads it or not."""
    m = compiled.memory_analysis()
    sizes = {
        "arguments": max(m.argument_size_in_bytes, held),
        "returned": m.output_size_in_bytes - m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()), "held": held}


def refusal(message: str) -> str:
    """The line of a compiler's message that has the numbers."""
    found = re.search(r"[^\n]*\b[Uu]sed [^\n]* of [^\n]*", message) or re.search(r"[^\n]+", message)
    return found.group().strip()


def _sharded(mesh, tree):
    return jax.tree.map(_placed, tree, parallel.parameter_shardings(mesh, tree))


def _placed(abstract, sharding: NamedSharding):
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)


def _bytes(tree):
    """Of a device's part of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
