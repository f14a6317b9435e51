"""The training loop: read it top to bottom."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from tqdm import tqdm

from zipir_jax import parallel
from zipir_jax.config import DiffusionConfig, DiTConfig, LPVAEConfig, TrainConfig
from zipir_jax.data.buckets import Bucket, crop_sides
from zipir_jax.data.latents import CachedLatents
from zipir_jax.data.pipeline import Batches, batch_shapes, batches, crop_size
from zipir_jax.data.sources import Source, open_sources
from zipir_jax.data.text import TextEmbeddings
from zipir_jax.imageio import to_uint8
from zipir_jax.models.flops import peak_flops
from zipir_jax.models.lp_vae import COARSE_FACTOR, FACTOR
from zipir_jax.photograph import write_image
from zipir_jax.signals import delayed_signals
from zipir_jax.training import checkpoint
from zipir_jax.training.flops import training_flops
from zipir_jax.training.log import MetricsLog
from zipir_jax.training.losses import LPIPS_SMALLEST, lpips_group
from zipir_jax.training.stages import STAGES
from zipir_jax.training.state import create_state, train_step
from zipir_jax.training.statistics import macro_statistics
from zipir_jax.weights import load_weights, save_weights

PREVIEW_IMAGES = 4  # rows of a sample grid
STATISTICS_BATCH = 8  # images, which one device encodes at once
SAVE, STOP = 1, 2  # what a process may ask of all, see `train`


class DivergedError(ValueError):
    """The gradients stay not finite: to start again would not help."""


def train(config: TrainConfig, resume: str = "") -> Path:
    """Train one stage and return the folder of its weights (EMA), `output`/weights.

    Every process of a job calls it; they share the `output` folder. resume: see `checkpoint.find`; the config may
    differ from its run's in `checkpoint.FREE_FIELDS` alone. Of these only `steps` acts on the numbers: the learning
    rate follows the new number's schedule from the next step on.

    Raises ValueError, before anything is compiled, for a config that cannot work; DivergedError when `skip_limit` steps
    in a row had a gradient that is not finite; RuntimeError where files or data fail while it trains: to go on from the
    last checkpoint may help. Ctrl-C and SIGTERM, at any of the processes, let all of them end the running step and save
    a checkpoint; then KeyboardInterrupt or, for SIGTERM, SystemExit with status 0 is raised.
    """
    # -- check -------------------------------------------------------------------------------------
    check(config)
    stage, output, first_process = STAGES[config.stage], Path(config.output), jax.process_index() == 0
    mesh = parallel.make_mesh(config.mesh)
    pretrained = load_pretrained(config)
    source, text = open_data(config)
    data = training_batches(config, source, text, mesh)
    checkpoints = checkpoint.manager(config)
    resumed = _agreed(checkpoint.find(checkpoints, resume))
    if first_process:
        for line in source.damaged:
            print(line, file=sys.stderr)

    # -- state -------------------------------------------------------------------------------------
    macro = None if resumed is None else checkpoint.macro_of(checkpoints, resumed)
    start_from = starting_groups(config, pretrained, source, macro)
    if config.data.latents and source.encoder != checkpoint.encoder_digest(start_from):
        raise ValueError(
            f"{config.data.latents}: other encoders made these latents than {config.init_from} holds"
        )
    # Without what is measured here: it follows from the images, and another machine may round it differently.
    run = checkpoint.fingerprint(
        config, {name: start_from[name] for name in start_from if name in pretrained}
    )
    keys = jax.random.split(jax.random.key(config.seed))
    create = functools.partial(create_state, config)
    abstract = jax.eval_shape(create, keys[0], start_from)
    shardings = parallel.parameter_shardings(mesh, abstract)
    abstract = jax.tree.map(_placed, abstract, shardings)
    if resumed is None:
        groups = parallel.put(start_from, parallel.parameter_shardings(mesh, start_from))
        state = jax.jit(create, out_shardings=shardings)(keys[0], groups)
        del groups  # what the state was made of is in it
    else:
        checkpoint.check_same_run(checkpoints, resumed, run)
        if resumed > config.steps:
            raise ValueError(f"{output}: the checkpoint of step {resumed} is beyond steps {config.steps}")
        state = checkpoint.restore(checkpoints, resumed, abstract, data)
    frozen = {group: start_from[group] for group in {"statistics", *stage.needs(config)}}
    read_only = frozen | lpips_group(config)
    read_only = parallel.put(read_only, parallel.parameter_shardings(mesh, read_only))

    # -- compile -----------------------------------------------------------------------------------
    first = step = resumed or 0
    log = None
    if first_process:  # here already, as compiling is time that a training takes
        peak = peak_flops(jax.devices()[0].device_kind)
        log = MetricsLog(output, step, peak and peak * jax.device_count())
    adversarial_from = config.loss.adversarial_start if state["params"]["discriminator"] else config.steps
    phases = {step >= adversarial_from for step in (first, config.steps - 1)} if first < config.steps else ()
    programs, work = {}, {}  # of each size and phase
    for bucket, adversarial in itertools.product(data.buckets, sorted(phases)):
        began = time.monotonic()
        size, images = (bucket.height, bucket.width), bucket.batch_size
        programs[*size, adversarial] = compile_step(config, mesh, bucket, adversarial, abstract, read_only)
        flops = images * training_flops(config, *size, adversarial=adversarial)
        work[*size, adversarial] = {"images": images, "flops": flops}
        if first_process:
            shape = f"{bucket.batch_size} crops of {bucket.width} x {bucket.height}"
            print(f"compiled: {shape}, {time.monotonic() - began:.1f} s", file=sys.stderr)
    if config.sample_every and first < config.steps:
        preview_batch = parallel.put(preview_images(config, source, text), parallel.replicated(mesh))
        preview = jax.jit(functools.partial(stage.preview, config), out_shardings=parallel.replicated(mesh))
        with jax.set_mesh(mesh):  # which a TPU's attention is divided over
            preview = preview.lower(abstract["ema"], read_only, preview_batch, keys[1]).compile()

    # -- loop --------------------------------------------------------------------------------------
    saved_at, asked = time.monotonic(), False
    running, stop = None, False
    bar = tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True, disable=not first_process)

    def finish(step, metrics, counts):
        """Wait for a step's metrics, log them, and return what the processes wished during it."""
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        wish, skipped = metrics.pop("wish"), metrics.pop("skipped_in_a_row")
        if skipped >= config.skip_limit:
            raise DivergedError(_not_finite(step, skipped, metrics, checkpoints))
        if log:
            log.add(step, metrics, **counts)
            report(bar, metrics, counts)
        return wish

    closing = contextlib.closing(log) if log else contextlib.nullcontext()
    profiler = contextlib.ExitStack()
    with _failing(), closing, contextlib.closing(data), bar, profiler, delayed_signals() as received:
        while step < config.steps and not stop:
            began = time.monotonic()
            if step == max(config.profile[0], first) < config.profile[1]:
                profiler.enter_context(jax.profiler.trace(output / "profile"))
            known = len(data.unreadable)
            batch = next(data)
            waited = time.monotonic() - began
            for line in data.unreadable[known:]:
                tqdm.write(line, file=sys.stderr)
            # All processes must save and stop at the same step. A signal may reach any of them, and the clock is the
            # first one's: what each wishes is reduced to one number in the step itself.
            due = first_process and not asked and time.monotonic() - saved_at > 60 * config.checkpoint_minutes
            asked = asked or due
            wish = STOP if received else SAVE if due else 0
            kind = *crop_size(batch), step >= adversarial_from
            state, metrics = programs[kind](state, read_only, *_put_batch(mesh, batch, wish))
            step += 1
            bar.update()
            # Metrics are fetched one step late, so that the device has its next step before we wait.
            wish = finish(*running) if running else 0
            kept = config.keep_every and step % config.keep_every == 0
            save = wish >= SAVE or kept or step == config.steps
            sample = config.sample_every and (step % config.sample_every == 0 or step == config.steps)
            if save or sample:
                jax.block_until_ready(metrics)  # what follows would wait for this step, in time of its own
            clock = {"data_seconds": waited, "seconds": time.monotonic() - began}
            running = step, metrics, work[kind] | clock
            if step == config.profile[1]:
                jax.block_until_ready(state)
                profiler.close()

            if save:
                # The log goes no further than the checkpoint, and not less far.
                wish, running = max(wish, finish(*running)), None
                if log:
                    log.write()
                checkpoint.save(checkpoints, step, state, data, run, config, frozen["statistics"])
                saved_at, asked, stop = time.monotonic(), False, wish >= STOP
            if sample:
                columns = jax.device_get(preview(state["ema"], read_only, preview_batch, keys[1]))
                if log:
                    picture = grid(columns)
                    write_image(output / "samples" / f"{step:07d}.png", picture)
                    log.grid(step, picture)
        checkpoints.wait_until_finished()
    unreadable = len(source.damaged) + _sum_over_processes(len(data.unreadable))
    if first_process and unreadable:
        print(f"{unreadable} images or captions could not be read; others stood in for them", file=sys.stderr)
    if first_process and step > first:
        shown = {name: value for name, value in metrics.items() if name not in ("wish", "skipped_in_a_row")}
        last = ", ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
        print(f"step {step}: {last}", file=sys.stderr)
    if stop:
        if first_process:
            print(
                f"stopped after step {step}, which is saved: --resume auto goes on from there",
                file=sys.stderr,
            )
        raise KeyboardInterrupt if signal.SIGINT in received else SystemExit(0)

    # -- weights -----------------------------------------------------------------------------------
    ema = parallel.gather(mesh, state["ema"])
    if first_process:
        weights = whole_weights(config, pretrained | frozen, ema, source)
        save_weights(output / "weights", config.model, weights)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("weights")
    return output / "weights"


