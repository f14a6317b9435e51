import json

import pytest

from zipir_jax import benchmark


def test_the_pipeline_is_measured_with_and_without_degradation(call, tmp_path):
    output = tmp_path / "pipeline.json"
    options = "--resolutions", 64, 128, "--seconds", 0.2, "--threads", 1, "--output", output
    status, out, err = call(benchmark.main, "pipeline", *options)
    assert status == 0, err
    report = json.loads(output.read_text())
    speeds = {(s["resolution"], s["degraded"]): s["images_per_core_second"] for s in report["speeds"]}
    assert speeds.keys() == {(side, degraded) for side in (64, 128) for degraded in (False, True)}
    assert all(speed > 0 for speed in speeds.values())
    for need in report["needs"]:
        degraded = need["training"] != "lpvae_fine"
        made = speeds[need["resolution"], degraded]
        assert need["cores"] == pytest.approx(need["images_per_second"] / made)
    assert out.count("| 64 |") == 2 + 4


def test_a_folder_of_photographs_is_measured(call, tmp_path):
    status, _, err = call(benchmark.main, "pipeline", "--sources", tmp_path / "nowhere", "--resolutions", 64)
    assert (status, err) == (2, f"error: {tmp_path / 'nowhere'}: no such folder\n")
