"""Seconds of restoring an image and of its phases, as a caller of `Restorer` waits for them, with random weights."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from zipir_jax.config import DataConfig, ModelConfig, SamplingConfig
from zipir_jax.measure.report import line, table
from zipir_jax.measure.timing import cheap_weights, check_repeats, denoise_seconds, median_seconds
from zipir_jax.models.attention import fastest
from zipir_jax.models.flops import dit_step_flops
from zipir_jax.models.layers import count_params
from zipir_jax.models.lp_vae import FACTOR
from zipir_jax.planner import padded_size
from zipir_jax.restorer import PHASES, Restorer

# What is asked of the sampler: how LQ tokens attend, steps, and whether a negative text guides it (only with text).
SETTINGS = {
    "paper": {"lq_attention": "joint", "steps": 25, "guided": False},
    "paper, guided": {"lq_attention": "joint", "steps": 25, "guided": True},
    "fast": {"lq_attention": "static", "steps": 8, "guided": False},
    "fast, guided": {"lq_attention": "static", "steps": 8, "guided": True},
}
ENLARGEMENT = 8  # side of the restored image / side of the photograph that is given
# Rows and columns of the matrices whose product tells the rate that a device reaches, and how many follow each other:
# enough for the start to count little, and for the device to grow warm.
MATMUL_CPU, MATMUL = (2048, 5), (8192, 50)

# Table 3 of the paper: at 2048 px, on an A100-80G.
PAPERS = [
    {
        "system": "SeeSR (A100-80G)",
        "steps": 50,
        "step": 1.420,
        "image": 73.736,
        "parameters": 0.5e9,
    },
    {
        "system": "SUPIR (A100-80G)",
        "steps": 50,
        "step": 0.901,
        "image": 52.994,
        "parameters": 1.2e9,
    },
    {
        "system": "ZipIR (A100-80G)",
        "steps": 25,
        "step": 0.250,
        "image": 6.923,
        "parameters": 3.1e9,
    },
]
PAPERS_SIDE = 2048  # pixels


def settings_of(config: ModelConfig) -> tuple[str, ...]:
    """The names of SETTINGS that suit a model."""
    return tuple(name for name, setting in SETTINGS.items() if config.dit.text_width or not setting["guided"])


def with_setting(config: ModelConfig, setting: str) -> ModelConfig:
    """The model with the setting's LQ attention and the attention kernel of the device that jax computes on.

    Raises ValueError for a setting that is not among SETTINGS, or that guides a model without text.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting {setting!r} is not one of: {', '.join(map(repr, SETTINGS))}")
    if SETTINGS[setting]["guided"] and not config.dit.text_width:
        raise ValueError(f"setting {setting!r} needs a model with text")
    attention = fastest(jax.default_backend(), config.dit.compute_dtype)
    dit = dataclasses.replace(config.dit, lq_attention=SETTINGS[setting]["lq_attention"], attention=attention)
    return dataclasses.replace(config, dit=dit)


