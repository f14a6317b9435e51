import json

import pytest

from zipir_jax import benchmark
from zipir_jax.command_line import load_config
from zipir_jax.config import MODELS
from zipir_jax.training.flops import training_flops

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_step_is_timed_on_crops_of_a_size(call, tiny_model, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "tiny", tiny_model)
    output, config = tmp_path / "train.json", "configs/dit_3b_tiny.py"
    options = "--config", config, "--sizes", 64, "--batch-size", 4, "--accumulate", 2, "--repeats", 1
    status, out, err = call(benchmark.main, "train", *options, "--output", output)
    assert status == 0, err
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["stage"], row["side"], row["batch"], row["accumulate"]) == ("dit", 64, 4, 2)
    assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
    flops = 4 * training_flops(load_config(config), 64, 64, adversarial=False)
    assert row["flops_per_second"] == pytest.approx(flops / row["seconds"])
    assert row["mfu"] is None  # a CPU's peak is not known
    assert "| dit | 64 | 4 | 2 |" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--config", "configs/dit_3b_tiny.py", "--batch-size", 3, "--accumulate", 2),
            "data.batch_size 3 is not a",
        ),
        (("--config", "configs/lpvae_coarse_tiny.py", "--batch-size", 2), "gives the losses 16; they need"),
        (("--config", "nowhere.py"), "nowhere.py: no such config"),
    ],
)
def test_what_cannot_be_trained_is_refused(call, options, message):
    status, _, err = call(benchmark.main, "train", "--sizes", 64, *options)
    assert status == 2
    assert message in err
