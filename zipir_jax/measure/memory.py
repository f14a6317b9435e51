"""Memory of restoring: what the planner estimates, what XLA says of the compiled programs, and what was really used."""

import math
import resource
import sys

import jax
import numpy as np
import psutil

from zipir_jax.config import MODELS, DataConfig, ModelConfig, SamplingConfig
from zipir_jax.measure.latency import SETTINGS, with_setting
from zipir_jax.measure.programs import program_bytes, sampling_programs, sampling_weights
from zipir_jax.measure.report import table
from zipir_jax.measure.timing import cheap_weights
from zipir_jax.planner import GIB
from zipir_jax.restorer import PHASES, Restorer

STEPS = 1  # of the sampler; its memory is that of a step


def restore_memory(model: str, setting: str, side: int, memory: int | None) -> dict:
    """A row: what a square picture of `side` pixels takes, in bytes beside the weights; for a process of its own.

    {"plan": lines, "estimated", "compiled": {phase: bytes}, "total": the most of the process, the making of the weights
    included, "used": by how much that is more than before the picture}. On a CPU that is resident memory, with what
    compiler and allocator keep. model: of MODELS, with random weights; setting: of SETTINGS; memory: as of
    `Restorer.restore`. Raises ValueError for a size that does not fit.
    """
    config = with_setting(MODELS[model], setting)
    restorer = Restorer(config, jax.block_until_ready(cheap_weights(config)))
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    texts, sampling = {}, SamplingConfig(steps=STEPS)
    if config.dit.text_width:
        text = np.ones((DataConfig.text_tokens, config.dit.text_width), np.float32)
        texts = {"text": text} | ({"negative_text": text} if SETTINGS[setting]["guided"] else {})
    branches = 2 if SETTINGS[setting]["guided"] else 1
    plan = restorer.plan(photograph.shape, scale=1, sampling=sampling, memory=memory, **texts)
    programs = sampling_programs(config, sampling, plan, branches)
    before = _in_use()
    restorer.restore(photograph, scale=1, sampling=sampling, memory=memory, **texts)
    peak = _peak()
    return {
        "model": model,
        "setting": setting,
        "side": side,
        "plan": plan.lines(),
        "estimated": plan.needs,
        "compiled": compiled_bytes(config, programs),
        "used": peak - before,
        "total": peak,
    }


def compiled_bytes(config: ModelConfig, programs: dict[str, tuple]) -> dict[str, int]:
    """Bytes of each phase, as XLA accounts for its programs: what they read but the weights, write and hold between.

    programs: of `programs.sampling_programs`, those that denoise at least; of these two, the larger counts.
    """
    found, weights = {}, sampling_weights(config)
    for program, (function, static, arrays) in programs.items():
        sizes = program_bytes(function.lower(*static, weights, *arrays).compile())
        read = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
        found[program] = read + sizes["returned"] + sizes["temporaries"]
    return found | {"denoise": max(found.pop("read"), found["denoise"])}


def _in_use():
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def _peak():
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_table(rows: list[dict]) -> str:
    """Markdown of rows of `restore_memory`: estimated / compiled of each phase, and what was used."""
    shown = []
    for row in (row for row in rows if "error" not in row):
        phases = {
            phase: f"{row['estimated'][phase] / GIB:.2f} / {row['compiled'][phase] / GIB:.2f}"
            for phase in PHASES
        }
        shown.append(row | phases | {name: row[name] / GIB for name in ("used", "total")})
    columns = {"pixels": "{side} x {side}", "setting": "{setting}"}
    columns |= {f"{phase}, GiB": f"{{{phase}}}" for phase in PHASES}
    return table(shown, columns | {"used, GiB": "{used:.2f}", "with weights and runtime": "{total:.2f}"})
