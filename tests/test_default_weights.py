"""The weights that come with the package, on photographs of scikit-image that they were never trained on."""

import numpy as np
import pytest
from skimage import data

from zipir_jax.config import MODELS, TASKS
from zipir_jax.data.degrade import apply_task
from zipir_jax.imageio import resize, to_float
from zipir_jax.metrics.fidelity import grid_energy, lpips_to, psnr
from zipir_jax.restorer import NEEDED, Restorer
from zipir_jax.weights import DEFAULT, load_weights

# task: (least PSNR against bicubic's in dB, most LPIPS-VGG16 and LPIPS-AlexNet as a multiple of bicubic's) on this one
# photograph; means over twenty are in docs/results.
BOUNDS = {"mixture": (0.8, 0.88, 0.65), "sr8": (-0.7, 0.98, 0.85), "sr16": (-0.7, 0.95, 0.90)}
each_task = pytest.mark.parametrize("task", BOUNDS)


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load("default")


@pytest.fixture(scope="module")
def restored(restorer):
    """{task: (bicubic, restored, original)} for the astronaut, float32 [512, 512, 3], with the default sampling."""
    original = to_float(data.astronaut())
    results = {}
    for name in BOUNDS:
        lq = apply_task(original, TASKS[name], np.random.default_rng(0))
        results[name] = (resize(lq, 512, 512), restorer.restore(lq, size=(512, 512)), original)
    return results


def test_the_folder_is_small_and_holds_the_small_preset():
    assert sum(path.stat().st_size for path in DEFAULT.iterdir()) <= 12 * 2**20
    config, _ = load_weights("default", NEEDED)
    assert config == MODELS["small"]  # settings that are newer than the file have their defaults


@each_task
def test_it_is_better_than_bicubic(restored, task):
    bicubic, ours, original = restored[task]
    gain, vgg16, alexnet = BOUNDS[task]
    assert psnr(ours[None], original[None])[0] >= psnr(bicubic[None], original[None])[0] + gain
    for net, bound in (("vgg16", vgg16), ("alexnet", alexnet)):
        distance = lpips_to(original, net)
        assert distance(ours) <= bound * distance(bicubic), net


@each_task
def test_flat_regions_show_no_grid(restored, task):
    _, ours, original = restored[task]
    for period, energy in grid_energy(ours, original).items():
        assert energy < 1, period  # a pattern of one 8-bit level's standard deviation in the Laplacian


@each_task
def test_no_frame_shows_at_the_border(restored, task):
    """The outermost pixels are harder, for lack of neighbours; as much harder as they are for bicubic enlargement."""
    bicubic, ours, original = restored[task]

    def harder(picture):
        error = np.abs(picture - original).mean(-1)
        rings = [
            np.concatenate([error[i], error[-1 - i], error[:, i], error[:, -1 - i]]).mean() for i in (0, 8)
        ]
        return rings[0] / rings[1]

    assert harder(ours) < 1.2 * harder(bicubic)


@each_task
def test_colours_do_not_shift(restored, task):
    _, ours, original = restored[task]
    np.testing.assert_allclose(ours.mean((0, 1)), original.mean((0, 1)), atol=0.04)


def test_an_odd_photograph_keeps_its_shape(restorer):
    photo = data.chelsea()[:83, :129]
    assert restorer.restore(photo, scale=4).shape == (332, 516, 3)
