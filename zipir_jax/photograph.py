"""Photographs: what the network sees of an image file, and what is put back into the file of the result."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from zipir_jax import imageio
from zipir_jax.imageio import to_uint8

OUTPUT_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}


@dataclasses.dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Photograph:
    """A picture for the network, and beside it what the network does not see."""

    pixels: Float32[np.ndarray, "h w 3"]  # in [-1, 1], sRGB, upright
    file_format: str = "PNG"  # that it was read from, as Pillow names it
    bits: int = 8  # of a sample, 8 or 16
    is_grey: bool = False
    alpha: Float32[np.ndarray, "h w"] | None = None  # in [0, 1]
    residual: Float32[np.ndarray, "h w 3"] | None = (
        None  # of colours outside sRGB: what `pixels` lack, on their scale
    )
    icc: bytes | None = None
    exif: bytes | None = None  # a TIFF structure, without "Exif\0\0" before it
    xmp: bytes | None = None

    def with_pixels(self, restored: Float32[np.ndarray, "h2 w2 3"]) -> "Photograph":
        """The photograph with other pixels, in [-1, 1] and of any size, and all that belongs to it fitted to them."""
        return dataclasses.replace(self, pixels=restored)


def read_photograph(path: str | Path, data: bytes | None = None) -> Photograph:
    """An image file, or its bytes. Raises ValueError, in a sentence with the path."""
    pixels = imageio._decode(path, data)
    return Photograph(imageio.to_float(pixels) if pixels.dtype == np.uint8 else pixels * 2 - 1)


def photograph_size(path: str | Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) of what `read_photograph` returns, out of the file's header. Raises ValueError as it does."""
    return imageio.upright_size(path, data)


def check_output(path: str | Path, size: tuple[int, int]) -> None:
    """Raises ValueError where a photograph of this size (height, width) could not be written, with the path in it."""
    path = Path(path)
    if path.suffix.lower() not in OUTPUT_FORMATS:
        raise ValueError(f"{path}: the output must end in one of {', '.join(OUTPUT_FORMATS)}")


def write_photograph(
    file: str | Path | io.BufferedIOBase, photograph: Photograph, file_format: str | None = None
) -> list[str]:
    """Write a photograph by the suffix of its path, or into a binary file in a format of OUTPUT_FORMATS' values.

    Returns what could not be kept, as sentences. The file appears whole or not at all. Raises ValueError, with the
    path in it, for another suffix, a size that the format cannot hold, or a folder that cannot be written.
    """
    from PIL import Image

    from zipir_jax.files import replacing

    image = Image.fromarray(to_uint8(photograph.pixels))
    if not isinstance(file, str | Path):
        image.save(file, file_format)
        return []
    check_output(file, photograph.pixels.shape[:2])
    with replacing(file) as opened:
        image.save(opened, OUTPUT_FORMATS[Path(file).suffix.lower()])
    return []
