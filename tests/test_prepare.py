import numpy as np
from safetensors.flax import load_file

from zipir_jax import prepare
from zipir_jax.restorer import NEEDED
from zipir_jax.weights import load_weights


def test_export_writes_what_restoring_needs(tiny_weights, call, tmp_path):
    output = tmp_path / "out"
    status, printed, err = call(prepare.main, "export", "--weights", tiny_weights, "--output", output)
    assert status == 0 and printed.startswith(f"{output}: 0."), err
    config, groups = load_weights(output, NEEDED)
    original, before = load_weights(tiny_weights, NEEDED)
    assert config == original and groups.keys() == set(NEEDED) < before.keys()
    written = load_file(output / "model.safetensors")
    for name, tensor in written.items():
        assert tensor.dtype == ("float32" if name.startswith("statistics.") else "bfloat16")
    np.testing.assert_array_equal(
        groups["statistics"]["macro_mean"], before["statistics"]["macro_mean"], strict=True
    )


def test_export_does_not_replace_the_weights_that_it_reads(tiny_weights, call, tmp_path):
    before = (tiny_weights / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tiny_weights)
    for output in (tiny_weights, tmp_path / "link", tiny_weights / ".." / tiny_weights.name):
        status, printed, err = call(prepare.main, "export", "--weights", tiny_weights, "--output", output)
        assert status == 2 and printed == ""
        assert (
            err.startswith(f"error: {output}: the export would replace the weights") and err.count("\n") == 1
        )
    assert (tiny_weights / "model.safetensors").read_bytes() == before
