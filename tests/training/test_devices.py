"""Training in processes of their own: killed, resumed, and on other numbers of devices."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import save_random_weights
from tests.kill_and_resume import (
    STEPS,
    differences,
    finish,
    killed_after_three,
    start,
    straight,
    write_photos,
)
from zipir_jax.weights import load_weights

FOUR = {
    "coarse": ("--mesh.tensor", "2"),
    "dit": ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
}
ONE_BUCKET = ("--data.resolutions", "64")  # compiles in half the time


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    """Photographs, and a place for runs."""
    folder = tmp_path_factory.mktemp("runs")
    write_photos(folder / "photos")
    return folder


@pytest.fixture(name="results", scope="module")
def run_both_kinds(folder):
    """What a run in one process has to show, of each kind of network; the DiT starts from random weights."""
    results = {"coarse": straight("coarse", folder, 1)}
    model, _ = load_weights(folder / "coarse" / "weights", ())
    save_random_weights(folder / "fine" / "weights", model)
    return results | {"dit": straight("dit", folder, 1)}


# tests/kill_and_resume.py does so for all stages in two processes, and within saves.
def test_a_killed_run_ends_bit_for_bit_where_another_does(folder, results):
    assert differences(killed_after_three("dit", folder, 1), results["dit"]) == []


@pytest.mark.usefixtures("results")
def test_so_does_one_of_two_processes(folder):
    expected = straight("dit", folder, 2, *ONE_BUCKET)
    assert differences(killed_after_three("dit", folder, 2, *ONE_BUCKET), expected) == []


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    return [line["loss"] for line in lines]


@pytest.fixture(name="on_four", scope="module")
def make_runs_on_four_devices(folder, results):
    """{stage: output of a run that divides the batch, and what the tensor axis divides, over 2 x 2 devices}.

    The tensor axis divides the height of images where the LP-VAE learns, heads and hidden channels in the DiT.
    """
    outputs = {stage: folder / f"{stage}_on_four" for stage in FOUR}
    for stage, output in outputs.items():
        finish(start(stage, folder, output, 1, *FOUR[stage], devices=4), output)
    return outputs


@pytest.mark.parametrize("stage", FOUR)
def test_the_loss_does_not_depend_on_what_devices_divide(folder, on_four, stage):
    np.testing.assert_allclose(losses(on_four[stage]), losses(folder / stage), rtol=1e-4)


def test_a_run_goes_on_on_another_mesh_and_in_more_processes(folder, on_four):
    output = folder / "other_mesh"
    shutil.copytree(on_four["dit"], output, ignore=shutil.ignore_patterns("4", "5", "6", "weights"))
    finish(start("dit", folder, output, 2, "--mesh.data", "2", "--mesh.fsdp", "2"), output)
    np.testing.assert_allclose(losses(output), losses(on_four["dit"]), rtol=1e-5)
