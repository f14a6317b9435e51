"""The training loop: read it top to bottom."""

import dataclasses
import functools
import itertools
import math
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import CheckpointManager
from tqdm import tqdm

from zipir_jax.config import DiffusionConfig, DiTConfig, LPVAEConfig, TrainConfig
from zipir_jax.data.pipeline import batches
from zipir_jax.data.sources import FolderSource
from zipir_jax.imageio import write_image
from zipir_jax.metrics.fidelity import load_lpips
from zipir_jax.models.lp_vae import COARSE_FACTOR, FACTOR
from zipir_jax.training import checkpoint
from zipir_jax.training.log import MetricsLog
from zipir_jax.training.losses import LPIPS_SMALLEST, lpips_net
from zipir_jax.training.signals import delayed_signals
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import create_state, train_step
from zipir_jax.weights import load_weights, save_weights

PREVIEW_IMAGES = 4  # rows of a sample grid


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Train one stage and return the folder of its weights (EMA), `output`/weights.

    `resume` goes on from the newest checkpoint, if there is one; the config may differ from its run's in
    `checkpoint.FREE_FIELDS` alone. Of these only `steps` acts on the numbers: the learning rate follows the new
    number's schedule from the next step on.

    Raises ValueError, before anything is compiled, for a config that cannot work; and, before anything is saved, if the
    loss or another metric is not finite. Ctrl-C and SIGTERM let the running step end and save a checkpoint; then
    KeyboardInterrupt or, for SIGTERM, SystemExit with status 0 is raised.
    """
    # -- check -------------------------------------------------------------------------------------
    output = Path(config.output)
    check(config)
    stage = STAGES[config.stage]
    pretrained = {}
    needed = stage.needs(config)
    if config.init_from:
        model, pretrained = load_weights(config.init_from, needed)
        for part in ("lp_vae", "dit", "diffusion"):
            if _meaning(getattr(model, part)) != _meaning(getattr(config.model, part)):
                other = f"{config.init_from}: these weights have another {part} than the config"
                if part == "lp_vae" or "dit" in needed:
                    raise ValueError(other)
                # An LP-VAE serves any DiT, but a DiT of another config is neither gone on from nor handed on.
                if pretrained.pop("dit", None) is not None:
                    print(f"{other}; their DiT is not used", file=sys.stderr)
    source = FolderSource(config.data.folder, config.data.crop, config.data.cache_gib)
    checkpoints = checkpoint.manager(output / "checkpoints")
    if checkpoints.latest_step() is not None and not resume:
        raise ValueError(
            f"{output} holds a checkpoint of step {checkpoints.latest_step()}: --resume, or move it"
        )

    # -- data --------------------------------------------------------------------------------------
    degradation = config.degradation if stage.DEGRADED else None
    data = batches(config.data, degradation, config.seed, source)

    def statistics_images():
        count = -(-config.statistics_images // config.data.batch_size)
        images = batches(config.data, None, config.seed + 1, source)
        return (batch["image"] for batch in itertools.islice(images, count))

    preview_batch = next(batches(config.data, degradation, config.seed + 2, source))
    preview_batch = {k: jnp.asarray(v[:PREVIEW_IMAGES]) for k, v in preview_batch.items()}

    # -- state -------------------------------------------------------------------------------------
    keys = jax.random.split(jax.random.key(config.seed), 3)
    start_from = {group: pretrained[group] for group in pretrained if group in (*needed, *stage.MAKES)}
    generator, frozen = stage.start(config, keys[0], start_from, statistics_images())
    # A step donates its state; the pretrained weights that a stage starts from must outlive it.
    generator = jax.tree.map(jnp.copy, generator)
    state = create_state(config, generator, keys[1])
    run = checkpoint.fingerprint(config, start_from)
    if resume and checkpoints.latest_step() is not None:
        state = checkpoint.restore(checkpoints, state, data, run)
    lpips = {} if config.stage == "dit" else {"lpips": load_lpips(lpips_net(config.loss.lpips_net))[0]}

    # -- loop --------------------------------------------------------------------------------------
    step_functions = {
        adversarial: jax.jit(functools.partial(train_step, config, adversarial), donate_argnums=0)
        for adversarial in (False, True)
    }
    preview = jax.jit(functools.partial(stage.preview, config))
    first = step = int(state["step"])
    if step > config.steps:
        raise ValueError(f"{output} holds a checkpoint of step {step}, beyond steps {config.steps}")
    uses_discriminator = bool(state["params"]["discriminator"])
    log = MetricsLog(output / "metrics.jsonl", step, config.data.batch_size)
    saved_at = time.monotonic()
    waiting = []  # steps and their metrics, still on the device
    stop = False
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True)
    with bar, delayed_signals() as received:
        while step < config.steps and not stop:
            batch = next(data)
            adversarial = uses_discriminator and step >= config.loss.adversarial_start
            state, metrics = step_functions[adversarial](state, frozen | lpips, batch)
            step += 1
            bar.update()
            stop = bool(received)
            minutes = (time.monotonic() - saved_at) / 60
            saving = stop or step == config.steps or minutes > config.checkpoint_minutes
            # Metrics are fetched one step late, so that the device has its next step before we wait. But no state is
            # saved before its metrics have been looked at.
            waiting.append((step, metrics))
            while len(waiting) > (0 if saving else 1):
                measured_step, metrics = waiting.pop(0)
                metrics = fetch(measured_step, metrics, checkpoints)
                log.add(measured_step, metrics)
                report(bar, metrics, config.data.batch_size)
            if step % config.sample_every == 0 or step == config.steps:
                columns = preview(state["ema"], frozen, preview_batch, keys[2])
                save_grid(output / "samples" / f"{step:07d}.png", columns)
            if saving:
                log.write()
                checkpoint.save(checkpoints, step, state, data, run)
                saved_at = time.monotonic()
        checkpoints.wait_until_finished()
    if step > first:
        last = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"step {step}: {last}", file=sys.stderr)
    if received:
        print(f"stopped after step {step}, which is saved: --resume goes on from there", file=sys.stderr)
        raise KeyboardInterrupt if signal.SIGINT in received else SystemExit(0)

    # -- weights -----------------------------------------------------------------------------------
    groups = stage.export(config, state["ema"], frozen, statistics_images())
    # A stage that does not build on E_f makes a new latent space; what was trained in an older one is not handed on.
    kept = pretrained if "fine_encoder" in needed else {group: pretrained[group] for group in needed}
    save_weights(output / "weights", config.model, kept | groups)
    return output / "weights"


def _meaning(part: LPVAEConfig | DiTConfig | DiffusionConfig) -> dict:
    """The fields that trained weights depend on; the others say how to compute, or which timesteps to train on."""
    free = {"attention", "compute_dtype", "logit_normal_mean", "logit_normal_std"}
    return {k: v for k, v in dataclasses.asdict(part).items() if k not in free}


def check(config: TrainConfig) -> None:
    """Raises ValueError, with the number, for settings that contradict each other."""
    if config.stage not in STAGES:
        raise ValueError(f"stage {config.stage!r} is not one of {', '.join(STAGES)}")
    if not config.output:
        raise ValueError("output is empty: name the folder of the run")
    if not config.data.folder:
        raise ValueError("data.folder is empty: name the folder of the training images")
    multiple = FACTOR * config.model.dit.patch
    if config.data.crop % multiple:
        raise ValueError(f"data.crop {config.data.crop} is not a multiple of {multiple}")
    if config.stage != "dit":
        side = config.data.crop // (COARSE_FACTOR if config.stage == "coarse" else 1)
        smallest = max(LPIPS_SMALLEST, config.loss.lpips_crop)
        if config.loss.adversarial > 0:  # its last two convolutions, of stride 1, take a pixel each
            smallest = max(smallest, 3 * 2**config.discriminator.layers)
        if 0 < config.loss.lpips_crop < LPIPS_SMALLEST:
            raise ValueError(f"loss.lpips_crop {config.loss.lpips_crop} is below {LPIPS_SMALLEST} pixels")
        if side < smallest:
            raise ValueError(
                f"data.crop {config.data.crop} gives the losses {side} pixels; they need {smallest}"
            )
    needed = STAGES[config.stage].needs(config)
    if needed and not config.init_from:
        raise ValueError(f"stage {config.stage} needs init_from, the weights of the stage before it")
    if config.model.dit.text_width and (config.stage == "dit" or "dit" in needed):
        raise ValueError(
            f"the training images come without text, and model.dit.text_width is {config.model.dit.text_width}: "
            f"stage {config.stage} needs a DiT with text_width 0"
        )


def fetch(step: int, metrics: dict, checkpoints: CheckpointManager) -> dict[str, float]:
    """Wait for a step's metrics. Raises ValueError, naming the last good checkpoint, if one is not finite."""
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name, value in metrics.items():
        if not math.isfinite(value):
            checkpoints.wait_until_finished()
            good = checkpoints.latest_step()
            kept = "no checkpoint" if good is None else f"the checkpoint of step {good}, the last good one"
            raise ValueError(f"step {step}: {name} is {value}; training stopped and left {kept}")
    return metrics


def report(bar: tqdm, metrics: dict[str, float], batch_size: int) -> None:
    """Show the loss and images/s; tqdm itself shows the time left."""
    rate = bar.format_dict["rate"]
    images = f"{rate * batch_size:.1f}" if rate else "?"
    shown = {k: f"{v:.3f}" for k, v in metrics.items() if k in ("loss", "l1", "lpips")}
    bar.set_postfix(shown | {"images/s": images}, refresh=False)


def save_grid(path: Path, columns: list) -> None:
    """One row per picture, one column per kind, smaller ones enlarged to the same size without smoothing."""
    height = max(column.shape[1] for column in columns)
    columns = [
        np.repeat(np.repeat(np.asarray(c), height // c.shape[1], 1), height // c.shape[1], 2) for c in columns
    ]
    rows = [np.concatenate(row, 1) for row in zip(*columns, strict=True)]
    write_image(path, np.concatenate(rows))