# --------------------------------------------------------------------------------------------------
# Data and weights that a run starts from
# --------------------------------------------------------------------------------------------------


def load_pretrained(config: TrainConfig) -> dict:
    """The groups of `init_from`, numpy arrays. Raises ValueError for those of another model, naming the part."""
    if not config.init_from:
        return {}
    needed, makes = STAGES[config.stage].needs(config), STAGES[config.stage].MAKES
    # What a stage only hands on, one process reads: it may be billions of parameters.
    wanted = None if jax.process_index() == 0 else (*needed, *makes)
    model, pretrained = load_weights(config.init_from, needed, wanted)
    for part in ("lp_vae", "dit", "diffusion"):
        if _meaning(getattr(model, part), makes) != _meaning(getattr(config.model, part), makes):
            other = f"{config.init_from}: these weights have another {part} than the config"
            if part == "lp_vae" or "dit" in needed:
                raise ValueError(other)
            # An LP-VAE serves any DiT, but a DiT of another config is neither gone on from nor handed on.
            if pretrained.pop("dit", None) is not None and jax.process_index() == 0:
                print(f"{other}; their DiT is not used", file=sys.stderr)
    return pretrained


def _meaning(part: LPVAEConfig | DiTConfig | DiffusionConfig, makes: tuple[str, ...]) -> dict:
    """The fields that trained weights depend on; the others say how to compute, or what a DiT is trained on."""
    free = {"attention", "remat", "compute_dtype", "logit_normal_mean", "logit_normal_std", "uniform_share"}
    # What is trained on from here learns weak LQ latents as the config says; of what is handed on, the weights of this
    # stage would say something else than is true.
    if "dit" in makes:
        free |= {"weak_lq_probability", "weak_lq"}
    fields = flatten_dict(dataclasses.asdict(part))
    return {path: value for path, value in fields.items() if path[-1] not in free}


