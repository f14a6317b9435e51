"""Buckets: crops of one height and width, so that a batch is one array (after the paper's reference [34]).

A resolution and an aspect ratio give a bucket. Within a resolution an image belongs to the bucket whose aspect ratio is
nearest to its own among those that it fills without being enlarged.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Int, Int32

from zipir_jax.config import DataConfig

MULTIPLE = 64  # pixels, of both sides of a crop: two latent pixels
LATENT_PIXEL = 32  # pixels, side


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Crops of one size, the images they are cut from, and how often they come."""

    height: int  # pixels
    width: int  # pixels
    batch_size: int  # images, over all devices
    images: Int[np.ndarray, " n"]  # indices in the source
    weight: (
        float  # share of the batches; in all batches, the shares of the images are those of their resolutions
    )


def crop_sides(resolution: int, aspect_ratio: float) -> tuple[int, int]:
    """(height, width) in multiples of 64 pixels: about resolution^2 pixels of about this width / height.

    Each side is off by 32 pixels at most, so that the area is nearer, the higher the resolution.
    """
    sides = resolution / aspect_ratio**0.5, resolution * aspect_ratio**0.5
    # Halves are rounded up, and so is what rounding errors leave below one: else 4 : 9 were not 9 : 4 on its side.
    height, width = (max(1, math.floor(side / MULTIPLE + 0.5 + 1e-9)) * MULTIPLE for side in sides)
    return height, width


def make_buckets(
    config: DataConfig, sizes: Int32[np.ndarray, "n 2"], divisor: int = 1, exact: bool = False
) -> list[Bucket]:
    """The buckets of a config that have images, by resolution.

    sizes: height and width in pixels of each image; exact: only images of a crop's own size will do. divisor: what a
    batch's images must divide by; a batch that follows from `batch_tokens` is rounded down to it, but not to none.
    Raises ValueError for a batch_size that it does not divide, and for a resolution that no image has.
    """
    if not config.batch_tokens and config.batch_size % divisor:
        raise ValueError(
            f"data.batch_size {config.batch_size} is not a multiple of {divisor}: devices that share it x accumulate"
        )
    heights, widths = sizes[:, 0], sizes[:, 1]
    fits = np.equal if exact else np.greater_equal
    shares = np.array(config.resolution_weights or [1.0] * len(config.resolutions))
    parts = []
    for resolution, share in zip(config.resolutions, shares / shares.sum(), strict=True):
        crops = sorted({crop_sides(resolution, ratio) for ratio in config.aspect_ratios})
        # How far each image's aspect ratio is from each crop's, as a factor; infinite where it is too small.
        distance = np.stack(
            [
                np.where(
                    fits(heights, height) & fits(widths, width),
                    np.abs(np.log(width / height) - np.log(widths / np.maximum(heights, 1))),
                    np.inf,
                )
                for height, width in crops
            ]
        )
        nearest = np.where(np.isfinite(distance.min(0)), distance.argmin(0), -1)
        total = np.count_nonzero(nearest >= 0)
        if not total:
            shapes = ", ".join(f"{width} x {height}" for height, width in crops)
            wanted = "is exactly as large as" if exact else "has the pixels of"
            raise ValueError(
                f"none of the {len(sizes)} images {wanted} a crop of resolution {resolution}: {shapes}"
            )
        for index, (height, width) in enumerate(crops):
            images = np.flatnonzero(nearest == index)
            if len(images):
                parts.append((height, width, images, share * len(images) / total))
    batch_sizes = [batch_size(config, height, width, divisor) for height, width, *_ in parts]
    # A share of the images is a share of the batches where these are equally large.
    weights = np.array([part[-1] for part in parts]) / batch_sizes
    return [
        Bucket(height, width, size, images, float(weight))
        for (height, width, images, _), size, weight in zip(
            parts, batch_sizes, weights / weights.sum(), strict=True
        )
    ]


def batch_size(config: DataConfig, height: int, width: int, divisor: int) -> int:
    """Images of a batch of crops, over all devices."""
    if not config.batch_tokens:
        return config.batch_size
    tokens = height * width // LATENT_PIXEL**2
    return max(config.batch_tokens // tokens // divisor, 1) * divisor
