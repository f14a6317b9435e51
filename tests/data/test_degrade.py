"""Properties of the degradations: closed forms, noise levels, sizes, seeds, and every branch reached."""

import collections
import dataclasses
import subprocess
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy.special import erf

from zipir_jax import prepare
from zipir_jax.config import TASKS, BlurKernels, DegradationConfig, DegradationOrder, Task
from zipir_jax.data import degrade
from zipir_jax.data.preview import LABEL_HEIGHT, contact_sheet
from zipir_jax.imageio import resize

RANDOM_ONLY = DegradationConfig(task_probability=0.0)


@pytest.fixture(scope="module")
def photograph():
    """skimage's astronaut, 512 x 512."""
    return skimage.data.astronaut().astype(np.float32) / 127.5 - 1


def flat(value, side=256):
    return np.full((side, side, 3), value, np.float32)


def psnr(a, b):
    return 10 * np.log10(4 / np.mean((a.astype(np.float64) - b) ** 2))


# --------------------------------------------------------------------------------------------------
# Blur kernels
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 13, 21])
def test_every_kernel_sums_to_one(size):
    kernels = [
        degrade.gaussian_kernel(size, (2.0, 2.0)),
        degrade.gaussian_kernel(size, (3.0, 0.5), 0.7),
        degrade.gaussian_kernel(size, (0.2, 0.2)),
        degrade.gaussian_kernel(size, (3.0, 1.0), -2.0, generalized_shape=0.5),
        degrade.gaussian_kernel(size, (0.2, 3.0), 2.0, generalized_shape=4.0),
        degrade.gaussian_kernel(size, (2.0, 1.0), 0.1, plateau_shape=1.5),
        degrade.sinc_kernel(size, np.pi / 3),
        degrade.sinc_kernel(size, np.pi),
    ]
    for kernel in kernels:
        assert kernel.shape == (size, size) and kernel.dtype == np.float32
        assert np.isfinite(kernel).all()
        assert kernel.sum() == pytest.approx(1, abs=1e-5)


def test_isotropic_kernel_is_the_outer_product_of_two_gaussians():
    sigma, distance = 1.7, np.arange(-10, 11)
    line = np.exp(-(distance**2) / (2 * sigma**2))
    line /= line.sum()
    kernel = degrade.gaussian_kernel(21, (sigma, sigma), angle=1.1)
    np.testing.assert_allclose(kernel, np.outer(line, line), atol=1e-7)


def test_second_moments_are_the_requested_covariance():
    sigma, angle = (6.0, 2.5), 0.6
    kernel = degrade.gaussian_kernel(75, sigma, angle).astype(np.float64)
    y, x = np.mgrid[-37:38, -37:38]
    measured = [
        [(kernel * x * x).sum(), (kernel * x * y).sum()],
        [(kernel * x * y).sum(), (kernel * y * y).sum()],
    ]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(measured, turn @ np.diag(np.square(sigma)) @ turn.T, rtol=1e-4)


@pytest.mark.parametrize("shape", [0.5, 1.0, 3.0])
def test_generalized_and_plateau_kernels_at_one_sigma(shape):
    """At a distance of one sigma q is 1, so the fall from the peak does not depend on the exponent."""
    generalized = degrade.gaussian_kernel(21, (4.0, 4.0), generalized_shape=shape)
    plateau = degrade.gaussian_kernel(21, (4.0, 4.0), plateau_shape=shape)
    assert generalized[10, 14] / generalized[10, 10] == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert plateau[10, 14] / plateau[10, 10] == pytest.approx(0.5, rel=1e-5)
    # Two sigma: q = 4.
    assert generalized[10, 18] / generalized[10, 10] == pytest.approx(np.exp(-(4**shape) / 2), rel=1e-4)
    assert plateau[10, 18] / plateau[10, 10] == pytest.approx(1 / (1 + 4**shape), rel=1e-4)


def test_generalized_kernel_with_exponent_one_is_the_gaussian():
    arguments = (21, (2.5, 1.0), 0.3)
    np.testing.assert_array_equal(
        degrade.gaussian_kernel(*arguments, generalized_shape=1.0), degrade.gaussian_kernel(*arguments)
    )


@pytest.mark.parametrize("cutoff", [np.pi / 3, np.pi / 2, 0.8 * np.pi])
def test_sinc_passes_below_its_cutoff_and_blocks_above(cutoff):
    kernel = degrade.sinc_kernel(61, cutoff)
    gain = np.abs(np.fft.fft2(kernel, (256, 256)))
    frequency = 2 * np.pi * np.fft.fftfreq(256)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    assert gain[radius < 0.7 * cutoff].min() > 0.9
    assert gain[radius < 0.7 * cutoff].max() < 1.1
    assert gain[radius > 1.2 * cutoff].max() < 0.1


