"""From a clean photograph to its low-quality (LQ) partner: Real-ESRGAN's random process, the paper's tasks.

The random process is second order: blur, resize, noise and JPEG, then all four again with milder settings,
where the last JPEG comes before or after the final resize and sinc filter (Real-ESRGAN, Wang et al. 2021,
section 3; noise and shuffled order after BSRGAN, Zhang et al. 2021). Every range and probability is a field
of `zipir_jax.config.DegradationConfig`; everything random comes from one `numpy.random.Generator`, so that a
seed fixes an item's degradation.

Public images are float32 [height, width, 3], RGB in [-1, 1]. Inside, they are in [0, 1].
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from scipy.special import j1

from zipir_jax.config import TASKS, DegradationConfig, DegradationOrder, Task
from zipir_jax.imageio import check_dtype_and_shape, resize, resize_unclipped, to_float

MINIMUM_SIDE = 32  # pixels of the clean image: one latent of the VAE, and an LQ image of 2 pixels at x16
PHOTON_LEVELS = 256  # photons counted at full brightness before `poisson_scale` amplifies the noise
RESIZE_MODES = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)  # with equal odds, as in Real-ESRGAN
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 weights of red, green, blue


# --------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------


def degrade_item(
    image: np.ndarray, config: DegradationConfig, seed: int | tuple[int, ...]
) -> Float32[np.ndarray, "h w 3"]:
    """The LQ partner of a training image, resized back to the image's size (paper section 3.2).

    image: float32 [h, w, 3] in [-1, 1], any size from 32 px. seed: what `numpy.random.default_rng` takes;
    equal seeds give equal results. Raises ValueError as `check_image`.
    """
    lq, _ = draw_lq(image, config, np.random.default_rng(seed))
    return resize(lq, image.shape[0], image.shape[1])


def draw_lq(
    image: np.ndarray, config: DegradationConfig, rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "h w 3"], str]:
    """An LQ image at its own low resolution, and what made it: a name out of `config.tasks`, or "random".

    image: float32 [h, w, 3] in [-1, 1]. Raises ValueError as `check_image`.
    """
    if rng.random() < config.task_probability:
        name = config.tasks[rng.integers(len(config.tasks))]
        return apply_task(image, TASKS[name], rng), name
    return random_degradation(image, config, rng), "random"


def apply_task(image: np.ndarray, task: Task, rng: np.random.Generator) -> Float32[np.ndarray, "h w 3"]:
    """A fixed task of the paper: Gaussian blur at full size, antialiased bicubic downscale, noise, JPEG.

    image: float32 [h, w, 3] in [-1, 1]. Returns [round(h / downscale), round(w / downscale), 3] with the 256
    levels of an 8-bit file. Raises ValueError as `check_image`.
    """
    check_image(image)
    lq = _to_unit(image)
    if task.blur_sigma > 0:
        side = 2 * int(np.ceil(4 * task.blur_sigma)) + 1
        lq = cv2.GaussianBlur(lq, (side, side), task.blur_sigma, borderType=cv2.BORDER_REFLECT_101)
    lq = resize_unclipped(lq, *_scaled_size(image, task.downscale))
    if task.noise_sigma > 0:
        lq = add_gaussian_noise(lq, task.noise_sigma, grey=False, rng=rng)
    levels = _to_levels(lq) if task.jpeg_quality is None else _jpeg_levels(lq, task.jpeg_quality)
    return to_float(levels)


def random_degradation(
    image: np.ndarray, config: DegradationConfig, rng: np.random.Generator
) -> Float32[np.ndarray, "h w 3"]:
    """Real-ESRGAN's second-order process, at a scale drawn log-uniformly from `config.scale`.

    image: float32 [h, w, 3] in [-1, 1]. Returns [round(h / scale), round(w / scale), 3] with the 256 levels
    of an 8-bit file. Raises ValueError as `check_image`.
    """
    check_image(image)
    height, width = image.shape[:2]
    scale = np.exp(rng.uniform(*np.log(config.scale)))
    lq_height, lq_width = _scaled_size(image, scale)
    lq = _to_unit(image)

    lq = _blur(lq, config.first, rng)
    lq = _random_resize(lq, height, width, config.first, rng)
    lq = _add_noise(lq, config.first, rng)
    lq = _levels_to_unit(_jpeg_levels(lq, _draw_quality(config.first, rng)))

    lq = _blur(lq, config.second, rng)
    lq = _random_resize(lq, lq_height, lq_width, config.second, rng)
    lq = _add_noise(lq, config.second, rng)

    quality = _draw_quality(config.second, rng)
    if rng.random() < 0.5:
        lq = _final_resize_and_sinc(lq, lq_height, lq_width, config, rng)
        levels = _jpeg_levels(lq, quality)
    else:
        lq = _levels_to_unit(_jpeg_levels(lq, quality))
        levels = _to_levels(_final_resize_and_sinc(lq, lq_height, lq_width, config, rng))
    return to_float(levels)


def check_image(image: np.ndarray) -> None:
    """Raises ValueError unless the image is float32 [h, w, 3] with sides from 32 px and values in [-1, 1]."""
    check_dtype_and_shape(image)
    if min(image.shape[:2]) < MINIMUM_SIDE:
        raise ValueError(
            f"the image is {image.shape[0]} x {image.shape[1]} pixels; "
            f"both sides must be at least {MINIMUM_SIDE}."
        )
    lowest, highest = image.min(), image.max()
    if not (lowest >= -1.001 and highest <= 1.001):
        raise ValueError(f"the image's values run from {lowest:g} to {highest:g} instead of within [-1, 1].")


# --------------------------------------------------------------------------------------------------
# Blur kernels: float32 [size, size] with an odd size, summing to 1
# --------------------------------------------------------------------------------------------------


def gaussian_kernel(
    size: int,
    sigma: tuple[float, float],
    angle: float = 0.0,
    generalized_shape: float | None = None,
    plateau_shape: float | None = None,
) -> Float32[np.ndarray, "size size"]:
    """A Gaussian blur kernel or one of its two relatives (Real-ESRGAN section 3.1, BSRGAN section 3.1).

    sigma: standard deviations in pixels along the kernel's two axes; the first axis points `angle` radians
    from the image's x axis towards its y axis. With q = v' covariance^-1 v the kernel is exp(-q / 2); or the
    generalized Gaussian exp(-q^beta / 2) with beta = `generalized_shape`; or the plateau 1 / (1 + q^beta)
    with beta = `plateau_shape`.
    """
    radius = size // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    along = (np.cos(angle) * x + np.sin(angle) * y) / sigma[0]
    across = (-np.sin(angle) * x + np.cos(angle) * y) / sigma[1]
    q = along**2 + across**2
    if plateau_shape is not None:
        kernel = 1 / (1 + q**plateau_shape)
    elif generalized_shape is not None:
        kernel = np.exp(-(q**generalized_shape) / 2)
    else:
        kernel = np.exp(-q / 2)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(size: int, cutoff: float) -> Float32[np.ndarray, "size size"]:
    """The circular low-pass filter that leaves rings and overshoot (Real-ESRGAN section 3.3, equation 6).

    cutoff: radians per pixel, up to pi. The kernel is cutoff * J1(cutoff * r) / (2 pi r) at distance r.
    """
    radius = size // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    distance = np.hypot(x, y)
    distance[radius, radius] = 1  # replaced below by the limit at 0
    kernel = cutoff * j1(cutoff * distance) / (2 * np.pi * distance)
    kernel[radius, radius] = cutoff**2 / (4 * np.pi)
    return (kernel / kernel.sum()).astype(np.float32)


def draw_kernel(order: DegradationOrder, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A blur kernel as the order's settings say, and its family: "sinc" or a field name of `BlurKernels`."""
    size = _draw_odd(order.kernel_size, rng)
    if rng.random() < order.sinc_probability:
        cutoff = order.sinc_cutoff_small if size < 13 else order.sinc_cutoff_large
        return sinc_kernel(size, rng.uniform(*cutoff)), "sinc"

    families = [field.name for field in dataclasses.fields(order.kernels)]
    family = rng.choice(families, p=dataclasses.astuple(order.kernels))
    sigma = rng.uniform(*order.blur_sigma, size=2)
    angle = rng.uniform(-np.pi, np.pi)
    if family.endswith("iso") and not family.endswith("aniso"):
        sigma[1] = sigma[0]
    generalized_shape = plateau_shape = None
    if family.startswith("generalized"):
        generalized_shape = _draw_around_one(order.generalized_shape, rng)
    elif family.startswith("plateau"):
        plateau_shape = _draw_around_one(order.plateau_shape, rng)
    return gaussian_kernel(size, tuple(sigma), angle, generalized_shape, plateau_shape), str(family)


