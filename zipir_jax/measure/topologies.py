"""Devices that are not there, to compile for: TPU slices through libtpu, GPUs through jax's CUDA plugin.

`JAX_PLATFORMS=cpu` and the variables in ENVIRONMENT must be set before jax is imported.
"""

import dataclasses
import importlib.util
import math

GIB = 2**30
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud for the kind of this machine
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock on chips that are not there
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no complaint that there is no driver
}
# The share of a GPU's memory that jax takes at its start unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class GPU:
    """What XLA wants to know of a GPU: CUDA's device properties, as XLA's repository records them for its tests
    (xla/backends/gpu/target_config/specs); they agree with NVIDIA's data sheets and occupancy tables."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_memory: int  # bytes a core
    lanes: int  # float32 units a core
    bandwidth: int  # bytes a second
    cache: int  # bytes of L2
    clock: float  # GHz
    memory: int  # bytes


GPUS = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 64, 2_039_040_000_000, 40 * 2**20, 1.41, 85100068864
    ),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 128, 3_352_320_000_000, 50 * 2**20, 1.98, 84942979072
    ),
    "h200": GPU("NVIDIA H200", (9, 0), 132, 233472, 128, 4_800_000_000_000, 50 * 2**20, 1.98, 151397597184),
}
# Bytes of a chip that programs may fill, as libtpu's compiler names them when one needs more: "of 15.75G hbm".
TPU_MEMORY = {"v5e": int(15.75 * GIB), "v5p": int(95.74 * GIB), "v6e": int(31.25 * GIB)}

# name -> (platform, kind, topology): of TPUs the chips along each axis of the slice, of GPUs machines x GPUs of each.
HARDWARE = {
    "8xa100": ("cuda", "a100", "1x1x8"),
    "8xh100": ("cuda", "h100", "1x1x8"),
    "8xh200": ("cuda", "h200", "1x1x8"),
    "a100": ("cuda", "a100", "1x1x1"),
    "h100": ("cuda", "h100", "1x1x1"),
    "h200": ("cuda", "h200", "1x1x1"),
    "v5e": ("tpu", "v5e", "1x1"),
    "v5p": ("tpu", "v5p", "1x1x1"),
    "v6e": ("tpu", "v6e", "1x1"),
    "v5e-64": ("tpu", "v5e", "8x8"),
    "v5p-64": ("tpu", "v5p", "2x4x4"),  # 32 chips: Cloud TPU counts the cores of v5p, two a chip
    "v6e-64": ("tpu", "v6e", "8x8"),
}


def check_hardware(names: tuple[str, ...]) -> None:
    """Raises ValueError for a name that HARDWARE does not have, or whose compiler is missing; () = all of them."""
    for name in names or HARDWARE:
        if name not in HARDWARE:
            raise ValueError(f"hardware {name!r} is not one of: {', '.join(HARDWARE)}")
        platform = HARDWARE[name][0]
        modules = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}[platform]
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(
                f"to compile for {name} needs {' or '.join(modules)}: pip install 'zipir_jax[compile-only]' in an "
                "environment of its own, or name other --hardware"
            )


def device_count(name: str) -> int:
    """Of an entry of HARDWARE."""
    return math.prod(map(int, HARDWARE[name][2].split("x")))


def devices(name: str) -> list:
    """The devices of an entry of HARDWARE: `jax.Device`s that programs can be compiled for but not run on."""
    from jax.experimental.topologies import get_topology_desc

    platform, kind, topology = HARDWARE[name]
    if platform == "tpu":
        # A slice is made of hosts with four chips, but for the one with a single chip.
        host = {"chips_per_host_bounds": (1, 1, 1)} if device_count(name) == 1 else {}
        return get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology}", **host).devices
    described = get_topology_desc(
        platform="cuda", topology_name=kind, target_config=target_config(GPUS[kind]), topology=topology
    )
    return described.devices


def usable_memory(name: str) -> int:
    """Bytes that a program may have on one device: a TPU's as its compiler has them, GPU_SHARE of a GPU's."""
    platform, kind, _ = HARDWARE[name]
    return TPU_MEMORY[kind] if platform == "tpu" else int(GPU_SHARE * GPUS[kind].memory)


def target_config(gpu: GPU) -> str:
    """A GpuTargetConfigProto in its text format; the limits that are written out are those of all NVIDIA GPUs."""
    major, minor = gpu.capability
    # Of compute capability 9.0a: Hopper's own instructions for matrices.
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
          core_count: {gpu.cores}
          fpus_per_core: {gpu.lanes}
          shared_memory_per_core: {gpu.shared_memory}
          shared_memory_per_block_optin: {gpu.shared_memory - 1024}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          threads_per_warp: 32
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          memory_bandwidth: {gpu.bandwidth}
          l2_cache_size: {gpu.cache}
          clock_rate_ghz: {gpu.clock}
          device_memory_size: {gpu.memory}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{gpu.name}"
    """
