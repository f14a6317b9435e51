"""How arrays are divided over devices: one table from parameter paths to logical axes, one from these to the mesh.

Mesh axes: `data` repeats the model; `fsdp` divides the parameters of the DiT and of T5, and the optimizer state, which
are gathered where they are used; `tensor` divides the heads and hidden channels of both, and the height of the images
that the LP-VAE reads.
The batch is divided over `data` and `fsdp`. Everything else follows by XLA's propagation.
"""

import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax import P
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from zipir_jax.config import MeshConfig

# Logical axes of a parameter's dimensions; the first entry whose pattern is found in the path and that has as many
# dimensions counts. The optimizer's moments and the average have the same paths, with others before them.
PARAMETER_AXES = (
    (r"attention\.(query|key|value)\.kernel$", ("layers", "embed", "heads")),
    (r"attention\.out\.kernel$", ("layers", "heads", "embed")),
    (r"mlp\.(up|gate)\.kernel$", ("layers", "embed", "hidden")),
    (r"mlp\.down\.kernel$", ("layers", "hidden", "embed")),
    (r"blocks\.modulation\.kernel$", ("layers", "embed", "hidden")),
    (r"(timestep_in|embed_noisy|embed_lq)\.kernel$", (None, "embed")),
    (r"(timestep_out|final_modulation)\.kernel$", ("embed", "hidden")),
    (r"head\.kernel$", ("embed", None)),
    (r"token_embedding\.embedding$", (None, "embed")),
    # Convolutions stay whole: the LP-VAE's parameters are few beside its images.
    (r"kernel$", (None, None, None, None)),
)

# Mesh axes of a logical axis; what is not named here is not divided.
MESH_AXES = {
    "batch": ("data", "fsdp"),
    "height": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
}

IMAGES = ("image", "lq")  # the arrays of a batch whose second axis is the height of images
# Rows of an image that a device gets at least, two of the latent: with less, XLA's partitioner (jax 0.10.2) gets the
# gradients of strided convolutions wrong, and within a loop their values, too.
SMALLEST_ROWS = 64
LARGEST_UNMATCHED = 1_000_000  # elements of a parameter that may stay whole although no rule says so


