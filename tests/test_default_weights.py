"""The weights that come with the package, on photographs of scikit-image that they were never trained on."""

import dataclasses
import json

import numpy as np
import pytest
from skimage import data

from zipir_jax.config import MODELS, TASKS, SamplingConfig
from zipir_jax.data.degrade import apply_task
from zipir_jax.imageio import resize, to_float
from zipir_jax.metrics.fidelity import grid_energy, lpips_to, psnr
from zipir_jax.restorer import NEEDED, Restorer
from zipir_jax.weights import DEFAULT, load_weights

pytestmark = pytest.mark.skipif(not DEFAULT.is_dir(), reason="the default weights are not trained yet")
FEW_STEPS = SamplingConfig(steps=4)


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load("default")


@pytest.fixture(scope="module")
def restored(restorer):
    """{task: (bicubic, restored, original)} for the middle of the astronaut, float32 [256, 256, 3]."""
    original = to_float(np.ascontiguousarray(data.astronaut()[64:320, 96:352]))
    results = {}
    for name in ("mixture", "sr8"):
        lq = apply_task(original, TASKS[name], np.random.default_rng(0))
        ours = restorer.restore(lq, size=(256, 256), sampling=FEW_STEPS)
        results[name] = (resize(lq, 256, 256), ours, original)
    return results


def test_the_folder_is_small_and_holds_the_small_preset():
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) <= 12 * 2**20
    config, _ = load_weights("default", NEEDED)
    assert config == MODELS["small"]
    assert json.loads((DEFAULT / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


def test_the_mixture_is_restored_far_better_than_bicubic_does(restored):
    bicubic, ours, original = restored["mixture"]
    assert psnr(ours[None], original[None])[0] > psnr(bicubic[None], original[None])[0] + 1.5
    for net in ("alexnet", "vgg16"):
        distance = lpips_to(original, net)
        assert distance(ours) < 0.9 * distance(bicubic)


def test_super_resolution_looks_better_than_bicubic_at_no_great_loss(restored):
    bicubic, ours, original = restored["sr8"]
    assert psnr(ours[None], original[None])[0] > psnr(bicubic[None], original[None])[0] - 1
    distance = lpips_to(original, "alexnet")
    assert distance(ours) < 0.95 * distance(bicubic)


@pytest.mark.parametrize("task", ["mixture", "sr8"])
def test_flat_regions_show_no_grid(restored, task):
    _, ours, original = restored[task]
    energy, allowed = grid_energy(ours, original), grid_energy(original, original)
    for period in energy:
        assert energy[period] < 2 * allowed[period], period


@pytest.mark.parametrize("task", ["mixture", "sr8"])
def test_colours_do_not_shift(restored, task):
    _, ours, original = restored[task]
    np.testing.assert_allclose(ours.mean((0, 1)), original.mean((0, 1)), atol=0.04)


def test_an_odd_photograph_keeps_its_shape(restorer):
    photo = data.chelsea()[:83, :129]
    assert restorer.restore(photo, scale=4, sampling=FEW_STEPS).shape == (332, 516, 3)