def starting_groups(config: TrainConfig, pretrained: dict, source, macro: dict | None = None) -> dict:
    """What a stage makes its state of: groups that it reads or goes on from, and "statistics".

    The first stage has none: they are `macro`, mu and sigma of z_macro, if these are known, or measured.
    """
    stage = STAGES[config.stage]
    groups = {
        name: group for name, group in pretrained.items() if name in (*stage.needs(config), *stage.MAKES)
    }
    if "statistics" not in groups:
        groups["statistics"] = macro or macro_statistics(statistics_images(config, source))
    return groups


def open_data(config: TrainConfig) -> tuple[Source | CachedLatents, TextEmbeddings | None]:
    """What the batches are made of. Raises ValueError for what cannot be opened, or does not suit the model."""
    data = config.data
    source = CachedLatents(data.latents) if data.latents else open_sources(data.sources, data.cache_gib)
    text = TextEmbeddings(data.text) if data.text else None
    if text is not None and text.width != config.model.dit.text_width:
        raise ValueError(
            f"{data.text}: the embeddings have {text.width} channels, model.dit.text_width is "
            f"{config.model.dit.text_width}"
        )
    if text is not None and text.tokens < data.text_tokens:
        raise ValueError(
            f"{data.text}: the embeddings are cut at {text.tokens} tokens, data.text_tokens is {data.text_tokens}: "
            f"set it to {text.tokens}, or make the folder with prepare embed --tokens {data.text_tokens}"
        )
    share = data.low_quality_probability
    if data.latents and source.low_quality_probability != share:
        raise ValueError(
            f"{data.latents}: made with data.low_quality_probability {source.low_quality_probability:g}, not {share:g}"
        )
    if share and text is not None and text.negative not in text:
        raise ValueError(
            f"{data.text}: no embedding of the default negative prompt, the caption of low-quality images; make the "
            "folder with prepare embed, or set data.low_quality_probability to 0"
        )
    return source, text