# --------------------------------------------------------------------------------------------------
# Noise, on images in [0, 1]
# --------------------------------------------------------------------------------------------------


def add_gaussian_noise(unit: np.ndarray, sigma: float, grey: bool, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise of standard deviation sigma / 255 to an image in [0, 1] and clips the sum.

    grey: the same noise in the three channels.
    """
    shape = unit.shape[:2] + (1 if grey else 3,)
    noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma / 255)
    return np.clip(unit + noise, 0, 1)


def add_poisson_noise(unit: np.ndarray, scale: float, grey: bool, rng: np.random.Generator) -> np.ndarray:
    """Adds scale times the noise of counting 256 photons at full brightness, and clips the sum.

    The variance is scale^2 * intensity / 256. unit: image in [0, 1]. grey: the noise is that of the luma, the
    same in the three channels.
    """
    intensity = (unit @ LUMA)[..., None] if grey else unit
    counts = rng.poisson(intensity * np.float32(PHOTON_LEVELS)).astype(np.float32)
    noise = counts / np.float32(PHOTON_LEVELS) - intensity
    return np.clip(unit + np.float32(scale) * noise, 0, 1)


# --------------------------------------------------------------------------------------------------
# The steps of an order
# --------------------------------------------------------------------------------------------------


def _blur(unit, order, rng):
    if rng.random() >= order.blur_probability:
        return unit
    kernel, _ = draw_kernel(order, rng)
    return _filter(unit, kernel)


def _filter(unit, kernel):
    # A sinc kernel overshoots; a file cannot hold what lies outside [0, 1].
    return np.clip(cv2.filter2D(unit, -1, kernel, borderType=cv2.BORDER_REFLECT_101), 0, 1)


def _random_resize(unit, height, width, order, rng):
    """Resizes to a random multiple of height x width, which is 1 where neither up nor down is drawn."""
    draw = rng.random()
    low, high = order.resize_scale
    one = np.clip(1, low, high)
    if draw < order.resize_up_probability:
        factor = rng.uniform(one, high)
    elif draw < order.resize_up_probability + order.resize_down_probability:
        factor = rng.uniform(low, one)
    else:
        factor = 1.0
    return _resize_in_mode(unit, max(1, round(height * factor)), max(1, round(width * factor)), rng)


def _resize_in_mode(unit, height, width, rng):
    mode = RESIZE_MODES[rng.integers(len(RESIZE_MODES))]
    if unit.shape[:2] == (height, width):
        return unit
    # Bilinear and bicubic alias when they shrink, here as in Real-ESRGAN: careless software does the same.
    return np.clip(cv2.resize(unit, (width, height), interpolation=mode), 0, 1)


def _add_noise(unit, order, rng):
    gaussian = rng.random() < order.gaussian_probability
    grey = rng.random() < order.grey_probability
    if gaussian:
        return add_gaussian_noise(unit, rng.uniform(*order.gaussian_sigma), grey, rng)
    return add_poisson_noise(unit, rng.uniform(*order.poisson_scale), grey, rng)


def _draw_quality(order, rng):
    return int(rng.integers(order.jpeg_quality[0], order.jpeg_quality[1] + 1))


def _final_resize_and_sinc(unit, height, width, config, rng):
    unit = _resize_in_mode(unit, height, width, rng)
    if rng.random() < config.final_sinc_probability:
        size = _draw_odd(config.final_sinc_size, rng)
        unit = _filter(unit, sinc_kernel(size, rng.uniform(*config.final_sinc_cutoff)))
    return unit


# --------------------------------------------------------------------------------------------------
# Small helpers
# --------------------------------------------------------------------------------------------------


def _draw_odd(bounds, rng):
    return int(2 * rng.integers(bounds[0] // 2, bounds[1] // 2 + 1) + 1)


def _draw_around_one(bounds, rng):
    """Uniform below 1 or uniform above 1 with even odds, within the bounds."""
    one = np.clip(1, *bounds)
    return rng.uniform(bounds[0], one) if rng.random() < 0.5 else rng.uniform(one, bounds[1])


def _scaled_size(image, scale):
    return max(1, round(image.shape[0] / scale)), max(1, round(image.shape[1] / scale))


def _to_unit(image):
    return np.clip((np.ascontiguousarray(image) + 1) / 2, 0, 1)


def _to_levels(unit) -> UInt8[np.ndarray, "h w 3"]:
    return (np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)


def _levels_to_unit(levels):
    return levels.astype(np.float32) / 255


def _jpeg_levels(unit, quality) -> UInt8[np.ndarray, "h w 3"]:
    """The image after one JPEG at this quality, with colour at half resolution (4:2:0, the usual choice)."""
    bgr = cv2.cvtColor(_to_levels(unit), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
