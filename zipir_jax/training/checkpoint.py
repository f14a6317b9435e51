"""Checkpoints: training state, data iterator and config, saved together by Orbax."""

import dataclasses
import hashlib
import json
from pathlib import Path

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from zipir_jax.config import TrainConfig
from zipir_jax.training.losses import lpips_net

# What a resumed run may change, since no number depends on it; all else defines the run. The data iterator's own
# state tells whether a folder holds the same images.
FREE_FIELDS = (
    "output",
    "checkpoint_minutes",
    "sample_every",
    "data.folder",
    "data.threads",
    "data.cache_gib",
    "steps",  # to train longer; the learning rate follows the new number's schedule from the next step on
)


def manager(folder: Path) -> ocp.CheckpointManager:
    """Keeps the last two checkpoints under `folder`; saving goes on in the background."""
    return ocp.CheckpointManager(
        Path(folder).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )


def fingerprint(config: TrainConfig, pretrained: dict) -> dict:
    """The config as JSON keeps it, with what decides the numbers in place of what only points to it.

    `init_from` becomes a digest of the weights that the stage starts from, `lpips_net` the network that "auto" means.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(flatten_dict(pretrained, sep=".").items()):
        digest.update(name.encode())
        digest.update(np.asarray(tensor).tobytes())
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    fields["init_from"] = f"weights {digest.hexdigest()[:16]}" if pretrained else ""
    if config.stage != "dit":
        fields["loss"]["lpips_net"] = lpips_net(config.loss.lpips_net)
    return fields


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: dict,
    data: grain.DatasetIterator,
    run: dict,
) -> None:
    """Start saving; returns once the arrays have been copied. `run` is the `fingerprint`."""
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(data),
            config=ocp.args.JsonSave(run),
        ),
    )


def restore(checkpoints: ocp.CheckpointManager, state: dict, data: grain.DatasetIterator, run: dict) -> dict:
    """The newest checkpoint's state, with the shapes and shardings of `state`; `data` is set to its position.

    Raises ValueError if the checkpoint's `fingerprint` differs from `run` in anything but FREE_FIELDS.
    """
    step = checkpoints.latest_step()
    saved = checkpoints.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    saved, current = flatten_dict(saved, sep="."), flatten_dict(run, sep=".")
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
