"""Seconds of a training step, with random weights and noise for images: the devices alone, without the data."""

import functools
import time

import jax
import jax.numpy as jnp

from zipir_jax import parallel
from zipir_jax.config import TrainConfig
from zipir_jax.measure.programs import (
    program_bytes,
    square_crops,
    training_arguments,
    training_batch,
    training_program,
)
from zipir_jax.measure.report import table
from zipir_jax.measure.timing import median_seconds
from zipir_jax.models.flops import peak_flops
from zipir_jax.training.flops import training_flops
from zipir_jax.training.state import create_state


def training_seconds(config: TrainConfig, side: int, repeats: int) -> dict:
    """A row: the median of `repeats` steps on a batch of crops of side x side pixels, on all devices.

    {"stage", "side", "batch", "accumulate", "compile": seconds, "seconds": of a step, "images_per_second",
    "flops_per_second", "mfu": of the devices' peak, None where that is not known, "memory": bytes of each device, as
    XLA accounts for the step}. Raises ValueError for a batch that does not divide over the devices, and as
    `square_crops`.
    """
    config, _ = square_crops(config, side)
    mesh, batch_size = parallel.make_mesh(config.mesh), config.data.batch_size
    parts = parallel.batch_parts(mesh) * config.accumulate
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size {batch_size} is not a multiple of {parts}: devices x micro-batches"
        )
    began = time.perf_counter()
    step = training_program(config, mesh, side)
    compile_seconds = time.perf_counter() - began

    state, read_only = training_arguments(config, mesh)
    read_only = _random(read_only)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    create = jax.jit(functools.partial(create_state, config), out_shardings=shardings)
    state = create(jax.random.key(0), {name: read_only[name] for name in read_only if name != "lpips"})
    batch = _noise(training_batch(config, mesh, side), config.data.text_tokens)
    wishes = batch.pop("wishes")

    def train():
        nonlocal state  # donated to the step
        state, metrics = step(state, read_only, batch, wishes)
        jax.block_until_ready(metrics)

    seconds = median_seconds(train, repeats)
    adversarial = config.stage != "dit" and config.loss.adversarial > 0
    flops = batch_size * training_flops(config, side, side, adversarial=adversarial)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "stage": config.stage,
        "side": side,
        "batch": batch_size,
        "accumulate": config.accumulate,
        "compile": compile_seconds,
        "seconds": seconds,
        "images_per_second": batch_size / seconds,
        "flops_per_second": flops / seconds,
        "mfu": peak and flops / seconds / (peak * jax.device_count()),
        "memory": program_bytes(step)["total"],
    }


def _random(tree):
    """Arrays for abstract ones, as they are divided: kernels of small noise, all else ones."""

    def draw(path, leaf):
        if path[-1].key != "kernel":
            return jnp.ones(leaf.shape, leaf.dtype)
        return 0.02 * jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)

    create = jax.jit(
        lambda: jax.tree.map_with_path(draw, tree), out_shardings=jax.tree.map(lambda x: x.sharding, tree)
    )
    return create()


def _noise(batch, text_tokens):
    """Arrays for abstract ones, as they are divided: all texts have full length, no host has a wish."""

    def draw(name, array):
        if jnp.issubdtype(array.dtype, jnp.integer):
            return jnp.full(array.shape, text_tokens if name == "text_lengths" else 0, array.dtype)
        return jax.random.uniform(jax.random.key(0), array.shape, array.dtype, -1, 1)

    shardings = {name: array.sharding for name, array in batch.items()}
    return jax.jit(lambda: {name: draw(name, x) for name, x in batch.items()}, out_shardings=shardings)()


def training_table(rows: list[dict]) -> str:
    """Markdown of rows of `training_seconds`."""
    shown = [
        row
        | {
            "tflops": row["flops_per_second"] / 1e12,
            "mfu": "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
            "gib": row["memory"] / 2**30,
        }
        for row in rows
        if "error" not in row
    ]
    columns = {"stage": "{stage}", "crop, px": "{side}", "batch": "{batch}", "micro-batches": "{accumulate}"}
    columns |= {"step, s": "{seconds:.3f}", "images/s": "{images_per_second:.2f}", "TFLOP/s": "{tflops:.3g}"}
    columns |= {"MFU": "{mfu}", "memory, GiB": "{gib:.1f}", "compile, s": "{compile:.0f}"}
    lines = [table(shown, columns)]
    lines += [f"\n{row['side']} pixels did not run: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)
