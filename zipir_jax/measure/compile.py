"""The programs of training and of restoring, compiled for hardware that is not there: what each device would hold."""

import dataclasses
import math
import re
import time

import jax
from jax.sharding import Mesh

from zipir_jax import parallel
from zipir_jax.config import MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from zipir_jax.measure.programs import (
    sampling_programs,
    sampling_weights,
    training_arguments,
    training_program,
)
from zipir_jax.measure.topologies import GIB, GPU_SHARE, HARDWARE, devices, usable_memory
from zipir_jax.planner import TooLargeError, make_plan

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
    return training_program(config, mesh, side), _bytes(training_arguments(config, mesh))


def sampling_program(
    program: str, config: ModelConfig, mesh: Mesh, side: int, memory: int
) -> tuple[jax.stages.Compiled, int]:
    """One of the programs that `Restorer.restore` runs for a square picture of `side` pixels.

    And the bytes of all weights, read by this program or not, and of what it is given.

    program: "encode", "denoise" (all steps, with a negative text) or "decode"; memory: bytes of the device, for which
    `planner.make_plan` plans it. Raises TooLargeError where that says that it does not fit.
    """

    def placed(tree):
        whole = parallel.replicated(mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    weights = placed(sampling_weights(config))
    available = memory - _bytes(weights)
    platform = mesh.devices.flat[0].platform
    plan = make_plan(config, side, side, available=available, branches=2, platform=platform)
    function, static, arrays = sampling_programs(config, SamplingConfig(), plan, branches=2)[program]
    arrays = placed(arrays)
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
    except (TooLargeError, jax.errors.JaxRuntimeError) as error:
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


def _bytes(tree):
    """Of a device's part of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
