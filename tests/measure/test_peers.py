"""The peers: facts about their networks without torch, the arithmetic of the report, our own side as it runs.

torch is not among the tests' requirements; what needs it is skipped without.
"""

import dataclasses
import importlib.util
import json
import os

import pytest

from zipir_jax import benchmark
from zipir_jax.config import MODELS
from zipir_jax.measure import peers
from zipir_jax.models.dit import DiT
from zipir_jax.models.flops import dit_read_flops, dit_step_flops
from zipir_jax.models.layers import abstract_params, count_params

PARAMETERS = {"sd21": 865_910_724, "sdxl": 2_567_463_684}  # of the published weights
SECONDS = {("paper", 2): 4.0, ("paper", 1): 2.0, ("paper_static", 2): 2.5, ("dit_0p68b", 1): 0.5}
SECONDS |= {("sd21", 2): 3.0, ("sd21", 1): 1.0}


def unet_parameters(config):
    """By hand, from the layers of a UNet of this config."""
    widths, context = config["block_out_channels"], config["cross_attention_dim"]
    depths, time = config["transformer_layers_per_block"], 4 * widths[0]

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    def conv(inputs, outputs):
        return 9 * inputs * outputs + outputs

    def resnet(inputs, outputs):
        shortcut = linear(inputs, outputs) if inputs != outputs else 0
        convs = conv(inputs, outputs) + conv(outputs, outputs)
        return 2 * inputs + 2 * outputs + convs + linear(time, outputs) + shortcut

    def transformer(c, depth):
        self_attention = 3 * c * c + linear(c, c)
        cross_attention = c * c + 2 * context * c + linear(c, c)
        feed_forward = linear(c, 8 * c) + linear(4 * c, c)  # GEGLU
        return 2 * c + 2 * linear(c, c) + depth * (6 * c + self_attention + cross_attention + feed_forward)

    total = conv(4, widths[0]) + linear(widths[0], time) + linear(time, time)
    if "addition_embed_type" in config:
        total += linear(config["projection_class_embeddings_input_dim"], time) + linear(time, time)
    skips, h = [widths[0]], widths[0]
    for level, (kind, c) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        for _ in range(2):
            total += resnet(h, c) + (transformer(c, depths[level]) if "Cross" in kind else 0)
            skips.append(h := c)
        if level < len(widths) - 1:
            total += conv(c, c)
            skips.append(c)
    total += 2 * resnet(h, h) + transformer(h, depths[-1])
    for level, kind in zip(reversed(range(len(widths))), config["up_block_types"], strict=True):
        c = widths[level]
        for _ in range(3):
            total += resnet(h + skips.pop(), c) + (transformer(c, depths[level]) if "Cross" in kind else 0)
            h = c
        total += conv(c, c) if level else 0
    return total + 2 * h + conv(h, 4)


@pytest.fixture
def stand_ins(monkeypatch):
    """Times and FLOPs of which the report's numbers follow by hand; SDXL fails."""
    calls = []

    def in_own_process(function, network, side, batch, repeats, device):
        calls.append((function, network, batch))
        if network == "sdxl":
            return {"seconds": None, "error": "out of memory"}
        return {"parameters": 5_000_000, "seconds": SECONDS[network, batch] * side / 512}

    monkeypatch.setattr(peers, "in_own_process", in_own_process)
    monkeypatch.setattr(peers, "unet_flops", lambda network, side: 10 * side)
    monkeypatch.setattr(peers, "our_flops", lambda network, side, calls, branches: calls * side * side)
    monkeypatch.setattr(peers, "shared_device", lambda: ("cpu", "torch 0, diffusers 0"))
    return calls


@pytest.mark.parametrize("network", peers.UNETS)
def test_the_unets_have_the_published_number_of_parameters(network):
    assert unet_parameters(peers.UNETS[network]) == PARAMETERS[network]


def test_steps_images_and_ratios_follow_from_the_times(stand_ins):
    rows = {row["system"]: row for row in peers.compare(512, 1, "cpu")}
    assert rows.keys() == peers.SYSTEMS.keys()
    assert rows["ZipIR 3.12B"]["image_seconds"] == 25 * 4.0
    assert rows["ZipIR 3.12B"]["seconds_ratio"] == rows["ZipIR 3.12B"]["image_seconds_ratio"] == 1
    assert rows["StableSR"]["seconds_ratio"] == 1 / 4
    assert rows["StableSR"]["image_seconds_ratio"] == 200 * 1.0 / (25 * 4.0)
    assert rows["SeeSR"]["image_seconds"] == 5 * rows["DiffBIR v2.1"]["image_seconds"]
    assert rows["SUPIR"]["image_seconds"] is rows["SUPIR"]["seconds_ratio"] is None