def training_batches(config: TrainConfig, source, text: TextEmbeddings | None, mesh) -> Batches:
    """This process' share of the batches. Raises ValueError, with the numbers, for what the mesh cannot divide."""
    degradation = config.degradation if STAGES[config.stage].DEGRADED else None
    parts = parallel.batch_parts(mesh) * config.accumulate
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    data = batches(config.data, source, config.seed, degradation, text, divisor=parts, **hosts)
    for bucket in data.buckets:
        # The LP-VAE has nothing else to divide over this axis; the DiT has its heads and hidden channels.
        if config.stage != "dit" and not parallel.divides_height(mesh, bucket.height):
            raise ValueError(
                f"crops of {bucket.height} rows do not divide over mesh.tensor {mesh.shape['tensor']} into parts of "
                f"a multiple of {parallel.SMALLEST_ROWS} rows"
            )
    return data


def statistics_images(config: TrainConfig, source: Source | CachedLatents) -> Iterator[np.ndarray]:
    """Batches of clean crops, at least `statistics_images` of them; the same on every process."""
    data = dataclasses.replace(config.data, batch_size=STATISTICS_BATCH, batch_tokens=0, workers=0)
    count = -(-config.statistics_images // STATISTICS_BATCH)
    return (batch["image"] for batch in itertools.islice(batches(data, source, config.seed + 1), count))


def preview_images(config: TrainConfig, source, text: TextEmbeddings | None) -> dict[str, np.ndarray]:
    """A batch of PREVIEW_IMAGES crops of the smallest resolution; the same on every process."""
    data = dataclasses.replace(
        config.data,
        batch_size=PREVIEW_IMAGES,
        batch_tokens=0,
        workers=0,
        resolutions=(min(config.data.resolutions),),
        resolution_weights=(),
    )
    degradation = config.degradation if STAGES[config.stage].DEGRADED else None
    return next(batches(data, source, config.seed + 2, degradation, text))


def whole_weights(config: TrainConfig, before: dict, ema: dict, source) -> dict:
    """The groups of a run's weights: what it trained, what it read, what it was handed and has not made obsolete.

    before: the groups of `init_from` and "statistics"; ema: the trained groups.
    """
    stage = STAGES[config.stage]
    needed = {"statistics", *stage.needs(config)}
    # A stage that does not build on E_f makes a new latent space; what was trained in an older one is not handed on.
    kept = before if "fine_encoder" in needed else {group: before[group] for group in needed}
    statistics = stage.statistics(config, kept | ema, statistics_images(config, source))
    return kept | ema | {"statistics": statistics}


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


def compile_step(
    config: TrainConfig, mesh, bucket: Bucket, adversarial: bool, state: dict, frozen: dict
) -> jax.stages.Compiled:
    """The program of one step on a bucket's batches: (state, frozen, batch, wishes) -> (state, metrics).

    state, frozen: arrays or `jax.ShapeDtypeStruct`, with their shardings. The state is donated.
    """

    def step(state, frozen, batch, wishes):
        state, metrics = train_step(config, adversarial, state, frozen, batch)
        return state, metrics | {"wish": wishes.max()}

    batch = abstract_batch(config, mesh, bucket)
    wishes = batch.pop("wishes")
    out = jax.tree.map(lambda x: x.sharding, state), parallel.replicated(mesh)
    with jax.set_mesh(mesh):
        return (
            jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, frozen, batch, wishes).compile()
        )


def abstract_batch(config: TrainConfig, mesh, bucket: Bucket) -> dict[str, jax.ShapeDtypeStruct]:
    """A bucket's batch and the "wishes" of the hosts that come with it, as they are divided over the devices."""
    arrays = batch_shapes(config.data, bucket, STAGES[config.stage].DEGRADED, config.model.dit)
    arrays["wishes"] = ((parallel.batch_parts(mesh),), np.int32)
    shardings = parallel.batch_shardings(mesh, {name: shape for name, (shape, _) in arrays.items()})
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
        for name, (shape, dtype) in arrays.items()
    }


@contextlib.contextmanager
def _failing():
    """An OSError or ValueError of a running training is no fault of its settings."""
    try:
        yield
    except DivergedError:
        raise
    except (OSError, ValueError) as error:
        raise RuntimeError(f"training failed: {error}") from error


def _agreed(step):
    """The first process' answer: on a shared file system others may see a new checkpoint later."""
    if jax.process_count() == 1:
        return step
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if answer < 0 else answer


def _sum_over_processes(count):
    return (
        count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(count)).sum())
    )


