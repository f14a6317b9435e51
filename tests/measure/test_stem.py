import dataclasses
import json

import jax
import pytest

from zipir_jax import benchmark
from zipir_jax.config import MODELS
from zipir_jax.measure import stem
from zipir_jax.models.flops import encoder_flops, pixel_decoder_flops
from zipir_jax.models.layers import abstract_params
from zipir_jax.models.lp_vae import Encoder

PAPER = MODELS["paper"].lp_vae


@pytest.mark.parametrize("patch", stem.PATCHES)
def test_a_patch_takes_the_place_of_the_highest_scales(patch):
    config = stem.with_patch(PAPER, patch)
    assert config.fine.factor == PAPER.fine.factor == 32
    assert dataclasses.replace(config.fine, patch=1, multipliers=PAPER.fine.multipliers) == PAPER.fine
    assert config.coarse == PAPER.coarse
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), "float32")
    mean, _ = jax.eval_shape(
        lambda params, image: stem.bind(Encoder, config.fine, params)(image),
        abstract_params(Encoder, config.fine),
        image,
    )
    assert mean.shape == (1, 2, 3, 52)


def test_the_papers_config_is_the_one_without_patches():
    assert stem.with_patch(PAPER, 1) == PAPER


@pytest.mark.usefixtures("quick_compile")
def test_the_command_times_every_network_and_counts_at_2048_pixels(monkeypatch, call, tmp_path):
    monkeypatch.setattr(stem, "PATCHES", (1, 4))
    narrow = dataclasses.replace(
        PAPER, fine=dataclasses.replace(PAPER.fine, base_channels=4, blocks_per_scale=1)
    )
    monkeypatch.setitem(stem.MODELS, "paper", dataclasses.replace(MODELS["paper"], lp_vae=narrow))
    output = tmp_path / "stem.json"
    status, out, err = call(benchmark.main, "stem", "--size", 64, "--repeats", 1, "--output", output)
    assert (status, err) == (0, "")
    rows = json.loads(output.read_text())["rows"]
    assert [(row["patch"], row["network"]) for row in rows] == [
        (patch, network) for patch in (1, 4) for network in ("E_f", "D_f", "D_f*")
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["flops"] == encoder_flops(narrow.fine, 2048, 2048)
    for row in rows:
        (reference,) = (other for other in rows if (other["patch"], other["network"]) == (1, row["network"]))
        assert row["flops_ratio"] == row["flops"] / reference["flops"]
        assert row["seconds_ratio"] == row["seconds"] / reference["seconds"]
    assert rows[-1]["flops"] == pixel_decoder_flops(stem.with_patch(narrow, 4), 2048, 2048)
    assert out.count("| E_f | ") == 2


def test_a_size_that_the_latent_does_not_divide_is_refused(call):
    status, _, err = call(benchmark.main, "stem", "--size", 100)
    assert status == 2 and err == "error: size 100 is not a multiple of 32\n"