def restore_seconds(
    config: ModelConfig, weights: dict, setting: str, side: int, repeats: int, profile: Path | None = None
) -> dict:
    """Medians of `repeats` restorations of a square image of `side` pixels, after a first one.

    {"encode", "denoise", "decode", "image": seconds, "compile": what the first one took longer}. "image" begins with
    the photograph as an array and ends with the restored one as an array, both on the host. config: of `with_setting`.
    profile: folder for what jax's profiler records of one more restoration.
    """
    restorer = Restorer(config, weights)
    rng = np.random.default_rng(0)
    texts = {}
    if config.dit.text_width:
        text = rng.standard_normal((DataConfig.text_tokens, config.dit.text_width), np.float32)
        texts = {"text": text} | ({"negative_text": text[::-1]} if SETTINGS[setting]["guided"] else {})
    photograph = rng.integers(0, 256, (side // ENLARGEMENT,) * 2 + (3,), np.uint8)

    def restore():
        marks = []

        def mark(phase, done):
            if done == 0:
                marks.append(time.perf_counter())

        began = time.perf_counter()
        restorer.restore(
            photograph,
            size=(side, side),
            sampling=SamplingConfig(steps=SETTINGS[setting]["steps"]),
            progress=mark,
            **texts,
        )
        marks.append(time.perf_counter())
        return {"image": marks[-1] - began} | dict(zip(PHASES, np.diff(marks).tolist(), strict=True))

    first = restore()["image"]
    times = [restore() for _ in range(repeats)]
    row = {name: statistics.median(t[name] for t in times) for name in times[0]}
    if profile is not None:
        with jax.profiler.trace(profile):
            restore()
    return row | {"compile": first - row["image"]}


def step_seconds(config: ModelConfig, weights: dict, side: int, guided: bool, repeats: int) -> dict:
    """{"step": median seconds of one denoising step alone, "step_flops"} for a square image of `side` pixels.

    With guidance a step evaluates the DiT on both branches. config: of `with_setting`.
    """
    height, width = (length // FACTOR for length in padded_size(config, side, side))
    branches = 2 if guided else 1
    step = denoise_seconds(config.dit, weights["dit"], height, width, branches, repeats)
    flops = branches * dit_step_flops(config.dit, height, width, DataConfig.text_tokens)
    return {"step": step["seconds"], "step_flops": flops}


def matmul_rate(dtype: str, repeats: int) -> float:
    """FLOP/s of the product of two square matrices: what can be reached."""
    size, count = MATMUL_CPU if jax.default_backend() == "cpu" else MATMUL
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)

    @jax.jit
    def products(matrix):
        return jax.lax.fori_loop(0, count, lambda _, x: (x @ matrix / size**0.5).astype(dtype), matrix)

    seconds = median_seconds(lambda: jax.block_until_ready(products(matrix)), repeats)
    return 2 * count * size**3 / seconds


def latency(
    config: ModelConfig,
    settings: tuple[str, ...],
    sides: tuple[int, ...],
    repeats: int,
    profile: Path | None = None,
) -> Iterator[dict]:
    """A row for each setting and side: what `restore_seconds` and `step_seconds` find, or an "error" where they fail.

    "evaluations" are of the DiT for an image, two a step with guidance; "utilisation" of a step is against the rate of
    large matrix products. The weights are random: time does not depend on them. profile: folder for those of
    `restore_seconds`, each in one of its own. Raises ValueError for settings or repeats that cannot be measured, before
    anything is.
    """
    check_repeats(repeats)
    return _rows(
        config, {setting: with_setting(config, setting) for setting in settings}, sides, repeats, profile
    )


def _rows(config, variants, sides, repeats, profile):
    rate = matmul_rate(config.dit.compute_dtype, repeats)
    weights = cheap_weights(config)
    for (setting, variant), side in itertools.product(variants.items(), sides):
        steps, guided = SETTINGS[setting]["steps"], SETTINGS[setting]["guided"]
        row = {"side": side, "setting": setting, "steps": steps, "evaluations": steps * (2 if guided else 1)}
        row |= {"parameters": count_params(weights["dit"]), "matmul_flops_per_second": rate}
        try:
            folder = profile and profile / f"{setting.replace(', ', '_')}_{side}"
            row |= restore_seconds(variant, weights, setting, side, repeats, folder)
            row |= step_seconds(variant, weights, side, guided, repeats)
            row["utilisation"] = row["step_flops"] / row["step"] / rate
        # The planner's, or the device's, for want of memory.
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            row["error"] = str(error).partition("\n")[0]
        yield row


PHASE_COLUMNS = {"pixels": "{side} x {side}", "setting": "{setting}", "evaluations": "{evaluations}"}
PHASE_COLUMNS |= {"step, ms": "{milliseconds:.1f}", "of the matmul rate": "{utilisation:.0%}"}
PHASE_COLUMNS |= {f"{phase}, s": f"{{{phase}:.3f}}" for phase in (*PHASES, "image")}
PHASE_COLUMNS |= {"compile, s": "{compile:.1f}"}


def phases_line(row: dict) -> str:
    """The line of a row of `latency` under PHASE_COLUMNS, or what went wrong."""
    if "error" in row:
        return f"{row['side']} x {row['side']} pixels, {row['setting']}, did not run: {row['error']}"
    return line(row | {"milliseconds": 1e3 * row["step"]}, PHASE_COLUMNS)


def papers_table(rows: list[dict], model: str) -> str:
    """Markdown: Table 3 of the paper, with our rows of its size below the paper's."""
    ours = [
        row | {"system": f"zipir_jax {model}, {row['setting']}"}
        for row in rows
        if row["side"] == PAPERS_SIDE and "error" not in row
    ]
    shown = [
        row | {"milliseconds": 1e3 * row["step"], "billions": row["parameters"] / 1e9}
        for row in (*PAPERS, *ours)
    ]
    columns = {"system, 2048 x 2048 pixels": "{system}", "steps": "{steps}", "step, ms": "{milliseconds:.0f}"}
    return table(shown, columns | {"image, s": "{image:.2f}", "parameters, 10^9": "{billions:.3g}"})