def _put_batch(mesh, batch, wish):
    """The batch, and this process' wish once for each of the batch's parts that it holds, on the devices."""
    parts = parallel.batch_parts(mesh) // jax.process_count()
    arrays = parallel.put_batch(mesh, batch | {"wishes": np.full(parts, wish, np.int32)})
    wishes = arrays.pop("wishes")
    return arrays, wishes


def _placed(abstract, sharding):
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)


# --------------------------------------------------------------------------------------------------
# Checks and reports
# --------------------------------------------------------------------------------------------------


def check(config: TrainConfig) -> None:
    """Raises ValueError, with the number, for settings that contradict each other."""
    if config.stage not in STAGES:
        raise ValueError(f"stage {config.stage!r} is not one of {', '.join(STAGES)}")
    if not config.output or "://" in config.output:
        raise ValueError(f"output {config.output!r} is no folder: name one that all processes share")
    if config.data.latents and config.stage != "dit":
        raise ValueError(f"data.latents serves the stage dit; {config.stage} needs images")
    if not config.data.sources and not config.data.latents:
        raise ValueError("data.sources is empty: name a folder of training images")
    multiple = FACTOR * config.model.dit.patch
    sides = [
        side
        for resolution, ratio in itertools.product(config.data.resolutions, config.data.aspect_ratios)
        for side in crop_sides(resolution, ratio)
    ]
    for side in sides:
        if side % multiple:
            raise ValueError(f"a crop's side of {side} pixels is not a multiple of {multiple}")
    if config.stage != "dit":
        side = min(sides) // (COARSE_FACTOR if config.stage == "coarse" else 1)
        smallest = max(LPIPS_SMALLEST, config.loss.lpips_crop) if config.loss.lpips else 0
        if config.loss.adversarial > 0:  # its last two convolutions, of stride 1, take a pixel each
            smallest = max(smallest, 3 * 2**config.discriminator.layers)
        if 0 < config.loss.lpips_crop < LPIPS_SMALLEST:
            raise ValueError(f"loss.lpips_crop {config.loss.lpips_crop} is below {LPIPS_SMALLEST} pixels")
        if side < smallest:
            raise ValueError(
                f"a crop's side of {min(sides)} pixels gives the losses {side}; they need {smallest}"
            )
    needed = STAGES[config.stage].needs(config)
    if needed and not config.init_from:
        raise ValueError(f"stage {config.stage} needs init_from, the weights of the stage before it")
    with_text = config.model.dit.text_width and (config.stage == "dit" or "dit" in needed)
    if with_text and not config.data.text:
        raise ValueError(
            f"model.dit.text_width is {config.model.dit.text_width}: stage {config.stage} needs data.text, a folder "
            "of text embeddings, or a DiT with text_width 0"
        )
    if config.data.text and not with_text:
        raise ValueError(f"data.text is of no use to stage {config.stage} with this model: leave it out")
    check_low_quality(config)


def check_low_quality(config: TrainConfig) -> None:
    """Raises ValueError where low-quality images would be restored to what they are, with no text to tell them by."""
    share = config.data.low_quality_probability
    if share and not (config.stage == "dit" and config.model.dit.text_width):
        raise ValueError(
            f"data.low_quality_probability {share:g} needs stage dit and a DiT with text, whose caption tells a "
            f"low-quality image; stage {config.stage} with model.dit.text_width {config.model.dit.text_width} takes 0"
        )


def _not_finite(step, skipped, metrics, checkpoints):
    checkpoints.wait_until_finished()
    good = checkpoints.latest_step()
    kept = "no checkpoint" if good is None else f"the checkpoint of step {good}"
    return (
        f"step {step}: the gradient of {skipped:.0f} steps in a row is not finite (loss "
        f"{metrics['loss']}); training stopped and left {kept}"
    )


def report(bar: tqdm, metrics: dict[str, float], counts: dict[str, float | int]) -> None:
    """Show the loss and images/s; tqdm itself shows the time left."""
    shown = {k: f"{v:.3f}" for k, v in metrics.items() if k in ("loss", "l1", "lpips")}
    bar.set_postfix(shown | {"images/s": f"{counts['images'] / counts['seconds']:.1f}"}, refresh=False)


def grid(columns: list[np.ndarray]) -> np.ndarray:
    """uint8 [h, w, 3]: a row per picture, a column per kind, smaller ones enlarged to one height without smoothing."""
    height = max(column.shape[1] for column in columns)
    columns = [c.repeat(height // c.shape[1], 1).repeat(height // c.shape[1], 2) for c in columns]
    return to_uint8(np.concatenate([np.concatenate(row, 1) for row in zip(*columns, strict=True)]))
