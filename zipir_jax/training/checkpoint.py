"""Checkpoints: training state, position in the data and config, saved together by Orbax.

They are written in the background and appear whole or not at all. The state is restored in the shardings of the run
that goes on, which may have another mesh and another number of processes.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from zipir_jax.config import TrainConfig
from zipir_jax.data.pipeline import Batches
from zipir_jax.training.losses import lpips_net

# What a resumed run may change; no number depends on it but where the comment says so. All else defines the run. The
# data's own state tells whether they hold the same images.
FREE_FIELDS = (
    "output",
    "checkpoint_minutes",
    "keep_last",
    "keep_every",
    "sample_every",
    "profile",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "data.sources",
    "data.latents",
    "data.text",
    "data.threads",
    "data.workers",
    "data.cache_gib",
    "model.lp_vae.coarse.remat",
    "model.lp_vae.fine.remat",
    "model.dit.remat",
    "model.dit.attention",
    "skip_limit",
    "statistics_images",  # what was measured of them is in the checkpoint
    "accumulate",  # on fewer devices it takes more; what is drawn at random is then drawn otherwise
    "steps",  # to train longer; the learning rate follows the new number's schedule from the next step on
)


def manager(config: TrainConfig) -> ocp.CheckpointManager:
    """Keeps the newest checkpoints of a run, and those that `keep_every` names."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_last,
        keep_period=config.keep_every or None,
        create=True,
        cleanup_tmp_directories=True,  # what a kill left half written
    )
    return ocp.CheckpointManager((Path(config.output) / "checkpoints").absolute(), options=options)


def reader(run: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run's folder, to read alone. Raises ValueError if it has none."""
    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{run}: no run here (checkpoints is missing)")
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)


def find(checkpoints: ocp.CheckpointManager, resume: str) -> int | None:
    """The step to go on from: resume "auto" means the newest checkpoint, if any, a number that step's, "" none.

    Raises ValueError for a step that is not there, and for a run that would overwrite checkpoints.
    """
    newest = checkpoints.latest_step()
    if resume == "auto":
        return newest
    run = checkpoints.directory.parent
    if resume:
        steps = checkpoints.all_steps()
        if not resume.isdecimal() or int(resume) not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise ValueError(f"{run} holds no checkpoint of step {resume}; there are: {there}")
        return int(resume)
    if newest is not None:
        raise ValueError(f"{run} holds a checkpoint of step {newest}: --resume auto, or move it")
    return None


def fingerprint(config: TrainConfig, pretrained: dict) -> dict:
    """The config as JSON keeps it, with what decides the numbers in place of what only points to it.

    `init_from` becomes a digest of the weights that the stage starts from, `lpips_net` the network that "auto" means.
    """
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    fields["init_from"] = f"weights {digest(pretrained)}" if pretrained else ""
    if config.stage != "dit":
        fields["loss"]["lpips_net"] = lpips_net(config.loss.lpips_net)
    return fields


def digest(weights: dict) -> str:
    """16 hexadecimal digits that change with any tensor of a dict of weights."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(flatten_dict(weights, sep=".").items()):
        hashed.update(name.encode())
        hashed.update(np.asarray(tensor).tobytes())
    return hashed.hexdigest()[:16]


def encoder_digest(weights: dict) -> str:
    """The `digest` of what a latent depends on."""
    macro = {name: weights["statistics"][name] for name in ("macro_mean", "macro_std")}
    return digest({"macro": macro} | {name: weights[name] for name in ("coarse_encoder", "fine_encoder")})


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: dict,
    data: Batches,
    run: dict,
    config: TrainConfig,
    macro: dict,
) -> None:
    """Start saving; returns once the arrays have been copied.

    run: the `fingerprint`. macro: mu and sigma of z_macro, which the coarse stage measures once.
    """
    fields = {
        "fingerprint": run,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "macro": {name: np.asarray(macro[name]).tolist() for name in ("macro_mean", "macro_std")},
    }
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data.get_state()),
            config=ocp.args.JsonSave(fields),
        ),
    )


def read_config(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    """{"fingerprint", "config", "macro"} of a checkpoint's run, see `save`."""
    return checkpoints.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def data_contents(checkpoints: ocp.CheckpointManager, step: int) -> str:
    """What a checkpoint's run is trained on, as `Batches` describes it."""
    return checkpoints.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]["contents"]


def check_same_run(checkpoints: ocp.CheckpointManager, step: int, run: dict) -> None:
    """Raises ValueError if the checkpoint's `fingerprint` differs from `run` in anything but FREE_FIELDS.

    A field that came into being later had its default value.
    """
    saved = flatten_dict(read_config(checkpoints, step)["fingerprint"], sep=".")
    current = flatten_dict(run, sep=".")
    defaults = flatten_dict(json.loads(json.dumps(dataclasses.asdict(TrainConfig()))), sep=".")
    for name in sorted(saved.keys() | current.keys()):
        before = saved.get(name, defaults.get(name))
        if name not in FREE_FIELDS and before != current.get(name):
            raise ValueError(
                f"{checkpoints.directory}: the checkpoint of step {step} was written with "
                f"{name} = {before}, not {current.get(name)}; use another output folder"
            )


def macro_of(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    """mu and sigma of z_macro of a checkpoint's run: {"macro_mean", "macro_std"}, float32 [3]."""
    saved = read_config(checkpoints, step)["macro"]
    return {name: np.array(values, np.float32) for name, values in saved.items()}


def restore_ema(checkpoints: ocp.CheckpointManager, step: int, abstract_ema: dict) -> dict:
    """The average alone, as numpy arrays, from a `reader`."""
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {"ema": abstract_ema})
    part = ocp.args.PyTreeRestore({"ema": abstract_ema}, restore_args=arguments, partial_restore=True)
    return checkpoints.restore(step, args=ocp.args.Composite(state=part))["state"]["ema"]


def restore(checkpoints: ocp.CheckpointManager, step: int, abstract_state: dict, data: Batches) -> dict:
    """A checkpoint's state, with the shapes and shardings of `abstract_state`; `data` is set to its position.

    Later checkpoints are deleted: the run takes another way from here, and Orbax saves no step before its newest.
    """
    saved = checkpoints.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()),
    )
    data.set_state(saved["data"])
    for later in [other for other in checkpoints.all_steps() if other > step]:
        checkpoints.delete(later)
    return saved["state"]