def test_what_systems_share_is_measured_once(stand_ins):
    peers.compare(512, 1, "cpu")
    assert len(stand_ins) == len(set(stand_ins))
    assert {(network, batch) for _, network, batch in stand_ins} == SECONDS.keys() | {("sdxl", 2)}
    assert all(function is peers.time_unet for function, network, _ in stand_ins if network in peers.UNETS)


def test_flops_of_an_image_are_those_of_all_its_calls(stand_ins):
    rows = {row["system"]: row for row in peers.image_flops((64, 128))}
    assert rows["ZipIR 3.12B"]["flops"] == {64: 50 * 64**2, 128: 50 * 128**2}
    assert rows["SeeSR"]["flops"] == {64: 100 * 640, 128: 100 * 1280}
    assert rows["SeeSR"]["ratio"] == {64: 64000 / (50 * 64**2), 128: 128000 / (50 * 128**2)}


def test_the_command_writes_what_it_prints(stand_ins, call, tmp_path):
    output = tmp_path / "peers.json"
    status, out, err = call(benchmark.main, "peers", "--sizes", 512, 1024, "--output", output)
    assert (status, err) == (0, "")
    report = json.loads(output.read_text())
    assert [row["size"] for row in report["steps"]] == len(peers.SYSTEMS) * [512] + len(peers.SYSTEMS) * [
        1024
    ]
    assert report["libraries"] == "torch 0, diffusers 0" and report["precision"] == "float32"
    assert "| StableSR | 5 M | 200 x 1 | 1 | 0.25 | 200 | 2 |" in out
    assert "| SUPIR | - | 50 x 2 | - | - | - | - |" in out and "SUPIR did not run: out of memory" in out
    assert "lower bounds" in out and "jax" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sizes", 512, 500), "size 500 is not a multiple of 64"),
        (("--sizes", 0), "size 0 is not a multiple of 64"),
        (("--repeats", 0), "repeats 0 is below 1"),
    ],
)
def test_impossible_sizes_and_repeats_are_refused_before_anything_runs(stand_ins, call, options, message):
    assert call(benchmark.main, "peers", *options)[::2] == (2, f"error: {message}\n")
    assert stand_ins == []


@pytest.mark.parametrize("missing", [("torch",), ("torch", "diffusers")])
def test_without_torch_a_sentence_says_what_to_install(monkeypatch, call, missing):
    find = importlib.util.find_spec
    found = {"torch": object(), "diffusers": object()} | dict.fromkeys(missing)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found[name] if name in found else find(name)
    )
    status, _, err = call(benchmark.main, "peers")
    assert status == 2 and err.count("\n") == 1
    assert f"need {' and '.join(missing)}, " in err and 'pip install -e ".[parity]"' in err


@pytest.mark.parametrize("text_width", [0, 16])
def test_our_side_is_timed(monkeypatch, text_width):
    config = dataclasses.replace(MODELS["tiny"].dit, text_width=text_width, lq_attention="static")
    monkeypatch.setitem(peers.DITS, "tiny", config)
    measured = peers.time_dit("tiny", 64, 2, 1, "cpu")
    assert measured["parameters"] == count_params(abstract_params(DiT, config))
    assert measured["seconds"] > 0 and measured["compile_seconds"] > 0


def test_a_process_that_fails_or_dies_leaves_the_reason():
    assert peers.in_own_process(bytearray, 2**62) == {"error": "MemoryError"}
    died = peers.in_own_process(os._exit, 1)
    assert "terminated" in died["error"]


def test_what_is_read_once_counts_once():
    for network, branches in (("paper", 2), ("paper_static", 2), ("dit_0p68b", 1)):
        one, two = (peers.our_flops(network, 512, calls, branches) for calls in (1, 2))
        step = dit_step_flops(peers.DITS[network], 16, 16, 128)
        assert two - one == step
        assert one - step == dit_read_flops(peers.DITS[network], 16, 16, branches * 128)


@pytest.mark.parametrize("network", peers.UNETS)
def test_diffusers_builds_the_published_unets(network):
    pytest.importorskip("diffusers")
    assert (
        sum(parameter.numel() for parameter in peers.build_unet(network).parameters()) == PARAMETERS[network]
    )


def test_a_unet_runs_and_its_flops_grow_with_the_image(monkeypatch):
    pytest.importorskip("diffusers")
    narrow = {"block_out_channels": (32, 32, 64), "attention_head_dim": (1, 1, 2), "cross_attention_dim": 16}
    monkeypatch.setitem(peers.UNETS, "sdxl", peers.UNETS["sdxl"] | narrow)
    measured = peers.time_unet("sdxl", 64, 2, 1, "cpu")
    assert measured["seconds"] > 0 and measured["parameters"] == unet_parameters(peers.UNETS["sdxl"])
    # Four times the pixels are four times the convolutions, and more than that in attention.
    assert 4 < peers.unet_flops("sdxl", 1024) / peers.unet_flops("sdxl", 512) < 16
