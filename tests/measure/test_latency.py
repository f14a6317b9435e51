import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest

from zipir_jax import benchmark
from zipir_jax.config import MODELS
from zipir_jax.measure import latency as latency_module
from zipir_jax.measure.latency import SETTINGS, latency, settings_of, with_setting
from zipir_jax.models.flops import dit_step_flops

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def little_work(monkeypatch, tiny_model):
    monkeypatch.setattr(latency_module, "MATMUL_CPU", (64, 1))
    monkeypatch.setitem(MODELS, "tiny", tiny_model)


def test_phases_are_told_apart_and_compiling_from_the_rest(monkeypatch):
    class Phases:
        def __init__(self, *_):
            pass

        def restore(self, *_, progress, **__):
            for phase in ("encode", "denoise", "decode"):
                for done in (0.0, 0.5, 1.0):
                    progress(phase, done)

    first, others = [0, 100, 101, 102, 103], [0, 1, 3, 7, 15, 0, 2, 3, 4, 9, 0, 3, 9, 49, 99]
    clock = SimpleNamespace(perf_counter=functools.partial(next, iter([*first, *others])))
    monkeypatch.setattr(latency_module, "Restorer", Phases)
    monkeypatch.setattr(latency_module, "time", clock)
    row = latency_module.restore_seconds(MODELS["tiny"], {}, "fast", 64, 3)
    assert row == {"image": 15, "encode": 2, "denoise": 4, "decode": 8, "compile": 103 - 15}


def test_a_size_and_a_setting_are_a_row(call, tmp_path):
    output = tmp_path / "latency.json"
    options = "--model", "tiny", "--sizes", 64, "--repeats", 1, "--profile", tmp_path, "--output", output
    status, out, err = call(benchmark.main, "latency", *options)
    assert status == 0, err
    rows = {row["setting"]: row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {"paper", "fast"}
    for setting, row in rows.items():
        assert row["evaluations"] == row["steps"] == SETTINGS[setting]["steps"]
        dit = dataclasses.replace(MODELS["tiny"].dit, lq_attention=SETTINGS[setting]["lq_attention"])
        assert row["step_flops"] == dit_step_flops(dit, 64 // 32 + 2, 64 // 32 + 2)
        assert list((tmp_path / f"{setting}_64").glob("**/*.xplane.pb"))
    assert "| ZipIR (A100-80G) | 25 | 250 | 6.92 | 3.1 |" in out


def test_a_guided_step_evaluates_both_branches():
    dit = dataclasses.replace(MODELS["tiny"].dit, text_width=16, layers=1)
    config = dataclasses.replace(MODELS["tiny"], dit=dit)
    assert settings_of(config) == tuple(SETTINGS)
    plain, guided = latency(config, ("fast", "fast, guided"), (64,), 1)
    assert guided["evaluations"] == 2 * plain["evaluations"] == 2 * plain["steps"]
    assert guided["step_flops"] == 2 * plain["step_flops"]


def test_a_size_that_fails_does_not_lose_the_others(monkeypatch, call, tmp_path):
    output = tmp_path / "latency.json"

    def restore_seconds(config, weights, setting, side, repeats, profile):
        if side == 96:
            raise ValueError("96 x 96 pixels need 9 GiB")
        return dict.fromkeys(("image", "encode", "denoise", "decode", "compile"), 1.0)

    monkeypatch.setattr(latency_module, "restore_seconds", restore_seconds)
    monkeypatch.setattr(latency_module, "step_seconds", lambda *_: {"step": 1.0, "step_flops": 1.0})
    options = "--model", "tiny", "--settings", "fast", "--sizes", 96, 64, "--output", output
    status, out, _ = call(benchmark.main, "latency", *options)
    assert status == 0
    assert "96 x 96 pixels, fast, did not run: 96 x 96 pixels need 9 GiB" in out
    assert [row.get("error") for row in json.loads(output.read_text())["rows"]][1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "huge"), "model 'huge' is not one of: paper, "),
        (
            ("--model", "tiny", "--settings", "slow"),
            "setting 'slow' is not one of: 'paper', 'paper, guided', ",
        ),
        (("--model", "tiny", "--settings", "fast, guided"), "setting 'fast, guided' needs a model with text"),
        (("--model", "tiny", "--repeats", 0), "repeats 0 is below 1"),
        (("--model", "tiny", "--sizes", 4), "size 4 is below 32"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, options, message):
    status, _, err = call(benchmark.main, "latency", *options)
    assert status == 2
    assert message in err


def test_the_setting_and_the_device_choose_the_attention():
    static = with_setting(MODELS["small"], "fast").dit
    assert (static.lq_attention, static.attention) == ("static", "xla")
    assert with_setting(MODELS["small"], "paper").dit.lq_attention == "joint"


def test_a_kernel_is_chosen_for_half_precision_only(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert with_setting(MODELS["paper"], "paper").dit.attention == "cudnn"
    assert with_setting(MODELS["small"], "paper").dit.attention == "xla"