def test_sinc_overshoots_at_an_edge():
    """The rings are the reason to have it: a step from 0.25 to 0.75 must leave that range."""
    step = np.full((64, 64, 3), 0.25, np.float32)
    step[:, 32:] = 0.75
    ringing = degrade._filter(step, degrade.sinc_kernel(21, np.pi / 3))
    assert ringing.max() > 0.77 and ringing.min() < 0.23


def test_every_kernel_family_is_drawn_as_often_as_its_probability_says():
    order, draws = DegradationOrder(), 3000
    rng = np.random.default_rng(0)
    counts = collections.Counter(degrade.draw_kernel(order, rng)[1] for _ in range(draws))
    expected = {
        name: (1 - order.sinc_probability) * share
        for name, share in dataclasses.asdict(order.kernels).items()
    } | {"sinc": order.sinc_probability}
    assert set(counts) == set(expected)
    for name, share in expected.items():
        assert counts[name] / draws == pytest.approx(share, abs=4.5 * np.sqrt(share / draws)), name


def test_families_named_iso_are_round_and_the_others_are_not():
    rng = np.random.default_rng(1)
    order = DegradationOrder(kernel_size=(21, 21), blur_sigma=(1.0, 3.0))
    changes = {"round": [], "stretched": []}
    for _ in range(300):
        kernel, family = degrade.draw_kernel(order, rng)
        change_by_a_quarter_turn = np.abs(kernel - np.rot90(kernel)).max()
        changes["stretched" if family.endswith("aniso") else "round"].append(change_by_a_quarter_turn)
    assert max(changes["round"]) < 1e-6
    assert np.mean(np.array(changes["stretched"]) > 1e-4) > 0.95


def test_drawn_kernels_are_odd_and_cover_the_size_range():
    rng = np.random.default_rng(2)
    sizes = {len(degrade.draw_kernel(DegradationOrder(), rng)[0]) for _ in range(400)}
    assert sizes == set(range(7, 22, 2))


# --------------------------------------------------------------------------------------------------
# Noise and JPEG
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 15.0, 40.0])
@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_the_requested_sigma(sigma, grey):
    unit = flat(0.5)
    noisy = degrade.add_gaussian_noise(unit, sigma, grey, np.random.default_rng(0))
    assert 255 * noisy.std() == pytest.approx(sigma, rel=0.01)
    assert 255 * (noisy - unit).mean() == pytest.approx(0, abs=0.02 * sigma)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("noise", [degrade.add_gaussian_noise, degrade.add_poisson_noise])
def test_grey_noise_is_equal_across_channels_and_colour_noise_is_independent(noise, grey):
    unit = flat(0.5) * np.array([0.6, 1.0, 1.2], np.float32)
    change = noise(unit, 1.0, grey, np.random.default_rng(0)) - unit
    if grey:
        np.testing.assert_allclose(change[..., 0], change[..., 1], atol=1e-6)
        np.testing.assert_allclose(change[..., 0], change[..., 2], atol=1e-6)
        assert change.std() > 0.001
    else:
        correlation = np.corrcoef(change.reshape(-1, 3).T)
        assert np.abs(correlation - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("intensity", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("scale", [0.5, 1.5])
@pytest.mark.parametrize("grey", [False, True])
def test_poisson_variance_is_proportional_to_intensity(intensity, scale, grey):
    noisy = degrade.add_poisson_noise(flat(intensity), scale, grey, np.random.default_rng(0))
    assert noisy.var() == pytest.approx(scale**2 * intensity / 256, rel=0.03)
    assert noisy.mean() == pytest.approx(intensity, rel=0.01)


def test_jpeg_error_falls_with_quality_and_red_stays_red(photograph):
    unit = (photograph + 1) / 2
    errors = [
        np.mean((degrade._jpeg_levels(unit, quality) / 255.0 - unit) ** 2) for quality in (10, 30, 50, 75, 95)
    ]
    assert all(higher > lower for higher, lower in zip(errors[:-1], errors[1:], strict=True))
    red = degrade._jpeg_levels(np.array([0.8, 0.1, 0.1], np.float32) * flat(1.0, 32), 90)
    np.testing.assert_allclose(red.mean(axis=(0, 1)), [204, 26, 26], atol=3)


# --------------------------------------------------------------------------------------------------
# The fixed tasks
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [(512, 512), (255, 129), (64, 64)])
def test_task_size_levels_and_range(photograph, name, size):
    image, task = photograph[: size[0], : size[1]], TASKS[name]
    lq = degrade.apply_task(image, task, np.random.default_rng(0))
    assert lq.shape == (round(size[0] / task.downscale), round(size[1] / task.downscale), 3)
    assert lq.dtype == np.float32 and np.abs(lq).max() <= 1
    levels = (lq + 1) * 127.5
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)