def start() -> None:
    """Join the other processes of the job, if there are any; before jax touches a device.

    They are found under SLURM, Open MPI, Kubernetes (indexed jobs, GKE) and on Cloud TPUs, or named by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    environment = os.environ
    # The signals are the training loop's: it lets a step end and saves.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            num_processes=int(environment["JAX_NUM_PROCESSES"]), process_id=int(environment["JAX_PROCESS_ID"])
        )
        return
    several = (
        int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1,
        int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
        "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment,
        "," in environment.get("TPU_WORKER_HOSTNAMES", ""),
        # A Cloud TPU machine learns from its metadata whether it is one of several. Up to v4 its chips are
        # /dev/accel*, later /dev/vfio/*.
        importlib.util.find_spec("libtpu") is not None
        and any(Path(chip).exists() for chip in ("/dev/accel0", "/dev/vfio/0")),
    )
    if any(several):
        jax.distributed.initialize()


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `devices`, by default of all. Raises ValueError, with the numbers, if they do not make one."""
    devices = devices or jax.devices()
    count, local = len(devices), sum(d.process_index == devices[0].process_index for d in devices)
    left = count // (max(config.data, 1) * max(config.fsdp, 1) * config.tensor)
    data, fsdp = config.data or left, config.fsdp or left
    if data * fsdp * config.tensor != count:
        raise ValueError(
            f"a mesh of data {config.data or 'any'} x fsdp {config.fsdp or 'any'} x tensor {config.tensor} does not "
            f"make up {count} devices"
        )
    if local % config.tensor:
        raise ValueError(
            f"mesh.tensor {config.tensor} does not divide the {local} devices of a process, which share its images"
        )
    shape = (data, fsdp, config.tensor)
    try:
        mesh = jax.make_mesh(
            shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
        )
    except NotImplementedError:  # of a TPU slice whose wiring has no such axis
        raise ValueError(
            f"a mesh of {data} x {fsdp} x {config.tensor} does not fit how the devices are wired"
        ) from None
    for devices_of_part in mesh.devices.reshape(-1, config.tensor):
        if len({device.process_index for device in devices_of_part}) > 1:
            raise ValueError(
                f"mesh.tensor {config.tensor} takes devices of several processes, which share no images"
            )
    return mesh


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def mesh_parts(axis: str) -> int:
    """The parts that the mesh in effect divides a logical axis into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    names = (MESH_AXES[axis],) if isinstance(MESH_AXES[axis], str) else MESH_AXES[axis]
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)


def platform() -> str:
    """Of the devices of the mesh in effect or, without one, of jax's default ones: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _spec(axes):
    return P(*(MESH_AXES.get(axis) for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Divide an activation by the logical axes of its first dimensions; without a mesh, `x` as it is.

    None is a dimension that stays whole; the dimensions after the last one named are left as they are.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, P(*_spec(axes), *free))


def parameter_spec(mesh: AbstractMesh | Mesh, path: str, shape: tuple[int, ...]) -> P:
    """How a parameter, or a moment of it, is divided.

    A dimension that its mesh axis does not divide stays whole. Raises ValueError for a parameter of a million elements
    or more of which that is true, or that no rule names.
    """
    is_large = np.prod(shape) >= LARGEST_UNMATCHED
    for pattern, axes in PARAMETER_AXES:
        if len(axes) == len(shape) and re.search(pattern, path):
            spec = []
            for size, name in zip(shape, (MESH_AXES.get(axis) for axis in axes), strict=True):
                divides = name is not None and size % mesh.shape[name] == 0
                if name is not None and not divides and is_large:
                    raise ValueError(
                        f"{path} of shape {shape} does not divide over mesh.{name} {mesh.shape[name]}"
                    )
                spec.append(name if divides else None)
            return P(*spec)
    if is_large:
        raise ValueError(f"{path} of shape {shape} matches no sharding rule")
    return P()


def parameter_shardings(mesh: AbstractMesh | Mesh, tree):
    """A `NamedSharding` for each leaf of a tree of parameters, or of training state, by its path."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(mesh, name, leaf.shape))

    return jax.tree.map_with_path(sharding, tree)


def divides_height(mesh: AbstractMesh | Mesh, height: int) -> bool:
    """Whether images of this height are divided by it; otherwise each device of the tensor axis has them whole."""
    return height % (mesh.shape["tensor"] * SMALLEST_ROWS) == 0


def batch_shardings(
    mesh: AbstractMesh | Mesh, shapes: dict[str, tuple[int, ...]]
) -> dict[str, NamedSharding]:
    """A `NamedSharding` for each array of a batch, by its name and shape."""

    def sharding(name, shape):
        by_height = name in IMAGES and divides_height(mesh, shape[1])
        return NamedSharding(mesh, _spec(("batch", "height") if by_height else ("batch",)))

    return {name: sharding(name, shape) for name, shape in shapes.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def put(tree, shardings):
    """Arrays that every process holds whole, as global arrays of these shardings (one for all, or a tree of them)."""

    def put_leaf(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put_leaf(leaf, shardings), tree)
    return jax.tree.map(put_leaf, tree, shardings)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process' part of a batch, as its part of the global arrays."""
    shardings = batch_shardings(mesh, {name: array.shape for name, array in batch.items()})
    return {
        name: jax.make_array_from_process_local_data(shardings[name], array) for name, array in batch.items()
    }


def gather(mesh: Mesh, tree):
    """Global arrays as numpy arrays; None for each on processes other than the first. All processes must call it."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def gather_leaf(leaf):  # one by one: no device has to hold more than one of them whole
        leaf = whole(leaf)
        return np.asarray(leaf) if jax.process_index() == 0 else None

    return jax.tree.map(gather_leaf, tree)
