"""Programs compiled for TPUs that are not there. `make test` runs these in an environment of their own, with libtpu."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from zipir_jax.config import MODELS
from zipir_jax.measure.compile import refusal
from zipir_jax.measure.topologies import GIB, GPUS, HARDWARE, check_hardware, device_count, target_config
from zipir_jax.models.layers import count_params
from zipir_jax.weights import abstract_weights

with_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
# The shipped training from latents: the encoders' convolutions take minutes to compile for a TPU.
CONFIG = """
import dataclasses, runpy

def config():
    config = runpy.run_path("configs/dit_3b.py")["config"]()
    dit = dataclasses.replace(config.model.dit, **{dit})
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dit=dit),
        data=dataclasses.replace(config.data, latents="latents"),
        mesh=dataclasses.replace(config.mesh, **{mesh}),
    )
"""


# What restores in it: the networks of a tiny model, all but the heads' channels, in bfloat16. Bands of two scales, as
# each convolution takes seconds to compile.
TINY = """
import dataclasses
from zipir_jax.config import MODELS, DataConfig, TrainConfig

def config():
    tiny = MODELS["tiny"]
    dit = dataclasses.replace(
        tiny.dit, layers=2, width=256, heads=2, text_width=64, compute_dtype="bfloat16"
    )
    shallow = {"base_channels": 8, "multipliers": (1, 1), "pixel_channels": 2}
    lp_vae = dataclasses.replace(
        tiny.lp_vae,
        coarse=dataclasses.replace(tiny.lp_vae.coarse, patch=4, **shallow),
        fine=dataclasses.replace(tiny.lp_vae.fine, patch=16, **shallow),
    )
    model = dataclasses.replace(tiny, lp_vae=lp_vae, dit=dit)
    return TrainConfig(stage="dit", model=model, data=DataConfig(batch_size=64))
"""


def compiled(folder, config, *options):
    """The command's rows for a config's text."""
    file, output = folder / "config.py", folder / "compile.json"
    file.write_text(config)
    options = (*options, "--config", str(file), "--output", str(output))
    command = [sys.executable, "-m", "zipir_jax.benchmark", "compile", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())["programs"]


def training(folder, dit, mesh):
    """The row of a training step on v5e-64, crops of 512 pixels, with these settings of DiT and mesh."""
    options = "--hardware", "v5e-64", "--training-sizes", "512"
    (row,) = compiled(folder, CONFIG.format(dit=dit, mesh=mesh), *options)
    return row


@with_libtpu
def test_each_chip_has_its_share_of_the_state(tmp_path):
    """Of two layers at a quarter of the width, with heads of as many channels as are shipped: a minute's compiling."""
    dit = {"layers": 2, "width": 512, "heads": 4, "text_width": 512}
    row = training(tmp_path, dit, mesh={})
    model = MODELS["paper"]
    groups = abstract_weights(dataclasses.replace(model, dit=dataclasses.replace(model.dit, **dit)))
    state = 16 * count_params(groups["dit"])  # float32 parameters, their average, two moments
    frozen = 4 * sum(
        count_params(groups[name]) for name in ("coarse_encoder", "fine_encoder", "fine_decoder")
    )
    assert row["devices"] == 64
    assert row["arguments"] == pytest.approx(state / 64 + frozen, rel=0.01)  # and a batch of little latents
    assert row["fits"]
    assert row["total"] < row["usable"] == 15.75 * GIB


@with_libtpu
def test_a_state_that_is_not_divided_does_not_fit(tmp_path):
    row = training(tmp_path, {"layers": 24}, mesh={"data": 0, "fsdp": 1})
    assert not row["fits"]
    assert "15.75G" in row["refusal"]  # as the compiler names what a chip has


@with_libtpu
def test_the_programs_of_restoring_are_compiled_for_one_chip(tmp_path):
    rows = compiled(tmp_path, TINY, "--hardware", "v5e", "--sizes", "256")
    names = ["encode", "read", "denoise", "read, static", "denoise, static", "decode"]
    assert [row["program"] for row in rows] == names
    assert all(row["fits"] and row["attention"] == "splash" for row in rows)
    joint, static = rows[2], rows[4]
    assert (
        static["arguments"] != joint["arguments"]
    )  # what was read: tokens, or keys and values of every layer
    assert all(row["arguments"] < row["total"] < row["usable"] and row["planned"] for row in rows)


@with_libtpu
def test_a_training_step_encodes_its_images(tmp_path):
    options = "--hardware", "v6e-64", "--training-sizes", "128"
    (row,) = compiled(tmp_path, TINY, *options)
    (cached,) = compiled(tmp_path, TINY.replace("DataConfig(", "DataConfig(latents='latents', "), *options)
    assert row["temporaries"] > cached["temporaries"]


def test_only_known_hardware_is_compiled_for(monkeypatch):
    with pytest.raises(ValueError, match="hardware 'v2-8' is not one of: 8xa100, "):
        check_hardware(("v2-8",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, module in (("v5e-64", "libtpu"), ("a100", "jax_cuda12_plugin or jax_cuda13_plugin")):
        with pytest.raises(ValueError, match=f"to compile for {name} needs {module}: pip install"):
            check_hardware((name,))


def test_slices_have_the_chips_that_their_names_say():
    for name, (platform, _, _) in HARDWARE.items():
        count = re.search(r"-(\d+)$" if platform == "tpu" else r"^(\d+)x", name)
        cores = 2 if name == "v5p-64" else 1  # of a chip, which Cloud TPU counts there
        assert device_count(name) * cores == (int(count[1]) if count else 1)


def test_a_gpu_is_described_in_the_order_of_its_generation():
    texts = {name: target_config(gpu) for name, gpu in GPUS.items()}
    assert "major: 8 minor: 0" in texts["a100"]
    assert all("major: 9 minor: 0" in texts[name] for name in ("h100", "h200"))
    assert all(text.count("{") == text.count("}") for text in texts.values())


def test_a_refusal_is_told_with_its_numbers():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 46.55G of 15.75G hbm. Exceeded by 30.80G.\nx"
    assert refusal(message) == "Used 46.55G of 15.75G hbm. Exceeded by 30.80G."
