"""Training in processes of their own: killed, resumed, and on other numbers of devices."""

import functools
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


# tests/kill_and_resume.py does so for all stages in two processes, and within saves.
@pytest.mark.parametrize(("stage", "processes"), [*((stage, 1) for stage in CONFIGS), ("dit", 2)])
def test_a_killed_run_ends_bit_for_bit_where_another_does(folder, results, stage, processes):
    expected = results[stage] if processes == 1 else straight(stage, folder, processes)
    assert differences(killed_after_three(stage, folder, processes), expected) == []


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.fixture(name="curve", scope="module")
def make_curve(folder, results):
    """`curve(stage, devices, tensor=1)`: the losses of 10 steps, on a mesh that divides the batch over the rest."""

    @functools.cache
    def curve(stage, devices, tensor=1):
        output = folder / f"{stage}_{devices}_{tensor}"
        options = "--steps", "10", "--keep-every", "1", "--optimizer.learning-rate", "2e-4"
        mesh = "--mesh.tensor", str(tensor)
        finish(start(stage, folder, output, 1, *options, *mesh, devices=devices), output)
        assert len(losses(output)) == 10
        return losses(output)

    return curve


each_kind = pytest.mark.parametrize("stage", ["coarse", "dit"])  # of network


@each_kind
def test_the_loss_does_not_depend_on_the_number_of_devices(curve, stage):
    np.testing.assert_allclose(curve(stage, 4), curve(stage, 1), rtol=1e-4)


@each_kind
def test_the_loss_does_not_depend_on_what_the_tensor_axis_divides(curve, stage):
    """The height of images where the LP-VAE learns, heads and hidden channels in the DiT."""
    np.testing.assert_allclose(curve(stage, 4, 2), curve(stage, 1), rtol=1e-4)


@pytest.mark.usefixtures("results")
def test_a_run_goes_on_on_another_mesh_and_in_more_processes(folder):
    """Saved on 1 x 4 devices (data x fsdp)."""
    first = folder / "mesh"
    four, two_by_two = (("--mesh.data", d, "--mesh.fsdp", f) for d, f in (("1", "4"), ("2", "2")))
    save = "--keep-every", "1", "--optimizer.learning-rate", "2e-4"
    finish(start("dit", folder, first, 1, "--steps", "3", *four, *save, devices=4), first)
    curves = []
    for name, processes, devices, mesh in (
        ("1x4", 1, 4, four),
        ("2x2", 1, 4, two_by_two),
        ("processes", 2, 2, two_by_two),
    ):
        output = folder / f"mesh_{name}"
        shutil.copytree(first, output)
        finish(start("dit", folder, output, processes, *mesh, *save, devices=devices), output)
        curves.append(losses(output))
        assert len(curves[-1]) == 6
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)
