import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AbstractMesh

from zipir_jax import parallel
from zipir_jax.config import MODELS, MeshConfig
from zipir_jax.weights import abstract_weights


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def bytes_per_device(mesh, tree):
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = np.prod(
            [mesh.shape[axis] for axis in parallel.parameter_spec(mesh, name, leaf.shape) if axis]
        )
        total += leaf.size * leaf.dtype.itemsize / parts
    return total


# --------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 1), (4, 64, 1), (1, 8, 4), (2, 16, 8)])
def test_the_dit_is_divided_over_fsdp_and_tensor(shape):
    dit = {"dit": abstract_weights(MODELS["paper"])["dit"]}
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dit))
    # Norms, biases and the small ends of the network stay whole: a thousandth of it.
    share = bytes_per_device(mesh(*shape), dit) / whole
    assert 1 / (shape[1] * shape[2]) <= share < 1 / (shape[1] * shape[2]) + 0.001


@pytest.mark.parametrize("model", MODELS)
def test_every_large_parameter_has_a_rule_wherever_it_stands(model):
    weights = abstract_weights(MODELS[model])
    for tree in (weights, {"optimizer": {"mu": {"generator": weights}}}):
        shardings = jax.tree.map_with_path(
            lambda path, leaf: parallel.parameter_spec(
                mesh(1, 8, 1), jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape
            ),
            tree,
        )
        blocks = shardings.get("optimizer", {"mu": {"generator": shardings}})["mu"]["generator"]["dit"][
            "blocks"
        ]
        assert blocks["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor")
        assert blocks["mlp"]["down"]["kernel"] == P(None, "tensor", "fsdp")


def test_a_large_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"dit\.memory of shape \(1000, 1000\) matches no sharding rule"):
        parallel.parameter_spec(mesh(1, 8, 1), "dit.memory", (1000, 1000))
    assert parallel.parameter_spec(mesh(1, 8, 1), "dit.memory", (999, 1000)) == P()


def test_a_dimension_that_does_not_divide_stays_whole():
    spec = parallel.parameter_spec(mesh(1, 8, 3), "blocks.attention.query.kernel", (2, 32, 32))
    assert spec == P(None, "fsdp", None)


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def test_only_tall_enough_images_are_divided_by_height():
    shardings = parallel.batch_shardings(
        mesh(2, 2, 2), {"image": (4, 256, 64, 3), "lq": (4, 192, 64, 3), "latent": (4, 256, 2, 64)}
    )
    batch = ("data", "fsdp")
    assert {name: s.spec for name, s in shardings.items()} == {
        "image": P(batch, "tensor"),
        "lq": P(batch),  # 96 rows for each of two devices are not a multiple of 64
        "latent": P(batch),
    }


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 2))
    assert parallel.constrain(x, "batch") is x


def test_dimensions_that_are_not_named_are_left_as_they_are():
    """As the height of images in micro-batches, which may be divided; named None, a dimension is whole."""
    x, free = jnp.ones((3, 2, 4)), P.UNCONSTRAINED
    with jax.set_mesh(parallel.make_mesh(MeshConfig())):
        for axes, expected in (
            ((None, "batch"), P(None, ("data", "fsdp"), free)),
            (("batch", None, None), P(("data", "fsdp"), None, None)),
        ):
            jaxpr = jax.make_jaxpr(lambda x, axes=axes: parallel.constrain(x, *axes))(x)
            assert jaxpr.eqns[0].params["sharding"].spec == expected


def test_large_parameters_that_do_not_divide_are_an_error():
    with pytest.raises(
        ValueError, match=r"mlp\.up\.kernel of shape \(24, 2048, 8192\) does not divide over mesh\.fsdp 48"
    ):
        parallel.parameter_spec(mesh(1, 48, 1), "dit.blocks.mlp.up.kernel", (24, 2048, 8192))


# --------------------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------------------


def test_zero_stands_for_the_devices_that_are_left():
    assert dict(parallel.make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(parallel.make_mesh(MeshConfig(data=1, fsdp=0)).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="data 2 x fsdp any x tensor 1 does not make up 1 devices"):
        parallel.make_mesh(MeshConfig(data=2, fsdp=0))
    devices = [types.SimpleNamespace(process_index=i // 2) for i in range(8)]
    with pytest.raises(ValueError, match="data any x fsdp 3 x tensor 1 does not make up 8 devices"):
        parallel.make_mesh(MeshConfig(fsdp=3), devices)
    with pytest.raises(ValueError, match=r"mesh\.tensor 4 does not divide the 2 devices of a process"):
        parallel.make_mesh(MeshConfig(tensor=4), devices)


# --------------------------------------------------------------------------------------------------
# Many processes
# --------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # a shell within an allocation
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod by itself
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            {"num_processes": 3, "process_id": 2},
        ),
    ],
)
def test_the_processes_of_a_job_are_joined_where_there_are_several(monkeypatch, environment, joins):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROC")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parallel.start()
    assert calls == ([] if joins is False else [{} if joins is True else joins])


def test_two_tasks_of_a_slurm_step_find_each_other():
    program = (
        "from zipir_jax import parallel; parallel.start(); import jax; "
        "print(jax.process_index(), jax.process_count(), jax.device_count())"
    )
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ
            | SLURM
            | {
                "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank,
                "JAX_PLATFORMS": "cpu",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [task.communicate(timeout=120)[0].split() for task in tasks] == [["0", "2", "2"], ["1", "2", "2"]]
