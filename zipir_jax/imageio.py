"""Image files to arrays and back."""

import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
OUTPUT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by name, sorted. Raises ValueError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    paths = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def distinct_names(paths: list[Path]) -> list[str]:
    """Names for the results of a folder's files: without suffix, but for files that differ in nothing else."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in paths]
    if len(set(names)) < len(names):  # a.jpg, a.png and a.jpg.png
        names = [path.name for path in paths]
    return names


def read_image(path: Path) -> Float32[np.ndarray, "h w 3"]:
    """An image file as float32 [h, w, 3] in [-1, 1], turned upright as its EXIF orientation says.

    Grey and palette images become RGB; alpha is dropped; 16-bit grey keeps its precision. Raises ValueError, with the
    path in it, for a file that is missing, empty, truncated, or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I") or image.mode == "F":
                    pixels = np.nan_to_num(np.asarray(image, np.float32))
                    # Pillow does not say what white is in 32 bits; a 1-bit picture has the mode "1", not these.
                    whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
                    if image.mode.startswith("I;16"):
                        whites = [65535]
                    white = next((white for white in whites if pixels.max() <= white), pixels.max())
                    pixels = np.repeat(np.clip(pixels / white, 0, 1)[..., None], 3, -1)
                else:
                    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: the image is damaged ({error})") from None
    return pixels * 2 - 1


def to_uint8(image: Float32[np.ndarray, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """[-1, 1] to 0..255, rounded and clipped."""
    return np.clip(np.round((np.asarray(image) + 1) * 127.5), 0, 255).astype(np.uint8)


def to_float(image: UInt8[np.ndarray, "*b h w c"]) -> Float32[np.ndarray, "*b h w c"]:
    """0..255 to [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]) -> None:
    """Write an image, uint8 or float32 in [-1, 1], as PNG, JPEG (quality 95) or lossless WebP, by the path's suffix.

    The file appears whole or not at all. Raises ValueError for another suffix or a folder that cannot be written.
    """
    path = Path(path)
    file_format = OUTPUT_FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path}: the output must end in one of {', '.join(OUTPUT_FORMATS)}")
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ValueError(f"{path.parent}: cannot be written to ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(image if image.dtype == np.uint8 else to_uint8(image)).save(
                file, file_format, **options
            )
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