def test_sr_task_is_bicubic_to_half_a_level(photograph):
    lq = degrade.apply_task(photograph, TASKS["sr8"], np.random.default_rng(0))
    np.testing.assert_allclose(lq, resize(photograph, 64, 64), atol=0.51 / 127.5)


def test_task_noise_is_at_the_low_resolution_and_has_its_sigma():
    task = Task(downscale=4, noise_sigma=40.0)
    lq = degrade.apply_task(flat(0.0, 512), task, np.random.default_rng(0))
    assert 127.5 * lq.std() == pytest.approx(40, rel=0.02)
    neighbours = np.corrcoef(lq[:, 1:].ravel(), lq[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.03


def test_task_blur_is_at_full_resolution():
    """An edge blurred with sigma 16, seen 8x smaller, is the error function sampled every 8 pixels."""
    edge = flat(-1.0)
    edge[:, 128:] = 1
    lq = degrade.apply_task(edge, Task(downscale=8, blur_sigma=16.0), np.random.default_rng(0))
    distance = 8 * (np.arange(32) + 0.5) - 128
    np.testing.assert_allclose(lq[10, :, 1], erf(distance / (16 * np.sqrt(2))), atol=0.01)


def test_task_difficulty_on_a_photograph(photograph):
    def restored_psnr(name):
        lq = degrade.apply_task(photograph, TASKS[name], np.random.default_rng(0))
        return psnr(resize(lq, 512, 512), photograph)

    values = {name: restored_psnr(name) for name in TASKS}
    assert 20 < values["sr8"] < 24
    assert 16 < values["mixture"] < 20
    assert values["sr16"] < values["sr8"]
    assert values["mixture"] < values["fig4"] < values["fig4_x4"]


# --------------------------------------------------------------------------------------------------
# The random process
# --------------------------------------------------------------------------------------------------


def test_seed_alone_decides(photograph):
    image = photograph[:96, :80]
    before = image.copy()
    threads = cv2.getNumThreads()
    for seed in range(8):
        first = degrade.degrade_item(image, DegradationConfig(), seed)
        np.random.seed(seed)
        cv2.setNumThreads(1 if seed % 2 else 4)
        assert degrade.degrade_item(image, DegradationConfig(), seed).tobytes() == first.tobytes()
    cv2.setNumThreads(threads)
    np.testing.assert_array_equal(image, before)
    items = {degrade.degrade_item(image, RANDOM_ONLY, seed).tobytes() for seed in range(20)}
    assert len(items) == 20


@pytest.mark.parametrize("size", [(256, 256), (32, 32), (33, 47), (64, 200), (131, 77)])
def test_random_process_at_any_size(photograph, size):
    image = photograph[100 : 100 + size[0], 60 : 60 + size[1]]
    for seed in range(12):
        lq = degrade.degrade_item(image, RANDOM_ONLY, seed)
        assert lq.shape == image.shape and lq.dtype == np.float32
        assert np.isfinite(lq).all() and np.abs(lq).max() <= 1


def test_views_and_flips_are_accepted(photograph):
    flipped = photograph[:64, :64][:, ::-1]
    expected = degrade.degrade_item(np.ascontiguousarray(flipped), DegradationConfig(), 3)
    np.testing.assert_array_equal(degrade.degrade_item(flipped, DegradationConfig(), 3), expected)


def test_scale_is_log_uniform(photograph):
    image = photograph[:256, :256]
    sizes = [
        degrade.random_degradation(image, RANDOM_ONLY, np.random.default_rng(s)).shape[0] for s in range(120)
    ]
    scales = 256 / np.array(sizes)
    assert scales.min() < 1.3 and scales.max() > 12.5
    assert np.log2(scales).mean() == pytest.approx(2, abs=0.42)  # four standard errors
    fixed = dataclasses.replace(RANDOM_ONLY, scale=(4.0, 4.0))
    assert degrade.random_degradation(image, fixed, np.random.default_rng(0)).shape == (64, 64, 3)


def test_colour_survives_on_average():
    """No step swaps channels or shifts the mean: a flat colour stays near itself in every draw."""
    colour = np.array([0.5, -0.2, -0.6], np.float32)
    image = flat(1.0, 64) * colour
    means = [degrade.degrade_item(image, RANDOM_ONLY, seed).mean(axis=(0, 1)) for seed in range(60)]
    np.testing.assert_allclose(np.mean(means, axis=0), colour, atol=0.04)


def test_both_orders_of_the_last_jpeg_are_reached(photograph, monkeypatch):
    calls = []
    final, jpeg = degrade._final_resize_and_sinc, degrade._jpeg_levels
    monkeypatch.setattr(degrade, "_final_resize_and_sinc", lambda *a: (calls.append("resize"), final(*a))[1])
    monkeypatch.setattr(degrade, "_jpeg_levels", lambda *a: (calls.append("jpeg"), jpeg(*a))[1])
    endings = collections.Counter()
    for seed in range(60):
        calls.clear()
        degrade.random_degradation(photograph[:64, :64], RANDOM_ONLY, np.random.default_rng(seed))
        endings[tuple(calls)] += 1
    assert set(endings) == {("jpeg", "jpeg", "resize"), ("jpeg", "resize", "jpeg")}
    assert min(endings.values()) > 15


def test_every_resize_mode_direction_and_noise_is_reached(photograph, monkeypatch):
    modes, factors, noises = set(), [], set()
    resize, gaussian, poisson = cv2.resize, degrade.add_gaussian_noise, degrade.add_poisson_noise

    def spy_resize(image, size, interpolation):
        modes.add(interpolation)
        factors.append(size[1] / image.shape[0])
        return resize(image, size, interpolation=interpolation)

    def spy_gaussian(unit, sigma, grey, rng):
        noises.add(("gaussian", grey))
        return gaussian(unit, sigma, grey, rng)

    def spy_poisson(unit, scale, grey, rng):
        noises.add(("poisson", grey))
        return poisson(unit, scale, grey, rng)

    monkeypatch.setattr(degrade.cv2, "resize", spy_resize)
    monkeypatch.setattr(degrade, "add_gaussian_noise", spy_gaussian)
    monkeypatch.setattr(degrade, "add_poisson_noise", spy_poisson)
    for seed in range(60):
        degrade.random_degradation(photograph[:64, :64], RANDOM_ONLY, np.random.default_rng(seed))
    assert modes == {cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC}
    assert min(factors) < 0.3 and max(factors) > 1.3
    assert noises == {("gaussian", False), ("gaussian", True), ("poisson", False), ("poisson", True)}


def test_settings_reach_the_result(photograph):
    """With every step off or at its mildest the process is nearly the identity; one step alone is not."""
    off = DegradationOrder(
        blur_probability=0.0,
        resize_up_probability=0.0,
        resize_down_probability=0.0,
        gaussian_probability=1.0,
        gaussian_sigma=(0.0, 0.0),
        jpeg_quality=(100, 100),
    )
    quiet = DegradationConfig(
        task_probability=0.0, scale=(1.0, 1.0), first=off, second=off, final_sinc_probability=0.0
    )
    image = photograph[100:228, 160:288]  # a face

    def result_psnr(**changes):
        changed = dataclasses.replace(quiet, first=dataclasses.replace(off, **changes))
        return psnr(degrade.degrade_item(image, changed, 0), image)

    assert result_psnr() > 40  # only the halved colour resolution of two JPEGs is left
    assert result_psnr(blur_probability=1.0, sinc_probability=0.0, blur_sigma=(2.0, 3.0)) < 30
    assert result_psnr(resize_down_probability=1.0, resize_scale=(0.2, 0.2)) < 30
    assert result_psnr(gaussian_sigma=(20.0, 20.0)) < 28
    assert result_psnr(gaussian_probability=0.0, poisson_scale=(3.0, 3.0)) < 25
    assert result_psnr(jpeg_quality=(5, 5)) < 30


def test_share_of_tasks_is_the_task_probability(photograph):
    image = photograph[:32, :32]
    config = DegradationConfig(task_probability=0.6, tasks=("sr8", "mixture"))
    names = collections.Counter(
        degrade.draw_lq(image, config, np.random.default_rng(s))[1] for s in range(500)
    )
    assert set(names) == {"sr8", "mixture", "random"}
    assert names["random"] / 500 == pytest.approx(0.4, abs=0.09)
    assert names["sr8"] / 500 == pytest.approx(0.3, abs=0.09)


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), "not uint8"),
        (np.zeros((64, 64, 3)), "not float64"),
        (np.zeros((64, 64), np.float32), r"\(64, 64\)"),
        (np.zeros((1, 64, 64, 3), np.float32), r"\(1, 64, 64, 3\)"),
        (np.zeros((64, 64, 4), np.float32), r"\(64, 64, 4\)"),
        (np.zeros((31, 64, 3), np.float32), "31 x 64 pixels; both sides must be at least 32"),
        (np.full((64, 64, 3), 255, np.float32), "255"),
        (np.full((64, 64, 3), np.nan, np.float32), "nan"),
    ],
)
def test_unusable_images_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        degrade.degrade_item(image, RANDOM_ONLY, 0)
    with pytest.raises(ValueError, match=message):
        degrade.apply_task(image, TASKS["sr8"], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DegradationConfig(task_probability=1.5), "1.5"),
        (lambda: DegradationConfig(tasks=("sr9",)), "'sr9'"),
        (lambda: DegradationConfig(tasks=()), "empty"),
        (lambda: DegradationConfig(scale=(0.5, 4.0)), "0.5"),
        (lambda: DegradationConfig(final_sinc_size=(7, 20)), "even"),
        (lambda: DegradationOrder(kernel_size=(6, 21)), "even"),
        (lambda: DegradationOrder(gaussian_sigma=(30.0, 1.0)), "gaussian_sigma"),
        (lambda: DegradationOrder(jpeg_quality=(30, 101)), "101"),
        (lambda: DegradationOrder(resize_up_probability=0.6, resize_down_probability=0.6), "1.2"),
        (lambda: BlurKernels(iso=0.5), "1.05"),
        (lambda: Task(downscale=0), "downscale 0"),
        (lambda: Task(jpeg_quality=0), "quality 0"),
    ],
)
def test_impossible_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --------------------------------------------------------------------------------------------------
# The contact sheet and its command
# --------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_what_the_pipeline_would_get(photograph):
    images = [photograph[:64, :96], photograph[64:128, :96], photograph[128:192, :96]]
    sheet = contact_sheet(images, DegradationConfig(), seed=5, columns=1)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 2 * 96
    pitch = (sheet.shape[0] - LABEL_HEIGHT - 64) // 2
    for index, image in enumerate(images):
        top = index * pitch + LABEL_HEIGHT
        cell = sheet[top : top + 64].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(cell[:, :96], image, atol=0.51 / 127.5)
        lq = degrade.degrade_item(image, DegradationConfig(), 5 + index)
        np.testing.assert_allclose(cell[:, 96:], lq, atol=0.51 / 127.5)
        label = sheet[top - LABEL_HEIGHT : top]
        assert label.max() > 200  # there is text in it


