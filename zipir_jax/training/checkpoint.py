"""Checkpoints: training state, data iterator and config, saved together by Orbax."""

import dataclasses
import json
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp

from zipir_jax.config import TrainConfig

# What a resumed run may change: how long, where, how often; everything else defines the run.
FREE_FIELDS = ("output", "steps", "checkpoint_minutes", "sample_every", "init_from")


def manager(folder: Path) -> ocp.CheckpointManager:
    """Keeps the last two checkpoints under `folder`; saving goes on in the background."""
    return ocp.CheckpointManager(
        Path(folder).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: dict,
    data: grain.DatasetIterator,
    config: TrainConfig,
) -> None:
    """Start saving; returns once the arrays have been copied."""
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(data),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        ),
    )


def restore(
    checkpoints: ocp.CheckpointManager, state: dict, data: grain.DatasetIterator, config: TrainConfig
) -> dict:
    """The newest checkpoint's state, with the shapes and shardings of `state`; `data` is set to its position.

    Raises ValueError if the checkpoint was written with another config.
    """
    step = checkpoints.latest_step()
    saved = checkpoints.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    current = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in sorted(saved.keys() | current.keys()):
        if name not in FREE_FIELDS and saved.get(name) != current.get(name):
            raise ValueError(
                f"{checkpoints.directory}: the checkpoint of step {step} was written with "
                f"{name} = {saved.get(name)}, not {current.get(name)}; use another output folder"
            )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return checkpoints.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data)
        ),
    )["state"]
