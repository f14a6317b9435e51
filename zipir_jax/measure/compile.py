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
    program_bytes,
    sampling_programs,
    sampling_weights,
    training_arguments,
    training_batch,
    training_program,
)
from zipir_jax.measure.topologies import GIB, GPU_SHARE, HARDWARE, devices, usable_memory
from zipir_jax.models.attention import fastest
from zipir_jax.planner import TooLargeError, device_share, make_plan

STATIC = ", static"  # ends the names of programs with static LQ tokens; others have joint ones
RESTORING = ("encode", "read", "denoise", "read" + STATIC, "denoise" + STATIC, "decode")
# Images of a micro-batch that a device computes at a time, at most, and the pixels of a side above which it is one;
# `accumulate` follows.
IMAGES, LARGE = 2, 2048
NOTE = (
    "Compiled, not run: GiB on each device. Training: a global batch of 128 square crops from images, in as many micro-"
    f"batches as leave a device {IMAGES} of them, or 1 above {LARGE} pixels; restoring: one picture, weights in "
    "bfloat16, with guidance, in the tiles that the planner chooses for the device; read begins the denoising, denoise "
    "is each of its steps; planned is what it "
    f"expects. A GPU has {GPU_SHARE:.0%} of its memory, which is what jax takes of it by default; a TPU what its "
    "compiler gives away."
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
    "planned": "{planned}",
    "has": "{usable}",
    "fits": "{fits}",
    "compiled in, s": "{seconds:.0f}",
}


def training_step(config: TrainConfig, mesh: Mesh, side: int) -> tuple[jax.stages.Compiled, int]:
    """The step of `training.loop` on square crops, encoding included, compiled for the devices of a mesh.

    And the bytes that each of them has of state, frozen networks and batch.
    """
    given = training_arguments(config, mesh), training_batch(config, mesh, side)
    return training_program(config, mesh, side), _bytes(given)


def sampling_program(
    program: str, config: ModelConfig, mesh: Mesh, side: int, memory: int
) -> tuple[jax.stages.Compiled, int, int]:
    """One of the programs that `Restorer.restore` runs for a square picture of `side` pixels.

    And the bytes of all weights, read by this program or not, and of what it is given; and those that
    `planner.make_plan` expects, weights included.

    program: of `programs.sampling_programs`; denoising has a negative text. memory: bytes of the device to plan for.
    Raises TooLargeError where the plan says that it does not fit.
    """

    def placed(tree):
        whole = parallel.replicated(mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    weights = placed(sampling_weights(config))
    available = device_share(memory, _bytes(weights))
    platform = mesh.devices.flat[0].platform
    plan = make_plan(config, side, side, available=available, branches=2, platform=platform)
    with jax.set_mesh(mesh):  # it says for which devices
        function, static, arrays = sampling_programs(config, SamplingConfig(), plan, branches=2)[program]
        arrays = placed(arrays)
        compiled = function.lower(*static, weights, *arrays).compile()
    phase = "denoise" if program == "read" else program
    return compiled, _bytes((weights, arrays)), _bytes(weights) + plan.needs[phase]


def measure(program: str, config: TrainConfig, hardware: str, side: int) -> dict:
    """A row of the report: bytes that a program, "train" or one of RESTORING, needs on each device.

    Arguments are all that is on the device meanwhile, read by the program or not; with what is returned they live as
    long as the program, and what is returned into donated arguments counts once. The rest as of `program_bytes`. Where
    planner or compiler refuse because the memory does not suffice, the row has no bytes and their sentence instead.
    """
    platform, _, _ = HARDWARE[hardware]
    model, absent, training = config.model, devices(hardware), program == "train"
    dit = dataclasses.replace(model.dit, attention=fastest(platform, model.dit.compute_dtype))
    if not training:
        dit = dataclasses.replace(dit, lq_attention="static" if program.endswith(STATIC) else "joint")
    images = IMAGES if side <= LARGE else 1
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, dit=dit),
        accumulate=max(1, config.data.batch_size // (images * len(absent))) if training else 1,
    )
    row = {"program": program, "side": side, "hardware": hardware, "devices": len(absent)}
    row |= {"accumulate": config.accumulate, "attention": dit.attention, "remat": dit.remat}
    row |= {"usable": usable_memory(hardware), "refusal": ""}
    began = time.monotonic()
    try:
        if training:
            mesh = parallel.make_mesh(config.mesh, absent)
            compiled, held = training_step(config, mesh, side)
            planned = None  # nothing plans its memory
        else:
            mesh, name = parallel.make_mesh(MeshConfig(), absent), program.removesuffix(STATIC)
            compiled, held, planned = sampling_program(name, config.model, mesh, side, row["usable"])
    except (TooLargeError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        names = ("arguments", "returned", "temporaries", "code", "total", "planned")
        sizes = dict.fromkeys(names)
        row |= {"refusal": refusal(str(error))}
    else:
        sizes = program_bytes(compiled)
        unread = max(0, held - sizes["arguments"])
        sizes |= {name: sizes[name] + unread for name in ("arguments", "total")} | {"planned": planned}
    row |= sizes | {"fits": sizes["total"] is not None and sizes["total"] <= row["usable"]}
    return row | {"seconds": time.monotonic() - began}


def cells(row: dict) -> dict:
    """A row as COLUMNS show it: GiB in place of bytes, "-" where there are none."""
    sizes = {name: row[name] for name in ("arguments", "temporaries", "total", "planned", "usable")}
    shown = {name: "-" if size is None else f"{size / GIB:.2f}" for name, size in sizes.items()}
    return row | shown | {"fits": "yes" if row["fits"] else "no"}


def refusal(message: str) -> str:
    """The line of a compiler's message that has the numbers."""
    found = re.search(r"[^\n]*\b[Uu]sed [^\n]* of [^\n]*", message) or re.search(r"[^\n]+", message)
    return found.group().strip()


def _bytes(tree):
    """Of a device's part of abstract arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