def test_contact_sheet_refuses_nothing_to_show(photograph):
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([], DegradationConfig(), seed=0)
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet([photograph], DegradationConfig(), seed=0, columns=0)


def test_preview_command(photograph, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "photographs"
    folder.mkdir()
    Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.png")
    output = tmp_path / "sheet.png"
    command = ["preview", "--input", str(folder), "--crop", "64", "--count", "4"]
    options = ["--output", str(output), "--degradation.task-probability", "0"]
    status, printed, _ = call(prepare.main, *command, *options)
    assert status == 0 and printed == f"{output}: 4 pairs from 1 images\n"
    sheet = np.asarray(Image.open(output))
    middle = skimage.data.astronaut()[224:288, 224:288]
    np.testing.assert_array_equal(sheet[LABEL_HEIGHT : LABEL_HEIGHT + 64, :64], middle)

    for wrong, message in [
        (["preview", "--input", str(tmp_path / "absent")], "absent is not a folder"),
        (["preview", "--input", str(tmp_path / "empty")], "empty holds no images"),
        ([*command, "--crop", "16", "--output", str(output)], "crop is 16 pixels"),
        ([*command, "--count", "0"], "count is 0"),
        ([*command, "--output", str(tmp_path / "sheet.txt")], "sheet.txt"),
    ]:
        status, _, printed = call(prepare.main, *wrong)
        assert status == 2
        assert message in printed and printed.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            call(prepare.main, *wrong, "--debug")


def test_preview_searches_subfolders_as_training_does(tmp_path, call):
    for name, top in [("a.png", 0), ("below/a.png", 128), ("below/deep/a.png", 256)]:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(skimage.data.astronaut()[top : top + 64, :64]).save(tmp_path / "in" / name)
    output = tmp_path / "sheet.png"
    command = ("preview", "--input", tmp_path / "in", "--output", output, "--crop", 64, "--count", 3)
    status, printed, _ = call(prepare.main, *command)
    assert status == 0 and printed == f"{output}: 3 pairs from 3 images\n"


def test_degradation_needs_no_jax():
    """Data workers start once per process; importing jax there costs seconds and memory."""
    code = "import sys, zipir_jax.data.degrade; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
