"""Training in processes of their own: killed, resumed, and on other numbers of devices."""

import json
import shutil

import numpy as np
import pytest

from tests.kill_and_resume import (
    CONFIGS,
    differences,
    finish,
    killed_after_three,
    start,
    straight,
    write_photos,
)

each_stage = pytest.mark.parametrize("stage", CONFIGS)


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    """Photographs, and the weights of a short run of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    write_photos(folder / "photos")
    return folder


@pytest.fixture(name="results", scope="module")
def run_all_stages(folder):
    """What a run of each stage in one process has to show."""
    return {stage: straight(stage, folder, 1) for stage in CONFIGS}


@each_stage
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_ends_bit_for_bit_where_another_does(folder, results, stage, processes):
    expected = results[stage] if processes == 1 else straight(stage, folder, processes)
    assert differences(killed_after_three(stage, folder, processes), expected) == []


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.usefixtures("results")
@each_stage
def test_the_loss_does_not_depend_on_the_number_of_devices(folder, stage):
    curves = []
    for devices in (1, 2, 4):
        output = folder / f"{stage}_{devices}_devices"
        options = "--steps", "10", "--keep-every", "1", "--optimizer.learning-rate", "2e-4"
        finish(start(stage, folder, output, 1, *options, devices=devices), output)
        curves.append(losses(output))
        assert len(curves[-1]) == 10
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("stage", ["coarse", "dit"])
def test_a_run_goes_on_on_another_mesh_and_in_more_processes(folder, stage):
    """Saved on 1 x 4 devices (data x fsdp)."""
    first = folder / f"{stage}_mesh"
    learning_rate = "--optimizer.learning-rate", "2e-4"
    mesh = "--mesh.data", "1", "--mesh.fsdp", "4"
    save = "--keep-every", "1", *learning_rate
    finish(start(stage, folder, first, 1, "--steps", "3", *mesh, *save, devices=4), first)
    curves = []
    for name, processes, devices, mesh in (
        ("1x4", 1, 4, mesh),
        ("2x2", 1, 4, ("--mesh.data", "2", "--mesh.fsdp", "2")),
        ("processes", 2, 2, ("--mesh.data", "2", "--mesh.fsdp", "2")),
    ):
        output = folder / f"{stage}_mesh_{name}"
        shutil.copytree(first, output)
        finish(start(stage, folder, output, processes, *mesh, *save, devices=devices), output)
        curves.append(losses(output))
        assert len(curves[-1]) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)
