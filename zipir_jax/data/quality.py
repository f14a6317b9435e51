"""Measures of an image by which `prepare index` chooses: sharpness, compression, a hash of what it shows."""

import io

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

HASH_SIDE = 16  # the perceptual hash has HASH_SIDE^2 bits
SHARPNESS_SIDE = 1024  # pixels; a larger image is judged at this short side: the pixels of cameras are soft
TILE = 64  # pixels; a photograph with a shallow depth of field is sharp in some of these only
REFERENCE_QUALITY = 50  # of the JPEG file that a file is compared with
LARGEST_JPEG_SIDE = 65500  # pixels that libjpeg takes


def sharpness(luma: Float32[np.ndarray, "h w"]) -> float:
    """Finest detail / next coarser detail in the sharpest tenth of the image; luma: 0..255.

    The finest is what a blur of sigma 1 pixel takes away, the next what sigma 2 takes away beyond that; the ratio does
    not change with contrast. Photographs have detail at every scale; what was blurred, or enlarged, lacks the finest.
    """
    shrink = SHARPNESS_SIDE / min(luma.shape)
    if shrink < 1:
        luma = cv2.resize(luma, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    once, twice = cv2.GaussianBlur(luma, (0, 0), 1.0), cv2.GaussianBlur(luma, (0, 0), 2.0)
    fine, coarse = _tile_energy(luma - once), _tile_energy(once - twice)
    # 0.1: below the noise of rounding to whole levels.
    return float(np.quantile(np.sqrt(fine / (coarse + 0.1)), 0.9))


def _tile_energy(band):
    """Mean square of each tile."""
    rows, columns = (max(1, side // TILE) for side in band.shape)
    height, width = band.shape[0] // rows, band.shape[1] // columns
    tiles = band[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return np.square(tiles).mean(axis=(1, 3))


def jpeg_bytes(pixels: UInt8[np.ndarray, "h w 3"]) -> int:
    """Bytes of the image as a JPEG file of `REFERENCE_QUALITY`: how much there is to compress in it."""
    file = io.BytesIO()
    pixels = pixels[:LARGEST_JPEG_SIDE, :LARGEST_JPEG_SIDE]
    Image.fromarray(pixels).save(file, "JPEG", quality=REFERENCE_QUALITY)
    return file.tell()


def perceptual_hash(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Signs of the image's low frequencies, less their median: 256 bits as 64 hexadecimal digits."""
    import imagehash

    return str(imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE))
