import dataclasses
import json

import jax
import pytest

from zipir_jax import benchmark
from zipir_jax.config import MODELS, SamplingConfig
from zipir_jax.measure.memory import compiled_bytes
from zipir_jax.measure.programs import sampling_programs, sampling_weights
from zipir_jax.planner import make_plan

pytestmark = pytest.mark.usefixtures("quick_compile")
TINY = MODELS["tiny"]
TEXT = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, text_width=16))


def test_what_is_planned_compiled_and_used_is_told(call, tmp_path):
    output = tmp_path / "memory.json"
    options = "--model", "tiny", "--settings", "fast", "--sizes", 256, 8192, "--memory-gib", 0.5
    status, out, err = call(benchmark.main, "memory", *options, "--output", output)
    assert status == 0, err
    fits, refused = json.loads(output.read_text())["rows"]
    for phase in ("encode", "denoise", "decode"):
        assert 0 < fits["compiled"][phase] < 2 * fits["estimated"][phase]
    assert 0 < fits["used"] < fits["total"]
    assert "8192 x 8192 pixels need" in refused["error"]
    assert "| 256 x 256 | fast |" in out


@pytest.mark.parametrize("config", [TINY, TEXT], ids=["plain", "text"])
def test_the_programs_are_those_of_a_plan(config):
    branches = 2 if config.dit.text_width else 1
    plan = make_plan(config, 200, 300, available=2**30, branches=branches)
    shapes = {
        phase: jax.eval_shape(
            lambda w, *a, f=function, s=static: f(*s, w, *a), sampling_weights(config), *arrays
        )
        for phase, (function, static, arrays) in sampling_programs(
            config, SamplingConfig(steps=2), plan, branches
        ).items()
    }
    read, carry = shapes["read"]
    assert read["conditions"].keys() == ({"both"} if branches == 2 else {"alone"})
    stepped, latent = shapes["denoise"]
    assert jax.tree.map(lambda x: x.shape, stepped) == jax.tree.map(lambda x: x.shape, carry)
    assert shapes["encode"].shape == latent.shape == (1, plan.height // 32, plan.width // 32, 64)
    assert shapes["decode"].shape == (1, plan.height, plan.width, 3)


def test_tiles_take_less_of_what_is_compiled():
    whole = make_plan(TINY, 1000, 1000, available=2**32)
    tiled = make_plan(TINY, 1000, 1000, available=max(whole.needs.values()) // 2)
    assert whole.decode is None and tiled.decode is not None
    of_tiles, of_whole = (
        compiled_bytes(TINY, sampling_programs(TINY, SamplingConfig(), plan, 1)) for plan in (tiled, whole)
    )
    assert of_tiles["decode"] < 0.8 * of_whole["decode"]
    assert of_tiles["denoise"] == of_whole["denoise"]
