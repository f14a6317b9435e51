"""Image files to arrays and back."""

import contextlib
import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from zipir_jax.files import replacing

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
OUTPUT_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LARGEST_SIDE = 16384  # pixels of a result; beyond any size that the model is made for (8K)
LARGEST_PIXELS = LARGEST_SIDE**2  # of a picture that is read: 268 million, as many as a result can have
LARGEST_WEBP_SIDE = 16383  # pixels; the format has 14 bits for a side
UPRIGHT = {  # what undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def raise_pixel_limit() -> None:
    """Let this process read pictures of up to LARGEST_PIXELS; for a program to call, not for a library.

    Pillow warns above 89 million pixels and refuses twice as many, to guard servers against small files that unpack to
    huge pictures. It leaves the limit to the application; ours is what a result can have. Its warning would only stand
    before our own refusal of the same picture.
    """
    Image.MAX_IMAGE_PIXELS = LARGEST_PIXELS
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def list_images(folder: Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder by name, sorted. Raises ValueError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    paths = _walk(folder) if recursive else folder.iterdir()
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _walk(folder):
    """The files of a folder and its subfolders; links to folders are followed, but to each folder once."""
    seen = {folder.resolve()}
    for root, names, files in os.walk(folder, followlinks=True):
        targets = {name: (Path(root) / name).resolve() for name in sorted(names)}
        names[:] = [name for name, target in targets.items() if target not in seen]
        seen.update(targets.values())
        yield from (Path(root) / name for name in files)


def distinct_names(paths: list[Path]) -> list[str]:
    """Names for the results of a folder's files: without suffix, but for files that differ in nothing else."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else path.name for path in paths]
    if len(set(names)) < len(names):  # a.jpg, a.png and a.jpg.png
        names = [path.name for path in paths]
    return names


def read_image(path: str | Path) -> Float32[np.ndarray, "h w 3"]:
    """An image file as float32 [h, w, 3] in [-1, 1], turned upright as its EXIF orientation says.

    Grey and palette images become RGB; alpha is dropped; 16-bit grey keeps its precision. Raises ValueError, with the
    path in it, for a file that is missing, not readable, empty, truncated, no image, or of more than `LARGEST_PIXELS`
    pixels, the limit of a process that has called `raise_pixel_limit`.
    """
    pixels = _decode(path)
    return to_float(pixels) if pixels.dtype == np.uint8 else pixels * 2 - 1


def read_image_uint8(path: str | Path, data: bytes | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """`to_uint8(read_image(path))`, without the detour for the files of 8 bits that most are. Raises the same.

    data: the file's bytes where they are at hand; then nothing is read, and `path` is their name in errors.
    """
    pixels = _decode(path, data)
    return pixels if pixels.dtype == np.uint8 else to_uint8(pixels * 2 - 1)


def upright_size(path: str | Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) in pixels of what `read_image_uint8` returns, out of the file's header.

    Raises ValueError as `read_image`, but sees no damage behind the header.
    """
    with _opened(path, data) as image:
        getexif = image.getexif
        # A PNG file may hold EXIF data behind its pixels, and to find none Pillow decodes them: 100 times the work.
        if isinstance(image, PngImagePlugin.PngImageFile) and not _has_late_orientation(image.fp):
            getexif = super(PngImagePlugin.PngImageFile, image).getexif
        turned = (_orientation(getexif) or 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def _has_late_orientation(file):
    """Whether a PNG file's pixels are followed by EXIF or XMP data, of which either may hold an orientation."""
    start = file.tell()
    try:
        file.seek(8)  # the signature
        pixels_seen = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels_seen |= kind == b"IDAT"
            if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                keyword = file.read(min(length, 24))
                if kind == b"eXIf" or keyword.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
                    return True
                length -= len(keyword)
            file.seek(length + 4, io.SEEK_CUR)  # and the checksum
        return False
    finally:
        file.seek(start)


def _decode(path, data=None):
    """uint8 [h, w, 3], or float32 in [0, 1] for a file of more than 8 bits."""
    with _opened(path, data) as image:
        image.load()
        turn = UPRIGHT.get(_orientation(image.getexif))
        image = image if turn is None else image.transpose(turn)
        if not image.mode.startswith("I") and image.mode != "F":
            return np.asarray(image.convert("RGB"))
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        # Pillow does not say what white is in 32 bits; a 1-bit picture has the mode "1", not these.
        whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
        if image.mode.startswith("I;16"):
            whites = [65535]
        white = next((white for white in whites if pixels.max() <= white), pixels.max())
        return np.repeat(np.clip(pixels / white, 0, 1)[..., None], 3, -1)


def _orientation(getexif):
    """EXIF orientation, 1 to 8; None where there is none or the EXIF data are damaged: the pixels are not.

    `ImageOps.exif_transpose` packs the other EXIF data anew, and fails where one of them is damaged.
    """
    try:
        orientation = getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's readers of EXIF data raise nearly anything
        return None
    return orientation if isinstance(orientation, int) else None


@contextlib.contextmanager
def _opened(path, data=None) -> Iterator[Image.Image]:
    """A file, or its bytes, as a Pillow image, its header read.

    What fails here or within becomes a ValueError with the path.
    """
    if data is None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    if (path.stat().st_size if data is None else len(data)) == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that can be read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: more than {LARGEST_PIXELS} pixels, the most that is read ({error})"
        ) from None
    except MemoryError:
        raise ValueError(f"{path}: the image does not fit into memory") from None
    except PermissionError:
        raise ValueError(f"{path}: cannot be read (no permission)") from None
    except Exception as error:  # Pillow's decoders raise nearly anything where a file's bytes make no sense
        raise ValueError(f"{path}: the image is damaged ({error})") from None


def to_uint8(image: Float32[np.ndarray, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """[-1, 1] to 0..255, rounded and clipped."""
    values = np.asarray(image) + 1
    values *= 127.5  # in place, as the image may be most of the memory that there is
    return np.clip(np.round(values, out=values), 0, 255, out=values).astype(np.uint8)


def to_float(image: UInt8[np.ndarray, "*b h w c"]) -> Float32[np.ndarray, "*b h w c"]:
    """0..255 to [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1


def resize(
    image: Float32[np.ndarray, "h w 3"], height: int, width: int
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Bicubic resize of an image in [-1, 1], antialiased where it shrinks, clipped to [-1, 1].

    Raises ValueError for another dtype or shape, or a size below 1.
    """
    check_dtype_and_shape(image)
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height} x {width} pixels; both sides must be at least 1.")
    return np.clip(resize_unclipped(image, height, width), -1, 1)


def resize_unclipped(
    image: Float32[np.ndarray, "h w 3"], height: int, width: int
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """`resize` without its checks, for any range of values, with the overshoot of a cubic filter at edges.

    Pillow's filter: Keys' cubic with a = -0.5, widened by the factor when shrinking, as in MATLAB and
    `jax.image.resize(method="cubic")`; OpenCV's cubic has a = -0.75 and aliases.
    """
    if image.shape[:2] == (height, width):
        return image
    planes = [Image.fromarray(np.ascontiguousarray(image[..., channel])) for channel in range(3)]
    return np.stack([plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes], axis=-1)


def check_dtype_and_shape(image: object) -> None:
    """Raises ValueError unless the image is a float32 array [h, w, 3]."""
    if not isinstance(image, np.ndarray) or image.dtype != np.float32:
        found = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"the image must be a float32 array in [-1, 1], not {found}.")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image has shape {image.shape} instead of (height, width, 3).")


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]) -> None:
    """Write an image, uint8 or float32 in [-1, 1], as PNG, JPEG (quality 95) or lossless WebP, by the path's suffix.

    The file appears whole or not at all. Raises ValueError, with the path in it, for another suffix, a size that the
    format cannot hold, or a folder that cannot be written.
    """
    path = Path(path)
    file_format = OUTPUT_FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path}: the output must end in one of {', '.join(OUTPUT_FORMATS)}")
    height, width = image.shape[:2]
    if file_format == "WEBP" and max(height, width) > LARGEST_WEBP_SIDE:
        raise ValueError(
            f"{path}: {width} x {height} pixels, but a side of a WebP file is at most {LARGEST_WEBP_SIDE}; "
            "write a PNG or JPEG file"
        )
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    pixels = Image.fromarray(image if image.dtype == np.uint8 else to_uint8(image))
    with replacing(path) as file:
        pixels.save(file, file_format, **options)
